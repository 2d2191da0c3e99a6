"""Who am I among the workers, which blocks are mine, and how do we wait for each other.

`Grid` does all rank arithmetic and needs no process group, so that any number of workers can be tested in one
process. World = replicas x shard_size: a replica is one copy of the teacher on `shard_size` consecutive local ranks of
one node, so that its traffic never leaves the node. `Board` is torchrun's own key-value store: workers share a few
counters and flags through it. Replicas need no collective, so they may do different numbers of batches, and waiting
has no time-out; only the workers of one replica share a process group, whose waiting has one.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from distill.errors import ConfigError, PeerError, first_line

if TYPE_CHECKING:  # importing torch takes seconds; usage errors should not
    import torch
    from torch.distributed import Store

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Grid:
    """The place of this worker in the run.

    rank, world_size:              among all workers
    local_rank, local_world_size:  among the workers of this node
    node:                          of this worker's node
    attempt:                       how often torchrun has restarted the workers
    launched:                      whether torchrun started this process (else this is the only one)
    shard_size:                    workers that share one copy of the teacher
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node: int = 0
    attempt: int = 0
    launched: bool = False
    shard_size: int = 1

    @property
    def num_replicas(self) -> int:
        """Copies of the teacher."""
        return self.world_size // self.shard_size

    @property
    def replica(self) -> int:
        """Which copy of the teacher this worker belongs to."""
        return self.rank // self.shard_size

    @property
    def shard_rank(self) -> int:
        """The place of this worker in its replica."""
        return self.rank % self.shard_size

    @property
    def role(self) -> str:
        """What this worker is in its replica, in words; nothing where it is all of it."""
        if self.shard_size == 1:
            return ""
        return f"replica {self.replica} of {self.num_replicas}, shard rank {self.shard_rank} of {self.shard_size}"

    def sharded(self, shard_size: int) -> "Grid":
        """The same worker, with replicas of `shard_size` workers. Raises ConfigError where they do not fill a node."""
        if shard_size < 1 or self.local_world_size % shard_size:
            whole, rest = divmod(self.local_world_size, max(1, shard_size))
            raise ConfigError(
                f"parallel.shard_size: expected a divisor of the {self.local_world_size} workers of a node, found "
                f"{shard_size}: {whole} replicas x {shard_size} workers = {whole * shard_size}, {rest} left over"
            )
        if (self.rank - self.local_rank) % shard_size:
            raise ConfigError(
                f"parallel.shard_size={shard_size}: expected as many workers on every node, found "
                f"{self.local_world_size} on node {self.node} after {self.rank - self.local_rank} on the nodes before"
            )
        return replace(self, shard_size=shard_size)

    @classmethod
    def from_environment(cls) -> "Grid":
        """The grid that torchrun's variables describe; a single worker without torchrun."""
        if not _under_torchrun():
            return cls()
        return cls(
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            local_rank=int(os.environ["LOCAL_RANK"]),
            local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
            node=int(os.environ["GROUP_RANK"]),
            attempt=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            launched=True,
        )

    def deal(self, blocks: Sequence[int]) -> list[int]:
        """The share of this worker's replica among `blocks`: a DistributedSampler's, without its padding.

        A padded block would have two writers, and two writers in one shard lose rows.
        """
        from torch.utils.data import DistributedSampler

        class Unpadded(DistributedSampler[int]):
            def __iter__(self) -> Iterator[int]:
                positions = range(self.rank, self.total_size, self.num_replicas)
                return (i for position, i in zip(positions, super().__iter__(), strict=True) if position < len(blocks))

        sampler = Unpadded(range(len(blocks)), num_replicas=self.num_replicas, rank=self.replica, shuffle=False)  # type: ignore[arg-type]
        return [blocks[i] for i in sampler]

    def board(self) -> "Board":
        """The key-value store that all workers of this attempt share."""
        return Board(self._shared_store())

    @contextlib.contextmanager
    def process_group(self, device: "torch.device") -> Iterator[None]:
        """The process group of all workers, for training: NCCL between GPUs, gloo between CPUs."""
        import torch.distributed as dist

        store = dist.PrefixStore("group", self._shared_store())
        dist.init_process_group(_backend(device), store=store, rank=self.rank, world_size=self.world_size)
        try:
            yield
        finally:
            dist.destroy_process_group()

    @contextlib.contextmanager
    def replica_group(self, device: "torch.device", timeout_seconds: float) -> Iterator[None]:
        """The default process group, of the workers of this replica; none where there is one worker only.

        Raises PeerError where another worker of the replica has not answered for `timeout_seconds`. Where another
        worker has died, this one waits to be stopped: it is a victim, and its own error would hide the cause.
        """
        import torch.distributed as dist

        if self.shard_size == 1:
            yield
            return
        store = dist.PrefixStore(f"replica {self.replica}", self._shared_store())
        dist.init_process_group(
            _backend(device),
            store=store,
            rank=self.shard_rank,
            world_size=self.shard_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not any(
                word in str(error) for word in ("gloo", "NCCL", "Timed out waiting")
            ):
                raise
            logger.warning("lost the other workers of replica %d: %s", self.replica, first_line(error))
            silent = self._silent_peers(Board(store))
            raise PeerError(
                f"worker {', '.join(map(str, silent))} of replica {self.replica} has not answered for "
                f"{timeout_seconds:g} s (parallel.timeout_seconds)",
                silent,
            ) from error
        dist.destroy_process_group()  # not after an error: it may wait for operations that never end

    def _silent_peers(self, board: "Board") -> list[int]:
        """Ranks of this replica that have not lost the others within a grace period: those who are stuck.

        Only the first worker who lost them returns; the rest wait to be stopped, so that there is one report.
        """
        first = board.add("lost", 1) == 1
        board.note(f"{self.rank} lost the others", "")
        time.sleep(_GRACE_SECONDS)  # if a worker has died, torchrun stops this one meanwhile
        while not first:
            time.sleep(1)
        peers = range(self.replica * self.shard_size, (self.replica + 1) * self.shard_size)
        return [peer for peer in peers if not board.has(f"{peer} lost the others")]

    def _shared_store(self) -> "Store":
        from torch.distributed import HashStore, PrefixStore, Store
        from torch.distributed.rendezvous import rendezvous

        store: Store = next(rendezvous("env://"))[0] if self.launched else HashStore()
        return PrefixStore(f"distill/{self.attempt}", store)


def _backend(device: "torch.device") -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def wrap(module: "torch.nn.Module", mode: str, device: "torch.device") -> "torch.nn.Module":
    """`module`, moved to `device`, in DistributedDataParallel (ddp) or sharded layer by layer (fsdp, FSDP2)."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    if mode == "ddp":
        module = module.to(device)
        return DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for part in list(module.modules()):
        for layer in part if isinstance(part, torch.nn.ModuleList) else ():
            fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


@contextlib.contextmanager
def gradients_summed(module: Any, now: bool) -> Iterator[None]:
    """Whether the backward pass inside shares gradients among the workers, or only adds to this worker's."""
    if hasattr(module, "no_sync"):
        with contextlib.nullcontext() if now else module.no_sync():
            yield
    else:
        module.set_requires_gradient_sync(now)
        yield


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def refuse_other_launchers() -> None:
    """Raise ConfigError where another launcher started several of us: each would think to be the only one."""
    for name in () if _under_torchrun() else ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if os.environ.get(name, "1") != "1":
            raise ConfigError(f"expected torchrun to start several workers, found {name}={os.environ[name]} without it")


class Board:
    """Counters, flags and notes shared by all workers. Nothing here blocks but `wait` and `meet`, which poll."""

    def __init__(self, store: "Store") -> None:
        self._store = store

    def add(self, name: str, amount: int) -> int:
        """Add to the counter `name` and return its new value; ``add(name, 0)`` reads it."""
        return int(self._store.add(name, amount))

    def note(self, name: str, text: str) -> None:
        """Publish `text` under `name`; `wait` returns it to anyone."""
        self._store.set(name, text)

    def wait(self, name: str, poll_seconds: float = 0.05) -> str:
        """The note `name`, as soon as somebody has published it; however long that takes."""
        while not self.has(name):
            time.sleep(poll_seconds)
        return str(self._store.get(name), "utf-8")

    def has(self, name: str) -> bool:
        """Whether somebody has published a note `name`."""
        return bool(self._store.check([name]))

    def meet(self, name: str, count: int, poll_seconds: float = 0.05) -> None:
        """Wait until `count` workers have come here; however long that takes."""
        self.add(name, 1)
        while self.add(name, 0) < count:
            time.sleep(poll_seconds)
