"""One worker's share of a replica: the whole model, a shard of every weight, or a stage of the layers.

B batch, T positions (padded), N rows, C candidates of a vocabulary shard, n temperatures.

`Teacher` is written once, as for the whole model. It asks its share to run a module, to bring together what the
vocabulary shards found and to tell each what to do, to agree with the other workers of the replica, and to wait for
them at the end.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from distill.teacher.capture import Candidates


class Share:
    """The whole model.

    captures: whether the teacher's output is captured on this worker
    first_id: the first id of this worker's shard of the vocabulary
    """

    captures = True
    first_id = 0

    def run(self, module: Any, ids: Tensor) -> Any:
        """The output of `module`, the model or its backbone, for ids [B, T] int64; None where another worker has it."""
        return module(input_ids=ids, use_cache=False)

    def collect(self, candidates: Candidates, k: int) -> list[Candidates]:  # noqa: ARG002
        """The candidates of every vocabulary shard, in order; none where another worker has them."""
        return [candidates]

    def gather(self, part: Tensor) -> list[Tensor]:
        """`part` of every vocabulary shard, in order; none where another worker has them."""
        return [part]

    def deal(self, parts: Sequence[Tensor], into: Tensor) -> Tensor:  # noqa: ARG002
        """Of the `parts` that the first worker has, this shard's; `into` has its shape and dtype."""
        return parts[0]

    def agree(self, good: bool) -> bool:
        """Whether all workers of the replica say that it is good."""
        return good

    def flush(self) -> None:
        """Wait until the other workers of the replica have received everything."""


class GroupShare(Share):
    """A share among the workers of the default process group."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device

    def agree(self, good: bool) -> bool:
        """Whether all workers of the replica say that it is good."""
        verdict = torch.tensor(int(good), device=self.device)
        dist.all_reduce(verdict, dist.ReduceOp.MIN)
        return bool(verdict.item())


class Shard(GroupShare):
    """A shard of every weight (tensor parallelism); the output head is split along the vocabulary."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        super().__init__(device)
        width = -(-vocab_size // self.size)
        starts = [min(rank * width, vocab_size) for rank in range(self.size + 1)]
        self._widths = [stop - start for start, stop in itertools.pairwise(starts)]
        self.first_id, self.captures = starts[self.rank], self.rank == 0

    def collect(self, candidates: Candidates, k: int) -> list[Candidates]:
        """Gathered on the replica's first worker. Each worker sends K candidates for a row, not its logits."""
        counts = [min(k, width) for width in self._widths]
        fill = (0, counts[0] - counts[self.rank])  # the last shards may be narrower than K
        numbers = self.gather(
            torch.cat([pad(candidates.values, fill), candidates.rest, candidates.following[:, None]], dim=1)
        )
        ids = self.gather(pad(candidates.ids, fill))
        return [
            Candidates(found[:, :count], its_ids[:, :count], found[:, counts[0] : -1], found[:, -1])
            for count, found, its_ids in zip(counts, numbers, ids, strict=False)
        ]

    def gather(self, part: Tensor) -> list[Tensor]:
        """`part` of every worker on the first worker, nothing elsewhere."""
        into = [torch.empty_like(part) for _ in range(self.size)] if self.captures else None
        dist.gather(part.contiguous(), into)
        return into or []

    def deal(self, parts: Sequence[Tensor], into: Tensor) -> Tensor:
        """To each worker its part, from the first worker; it is received in `into`."""
        dist.scatter(into, [part.contiguous() for part in parts] or None)
        return into
