"""The process group of a replica or of a training, and which of its workers is to blame when it breaks."""

import contextlib
import logging
import re
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from distill.errors import PeerError, first_line
from distill.run.board import Board, store_of
from distill.run.grid import Grid

if TYPE_CHECKING:  # importing torch takes seconds, and usage errors should not
    import torch

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 10.0  # how long a worker that lost another one waits to be stopped, before it says so itself


@contextlib.contextmanager
def process_group(grid: Grid, device: "torch.device", timeout_seconds: float) -> Iterator[None]:
    """The default process group, of the workers of this worker's replica: NCCL between GPUs, gloo between CPUs.

    Replicas have no group in common, so that they may do different numbers of batches. They meet on the `Board`.

    Raises PeerError where another worker is gone or silent. This one first waits to be stopped, lest its error hide the
    cause. A worker that hangs is the business of `Watch`, which can name it; the group's own time-out is longer.
    """
    import torch.distributed as dist

    # A connection of its own: while one waits inside the store, nothing else can use its connection.
    store = dist.PrefixStore(f"replica {grid.replica}", store_of(grid).clone())
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=grid.shard_rank,
            world_size=grid.shard_size,
            timeout=timedelta(seconds=timeout_seconds + 12 * _GRACE_SECONDS),
        )
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or re.search("gloo|NCCL|Timed out waiting", str(error))):
            raise
        logger.warning("lost the other workers: %s", first_line(error), extra={"console": False})
        if not (silent := _silent_peers(Board(store), grid)):
            raise
        what = "does not answer" if "imed out" in str(error) else "is gone"
        raise PeerError(f"worker {', '.join(map(str, silent))} {what}", silent) from error
    dist.destroy_process_group()  # not after an error: it may wait for operations that never end


def _silent_peers(board: Board, grid: Grid) -> list[int]:
    """The ranks of the replica that have not lost the others within the grace period: they are stuck, or dead.

    Only the first worker that lost the others returns. The rest wait to be stopped, so that there is one report.
    """
    is_first = board.add("lost", 1) == 1
    board.note(f"{grid.rank} lost the others", "")
    time.sleep(_GRACE_SECONDS)  # if a worker of this node has died, torchrun stops this one meanwhile
    while not is_first:
        time.sleep(1)
        board.has("lost")  # raises PeerError when the run ends
    first_rank = grid.rank - grid.shard_rank
    peers = range(first_rank, first_rank + grid.shard_size)
    return [peer for peer in peers if not board.has(f"{peer} lost the others")]
