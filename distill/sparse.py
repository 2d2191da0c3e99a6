"""The sparse target: what is kept of a next-token distribution, and how it is taken from logits.

N rows, V vocabulary, K kept ids, n temperatures.

For logits z [N, V] and temperature T: logsumexp_T = log sum_v exp(z_v / T). Kept are the K ids of largest z, their
log-probabilities at temperature 1, and per temperature logsumexp_T and the log of the mass outside the K ids.

The vocabulary may be cut in shards: `reduce` takes the candidates of each, `conclude` what is kept of all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numcodecs import BitRound
from numpy.typing import NDArray
from torch import Tensor

MANTISSA_BITS = 6
"""Bits kept of a float16's 10: a relative error of at most 2**-7 per log-probability."""


@dataclass(frozen=True)
class Captured:
    """What is kept of N distributions, on the device of the logits.

    topk_ids:         [N, K] int32, by descending logit, ties by lowest id
    topk_logprobs:    [N, K] float32, at temperature 1
    logsumexp:        [N, n] float32
    tail_logprob:     [N, n] float32; -inf where the K ids are the whole vocabulary
    target_logprob:   [N] float32, at temperature 1, of the ids that really follow (nan where none does)
    """

    topk_ids: Tensor
    topk_logprobs: Tensor
    logsumexp: Tensor
    tail_logprob: Tensor
    target_logprob: Tensor

    @classmethod
    def concatenate(cls, parts: Sequence["Captured"]) -> "Captured":
        """Rows of all parts, in order, on the CPU."""
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]).cpu() for f in fields(cls)))


@dataclass(frozen=True)
class Candidates:
    """What a shard of the vocabulary, of width W, contributes to N rows; C = min(K, W).

    values, ids:  [N, C] float32 and int64, its largest logits, by descending value, ties by lowest id
    rest:         [N, n] float32, per temperature log sum exp(z / T) of its other ids; -inf where there are none
    following:    [N] float32, the logit of the id that follows; -inf where it is another shard's, nan where none does
    """

    values: Tensor
    ids: Tensor
    rest: Tensor
    following: Tensor


@torch.inference_mode()
def capture(logits: Tensor, k: int, temperatures: Sequence[float], next_ids: Tensor) -> Captured:
    """Reduce logits ([N, V] float32, overwritten) to what is kept of them.

    next_ids: [N] int64, the ids that follow, -1 where none does.
    NaN or +inf among a row's logits make its logsumexp non-finite.
    """
    return conclude([reduce(logits, k, temperatures, next_ids)], k, temperatures)


@torch.inference_mode()
def reduce(logits: Tensor, k: int, temperatures: Sequence[float], next_ids: Tensor, first_id: int = 0) -> Candidates:
    """The candidates among logits ([N, W] float32, overwritten) of the ids from `first_id` on."""
    at = next_ids - first_id
    here = (at >= 0) & (at < logits.shape[1])
    following = logits.gather(1, torch.where(here, at, 0)[:, None])[:, 0]
    values, ids, largest_left = _topk(logits, k)
    logits.scatter_(1, ids, -torch.inf)  # now only the tail is left
    logits.sub_(largest_left[:, None])  # so that exp() below neither overflows nor loses the whole tail
    rest = []
    for i, temperature in enumerate(temperatures):
        scaled = logits.div_(temperature) if i == len(temperatures) - 1 else logits / temperature
        rest.append(scaled.exp_().sum(dim=1).log_() + largest_left / temperature)
    following = torch.where(here, following, -torch.inf).masked_fill_(next_ids < 0, torch.nan)
    return Candidates(values, ids + first_id, torch.stack(rest, dim=1), following)


@torch.inference_mode()
def conclude(shards: Sequence[Candidates], k: int, temperatures: Sequence[float]) -> Captured:
    """What is kept of N rows, given the candidates of every shard of the vocabulary, in the order of their ids."""
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
        topk_ids=ids.int(),
        topk_logprobs=values - at_one[:, None],
        logsumexp=torch.stack(lse_columns, dim=1),
        tail_logprob=torch.stack(tail_columns, dim=1),
        target_logprob=following - at_one,
    )


def round_logprobs(logprobs: NDArray[np.float32]) -> NDArray[np.float16]:
    """Round log-probabilities to float16 with 6 mantissa bits, to nearest even."""
    with np.errstate(over="ignore"):  # beyond float16's range: -inf
        halves = logprobs.astype(np.float16)
    rounded = np.asarray(BitRound(keepbits=MANTISSA_BITS).encode(halves)).view(np.float16).reshape(logprobs.shape)
    return np.where(np.isfinite(halves), rounded, halves)


def _topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest values and their ids, both [N, k], by descending value, ties by lowest id; the next largest, [N].

    torch.topk breaks ties as it likes, also as to which of equal logits belong to the k; rows with ties are sorted.
    The next largest is 0 where there is none, or where it is not finite.
    """
    values, ids = logits.topk(min(k + 1, logits.shape[1]), dim=1)
    tied = (values[:, :-1] == values[:, 1:]).any(dim=1)
    following = values[:, k] if k < values.shape[1] else values.new_zeros(len(values))
    values, ids = values[:, :k].contiguous(), ids[:, :k].contiguous()
    if tied.any():
        ordered, order = logits[tied].sort(dim=1, descending=True, stable=True)
        values[tied], ids[tied] = ordered[:, :k], order[:, :k]
    return values, ids, torch.where(following.isfinite(), following, 0.0)
