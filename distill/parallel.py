"""Who am I among the workers, which blocks are mine, and how do we wait for each other.

`Grid` does all rank arithmetic and needs no process group, so that any number of workers can be tested in one
process. World = replicas x shard_size: a replica is one copy of the teacher on `shard_size` consecutive local ranks of
one node, so that its traffic never leaves the node. Replicas need no collective, so they may do different numbers of
batches: they meet on the `Board`, where waiting has no time-out. Only the workers of one replica, and those of a
training, share a process group, whose waiting has one.
"""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from distill.board import Board, shared_store
from distill.errors import ConfigError, PeerError, first_line

if TYPE_CHECKING:  # importing torch takes seconds; usage errors should not
    import torch

logger = logging.getLogger(__name__)

GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Grid:
    """The place of this worker in the run.

    rank, world_size:              among all workers
    local_rank, local_world_size:  among the workers of this node
    node, num_nodes:               among all nodes, of this worker's node
    launched:                      whether torchrun started this process (else this is the only one)
    shard_size:                    workers that share one copy of the teacher
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node: int = 0
    num_nodes: int = 1
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

    @property
    def log_name(self) -> str:
        """The name of this worker's log: by rank, and by host where there are several nodes."""
        return f"worker_{self.rank}{f'.{socket.gethostname()}' if self.num_nodes > 1 else ''}.log"

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
            num_nodes=int(os.environ["GROUP_WORLD_SIZE"]),
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

    def board(self) -> Board:
        """What all workers of this run share."""
        from torch.distributed import HashStore

        return Board(shared_store(self.rank, self.world_size) if self.launched else HashStore())

    @contextlib.contextmanager
    def process_group(self, device: "torch.device", timeout_seconds: float) -> Iterator[None]:
        """The default process group, of all workers. Raises as `replica_group` does."""
        with self._group("all", range(self.world_size), device, timeout_seconds):
            yield

    @contextlib.contextmanager
    def replica_group(self, device: "torch.device", timeout_seconds: float) -> Iterator[None]:
        """The default process group, of the workers of this replica; none where there is one worker only.

        Raises PeerError where another worker has not answered for `timeout_seconds`. Where another has died, this one
        waits to be stopped: it is a victim, and its own error would hide the cause.
        """
        first = self.replica * self.shard_size
        group = self._group(f"replica {self.replica}", range(first, first + self.shard_size), device, timeout_seconds)
        with group if self.shard_size > 1 else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def _group(self, name: str, ranks: range, device: "torch.device", timeout_seconds: float) -> Iterator[None]:
        """A process group of these ranks: NCCL between GPUs, gloo between CPUs."""
        import torch.distributed as dist

        on_gpu = device.type == "cuda"
        # A connection of its own: waiting inside the store would keep the board from the watch.
        shared: Any = shared_store(self.rank, self.world_size) if self.launched else dist.HashStore()
        store = dist.PrefixStore(name, shared.clone())
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                store=store,
                rank=ranks.index(self.rank),
                world_size=len(ranks),
                # NCCL ends a process without saying who hangs, so that the watch is to be first.
                timeout=timedelta(seconds=timeout_seconds + (12 * GRACE_SECONDS if on_gpu else 0)),
            )
            yield
        except RuntimeError as error:
            text = str(error)
            if not isinstance(error, dist.DistError) and not any(
                word in text for word in ("gloo", "NCCL", "Timed out waiting")
            ):
                raise
            logger.warning("lost the other workers: %s", first_line(error), extra={"console": False})
            silent = self._silent_peers(Board(store), ranks)
            if not silent:
                raise
            what = f"has not answered for {timeout_seconds:g} s (timeout_seconds)" if "imed out" in text else "is gone"
            raise PeerError(f"worker {', '.join(map(str, silent))} {what}", silent) from error
        dist.destroy_process_group()  # not after an error: it may wait for operations that never end

    def _silent_peers(self, board: Board, ranks: range) -> list[int]:
        """Those of the ranks that have not lost the others within a grace period: those who are stuck, or dead.

        Only the first worker who lost them returns; the rest wait to be stopped, so that there is one report.
        """
        first = board.add("lost", 1) == 1
        board.note(f"{self.rank} lost the others", "")
        time.sleep(GRACE_SECONDS)  # if a worker of this node has died, torchrun stops this one meanwhile
        while not first:
            time.sleep(1)
            board.has("lost")  # until the run ends
        return [peer for peer in ranks if not board.has(f"{peer} lost the others")]


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
