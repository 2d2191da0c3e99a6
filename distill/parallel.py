"""Who am I among the workers, which blocks are mine, and how do we wait for each other.

`Grid` does all rank arithmetic and needs no process group, so that any number of workers can be tested in one
process. `Board` is torchrun's own key-value store: workers share a few counters and flags through it, and no
collective is ever needed in data parallelism, so workers may do different numbers of batches and waiting has
no time-out.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distill.errors import ConfigError

if TYPE_CHECKING:  # importing torch takes seconds; usage errors should not
    import torch
    from torch.distributed import Store


@dataclass(frozen=True)
class Grid:
    """The place of this worker in the run.

    rank, world_size:              among all workers
    local_rank, local_world_size:  among the workers of this node
    node:                          of this worker's node
    attempt:                       how often torchrun has restarted the workers
    launched:                      whether torchrun started this process (else this is the only one)
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node: int = 0
    attempt: int = 0
    launched: bool = False

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
        """The share of this worker among `blocks`: a DistributedSampler's, without its padding.

        A padded block would have two writers, and two writers in one shard lose rows.
        """
        from torch.utils.data import DistributedSampler

        class Unpadded(DistributedSampler[int]):
            def __iter__(self) -> Iterator[int]:
                positions = range(self.rank, self.total_size, self.num_replicas)
                return (i for position, i in zip(positions, super().__iter__(), strict=True) if position < len(blocks))

        sampler = Unpadded(range(len(blocks)), num_replicas=self.world_size, rank=self.rank, shuffle=False)  # type: ignore[arg-type]
        return [blocks[i] for i in sampler]

    def board(self) -> "Board":
        """The key-value store that all workers of this attempt share."""
        return Board(self._shared_store())

    @contextlib.contextmanager
    def process_group(self, device: "torch.device") -> Iterator[None]:
        """The process group of all workers, for training: NCCL between GPUs, gloo between CPUs."""
        import torch.distributed as dist

        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", self._shared_store()),
            rank=self.rank,
            world_size=self.world_size,
        )
        try:
            yield
        finally:
            dist.destroy_process_group()

    def _shared_store(self) -> "Store":
        from torch.distributed import HashStore, PrefixStore, Store
        from torch.distributed.rendezvous import rendezvous

        store: Store = next(rendezvous("env://"))[0] if self.launched else HashStore()
        return PrefixStore(f"distill/{self.attempt}", store)


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
    """Counters, flags and notes shared by all workers. Nothing here blocks except `wait`, which polls."""

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
        while not self._store.check([name]):
            time.sleep(poll_seconds)
        return str(self._store.get(name), "utf-8")
