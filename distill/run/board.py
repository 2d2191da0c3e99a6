"""What the workers of a run tell each other: counters and notes in torchrun's own key-value store."""

import contextlib
import functools
import secrets
import time
from collections.abc import Iterator
from typing import Any

from distill.errors import PeerError
from distill.run.grid import Grid


class Board:
    """Counters and notes that all workers share. Only `wait` and `meet` wait, by polling, with no time-out.

    Every method raises PeerError where the store is gone: it lives on the node of worker 0.
    """

    def __init__(self, store: Any) -> None:
        """store: a torch.distributed.Store."""
        self._store = store

    def add(self, name: str, amount: int) -> int:
        """Add to the counter `name` and return its new value; ``add(name, 0)`` reads it."""
        with _reachable():
            return int(self._store.add(name, amount))

    def note(self, name: str, text: str) -> None:
        """Publish `text` under `name`."""
        with _reachable():
            self._store.set(name, text)

    def has(self, name: str) -> bool:
        """Whether a note `name` was published."""
        with _reachable():
            return bool(self._store.check([name]))

    def wait(self, name: str, poll_seconds: float = 0.05) -> str:
        """The text of the note `name`, as soon as it is published."""
        while not self.has(name):
            time.sleep(poll_seconds)
        with _reachable():
            return str(self._store.get(name), "utf-8")

    def meet(self, name: str, count: int, poll_seconds: float = 0.05) -> None:
        """Wait until `count` workers have called this with the same `name`."""
        self.add(name, 1)
        while self.add(name, 0) < count:
            time.sleep(poll_seconds)


@contextlib.contextmanager
def first_of_node(grid: Grid, board: Board) -> Iterator[None]:
    """On each node, its first worker does what is inside, then all the others do."""
    if grid.local_rank > 0:
        board.wait(f"the first of node {grid.node} is done")
    yield
    if grid.local_rank == 0:
        board.note(f"the first of node {grid.node} is done", "")


@contextlib.contextmanager
def _reachable() -> Iterator[None]:
    from torch.distributed import DistError

    try:
        yield
    except DistError as error:
        raise PeerError("the run has ended on the node of worker 0, whose console says why", []) from error


def store_of(grid: Grid) -> Any:
    """The torch.distributed.Store of all workers of this run."""
    from torch.distributed import HashStore

    return shared_store(grid.rank, grid.world_size) if grid.launched else HashStore()


@functools.cache
def shared_store(rank: int, world_size: int) -> Any:
    """torchrun's store, under a prefix that only the workers of this round know.

    torchrun starts a new round, with new workers, when a worker fails and when a node joins or leaves; its store stays.
    No number tells rounds apart, since each node counts only the restarts that it caused. So worker 0 draws a random
    prefix. Each other worker asks for it, under a name that it has just drawn: earlier rounds' workers get no answer.
    """
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store = PrefixStore("distill", next(rendezvous("env://"))[0])
    board, mine = Board(store), secrets.token_hex(8)
    if rank > 0:
        board.note(f"{rank} asks", mine)
        prefix = board.wait(f"answer to {mine}")
        board.add(f"joined {prefix}", 1)
        return PrefixStore(prefix, store)
    while board.add(f"joined {mine}", 0) < world_size - 1:
        for peer in range(1, world_size):
            if board.has(f"{peer} asks"):
                board.note(f"answer to {board.wait(f'{peer} asks')}", mine)
        time.sleep(0.02)
    return PrefixStore(mine, store)


def from_all(grid: Grid, board: Board, text: str) -> list[str]:
    """The last words of all workers, when all are done, on worker 0; none on the others, which wait for that."""
    board.note(f"totals of {grid.rank}", text)
    if grid.rank > 0:  # stay, to watch worker 0; the others would also take a worker that is gone for one that failed
        with contextlib.suppress(PeerError):
            board.wait("all are done", poll_seconds=1.0)
        return []
    found = [board.wait(f"totals of {rank}") for rank in range(grid.world_size)]
    board.note("all are done", "yes")
    return found
