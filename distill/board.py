"""What the workers of a run tell each other: counters, flags and notes, in torchrun's own key-value store."""

import contextlib
import functools
import secrets
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from distill.errors import PeerError

if TYPE_CHECKING:  # importing torch takes seconds; usage errors should not
    from torch.distributed import Store


class Board:
    """Counters, flags and notes shared by all workers. Nothing here blocks but `wait` and `meet`, which poll.

    Raises PeerError where the store is gone, with the node that kept it.
    """

    def __init__(self, store: "Store") -> None:
        self._store = store

    def add(self, name: str, amount: int) -> int:
        """Add to the counter `name` and return its new value; ``add(name, 0)`` reads it."""
        with _reachable():
            return int(self._store.add(name, amount))

    def note(self, name: str, text: str) -> None:
        """Publish `text` under `name`; `wait` returns it to anyone."""
        with _reachable():
            self._store.set(name, text)

    def has(self, name: str) -> bool:
        """Whether somebody has published a note `name`."""
        with _reachable():
            return bool(self._store.check([name]))

    def wait(self, name: str, poll_seconds: float = 0.05) -> str:
        """The note `name`, as soon as somebody has published it; however long that takes."""
        while not self.has(name):
            time.sleep(poll_seconds)
        with _reachable():
            return str(self._store.get(name), "utf-8")

    def meet(self, name: str, count: int, poll_seconds: float = 0.05) -> None:
        """Wait until `count` workers have come here; however long that takes."""
        self.add(name, 1)
        while self.add(name, 0) < count:
            time.sleep(poll_seconds)


@contextlib.contextmanager
def _reachable() -> Iterator[None]:
    from torch.distributed import DistError

    try:
        yield
    except DistError as error:
        raise PeerError("the run has ended on the node of worker 0, whose console says why", []) from error


@functools.cache
def shared_store(rank: int, world_size: int) -> "Store":
    """torchrun's store, under a prefix that only the workers of this round of it know.

    torchrun starts all workers again, a new round, when one fails and when a node joins or leaves, and the store
    stays. No number tells rounds apart: each node counts the restarts that it caused. So worker 0 draws the prefix
    and hands it to every worker that asks with a name drawn just now; an earlier round's workers ask in vain.
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
