"""What is kept of a next-token distribution, and how the most probable ids are taken from logits; `sample` draws.

N rows, V vocabulary, K kept ids, n temperatures.

For logits z [N, V] and temperature T: logsumexp_T = log sum_v exp(z_v / T). Kept are the K ids with the largest z and
their log-probabilities at temperature 1; for each temperature, logsumexp_T and the log of the mass outside the K ids.

The vocabulary may be split in shards: `reduce` finds the candidates in each, `conclude` what is kept of all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numcodecs import BitRound
from numpy.typing import NDArray
from torch import Tensor

MANTISSA_BITS = 6
"""Of a float16's 10. The relative error of a log-probability is at most 2**-7 + 2**-11."""


@dataclass(frozen=True)
class Captured:
    """What is kept of N distributions, on the device of the logits.

    target_ids:       [N, K] int32, by descending logit, ties by lowest id; of a sample, as `sample` says
    target_logprobs:  [N, K] float32, at temperature 1; nan where an id was drawn, or there is none
    logsumexp:        [N, n] float32
    tail_logprob:     [N, n] float32, of all ids without a target_logprob; -inf where there are none
    next_logprob:     [N] float32, at temperature 1, of the id that really follows; nan where none does
    """

    target_ids: Tensor
    target_logprobs: Tensor
    logsumexp: Tensor
    tail_logprob: Tensor
    next_logprob: Tensor

    @classmethod
    def concatenate(cls, parts: Sequence["Captured"]) -> "Captured":
        """The rows of all parts, in order, on the CPU."""
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]).cpu() for f in fields(cls)))


@dataclass(frozen=True)
class Candidates:
    """What a shard of the vocabulary, of width W, contributes to N rows; C = min(K, W).

    values, ids:  [N, C] float32 and int64, its largest logits, by descending value, ties by lowest id
    rest:         [N, n] float32, for each temperature log sum exp(z / T) of its other ids; -inf where there are none
    following:    [N] float32, the logit of the id that follows: -inf if that is in another shard, nan if none does
    """

    values: Tensor
    ids: Tensor
    rest: Tensor
    following: Tensor


@torch.inference_mode()
def reduce(logits: Tensor, k: int, temperatures: Sequence[float], next_ids: Tensor, first_id: int = 0) -> Candidates:
    """The candidates among logits ([N, W] float32, overwritten) of the ids from `first_id` on."""
    values, ids, largest_left = largest(logits, k)
    following = logit_of(logits, next_ids - first_id, next_ids < 0)
    logits.scatter_(1, ids, -torch.inf)  # now only the tail is left
    logits.sub_(largest_left[:, None])  # so that exp() below neither overflows nor loses the whole tail
    rest = []
    for i, temperature in enumerate(temperatures):
        scaled = logits.div_(temperature) if i == len(temperatures) - 1 else logits / temperature
        rest.append(scaled.exp_().sum(dim=1).log_() + largest_left / temperature)
    return Candidates(values, ids + first_id, torch.stack(rest, dim=1), following)


@torch.inference_mode()
def conclude(shards: Sequence[Candidates], k: int, temperatures: Sequence[float]) -> Captured:
    """What is kept of N rows, from the candidates of all shards of the vocabulary, in the order of their ids."""
    first = shards[0]
    values, ids, rest, following = first.values, first.ids, first.rest, first.following
    rejected = values[:, k:]
    if len(shards) > 1:
        values, order = torch.cat([shard.values for shard in shards], dim=1).sort(dim=1, descending=True, stable=True)
        ids = torch.cat([shard.ids for shard in shards], dim=1).gather(1, order)[:, :k]
        values, rejected = values[:, :k], values[:, k:]
        rest = torch.logsumexp(torch.stack([shard.rest for shard in shards]), dim=0)
        following = torch.stack([shard.following for shard in shards]).amax(dim=0)
    lse_columns, tail_columns = [], []
    for i, temperature in enumerate(temperatures):
        tail = rest[:, i]
        if rejected.shape[1]:
            tail = torch.logaddexp(tail, torch.logsumexp(rejected / temperature, dim=1))
        lse = torch.logaddexp(torch.logsumexp(values / temperature, dim=1), tail)
        lse_columns.append(lse)
        tail_columns.append(tail - lse)
    at_one = lse_columns[list(temperatures).index(1.0)]
    return Captured(
        target_ids=ids.int(),
        target_logprobs=values - at_one[:, None],
        logsumexp=torch.stack(lse_columns, dim=1),
        tail_logprob=torch.stack(tail_columns, dim=1),
        next_logprob=following - at_one,
    )


def round_logprobs(logprobs: NDArray[np.float32]) -> NDArray[np.float16]:
    """Round log-probabilities to float16 with 6 mantissa bits, to nearest even."""
    with np.errstate(over="ignore"):  # beyond float16's range: -inf
        halves = logprobs.astype(np.float16)
    rounded = np.asarray(BitRound(keepbits=MANTISSA_BITS).encode(halves)).view(np.float16).reshape(logprobs.shape)
    return np.where(np.isfinite(halves), rounded, halves)


def as_float16(logprobs: NDArray[np.float32]) -> NDArray[np.float16]:
    """The nearest float16, without further rounding. What rounding of float32 has put above 0 is 0."""
    with np.errstate(over="ignore"):  # beyond float16's range: -inf
        return np.minimum(logprobs, 0).astype(np.float16)


def logit_of(logits: Tensor, ids: Tensor, none: Tensor) -> Tensor:
    """[N]: of logits [N, W] those of `ids` [N]; -inf where the id is not among them, nan where there is `none`."""
    here = (ids >= 0) & (ids < logits.shape[1])
    found = logits.gather(1, torch.where(here, ids, 0)[:, None])[:, 0]
    return torch.where(here, found, -torch.inf).masked_fill_(none, torch.nan)


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest values and their ids, both [N, k], by descending value, ties by lowest id; and the next value, [N].

    torch.topk orders equal logits as it likes, and chooses among them as it likes. So rows with ties are sorted.
    The next value is 0 where there is none, or where it is not finite.
    """
    values, ids = logits.topk(min(k + 1, logits.shape[1]), dim=1)
    tied = (values[:, :-1] == values[:, 1:]).any(dim=1)
    following = values[:, k] if k < values.shape[1] else values.new_zeros(len(values))
    values, ids = values[:, :k].contiguous(), ids[:, :k].contiguous()
    if tied.any():
        ordered, order = logits[tied].sort(dim=1, descending=True, stable=True)
        values[tied], ids[tied] = ordered[:, :k], order[:, :k]
    return values, ids, torch.where(following.isfinite(), following, 0.0)
