"""The place of a worker among all workers, as arithmetic: which replica it belongs to, and which blocks are its share.

World = replicas x shard_size. A replica is one copy of the teacher on `shard_size` consecutive workers of one node, so
that its traffic never leaves the node. `Grid` needs no process group: any number of workers is tested in one process.
"""

import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from distill.errors import ConfigError


@dataclass(frozen=True)
class Grid:
    """The place of one worker in the run.

    rank, world_size:              its number among all workers, and how many there are
    local_rank, local_world_size:  the same among the workers of its node
    node, num_nodes:               the number of its node among all nodes, and how many there are
    launched:                      whether torchrun started this process; otherwise it is the only worker
    shard_size:                    workers of one replica
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
        """How many replicas there are."""
        return self.world_size // self.shard_size

    @property
    def replica(self) -> int:
        """The replica that this worker belongs to."""
        return self.rank // self.shard_size

    @property
    def shard_rank(self) -> int:
        """The number of this worker in its replica."""
        return self.rank % self.shard_size

    @property
    def role(self) -> str:
        """This worker's replica and its number there, in words; empty where a replica is one worker."""
        if self.shard_size == 1:
            return ""
        return f"replica {self.replica} of {self.num_replicas}, shard rank {self.shard_rank} of {self.shard_size}"

    @property
    def log_name(self) -> str:
        """The file name of this worker's log: its rank, and its host where there are several nodes."""
        return f"worker_{self.rank}{f'.{socket.gethostname()}' if self.num_nodes > 1 else ''}.log"

    def sharded(self, shard_size: int) -> "Grid":
        """The same worker, with replicas of `shard_size` workers.

        Raises ConfigError where such replicas do not fill each node exactly.
        """
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
        """The grid that torchrun's environment variables describe; a single worker without torchrun."""
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
        """The blocks of this worker's replica, as a DistributedSampler deals them, but without its padding.

        The sampler pads with items that others have too. Such a block would have two writers, who would lose rows.
        """
        from torch.utils.data import DistributedSampler

        class Unpadded(DistributedSampler[int]):
            def __iter__(self) -> Iterator[int]:
                positions = range(self.rank, self.total_size, self.num_replicas)
                return (i for position, i in zip(positions, super().__iter__(), strict=True) if position < len(blocks))

        sampler = Unpadded(range(len(blocks)), num_replicas=self.num_replicas, rank=self.replica, shuffle=False)  # type: ignore[arg-type]
        return [blocks[i] for i in sampler]


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def refuse_other_launchers() -> None:
    """Raise ConfigError where another launcher started several workers: each would believe to be the only one."""
    for name in () if _under_torchrun() else ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if os.environ.get(name, "1") != "1":
            raise ConfigError(f"expected torchrun to start several workers, found {name}={os.environ[name]} without it")
