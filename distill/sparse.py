"""The sparse target: what is kept of a next-token distribution, and how it is taken from logits.

N rows, V vocabulary, K kept ids, n temperatures.

For logits z [N, V] and temperature T: logsumexp_T = log sum_v exp(z_v / T). Kept are the K ids of largest z, their
log-probabilities at temperature 1, and per temperature logsumexp_T and the log of the mass outside the K ids.
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


@torch.inference_mode()
def capture(logits: Tensor, k: int, temperatures: Sequence[float], next_ids: Tensor) -> Captured:
    """Reduce logits ([N, V] float32, overwritten) to what is kept of them.

    next_ids: [N] int64, the ids that follow, -1 where none does.
    NaN or +inf among a row's logits make its logsumexp non-finite.
    """
    following = logits.gather(1, next_ids.clamp(min=0)[:, None])[:, 0]
    values, ids, largest_left = _topk(logits, k)
    logits.scatter_(1, ids, -torch.inf)  # now only the tail is left
    logits.sub_(largest_left[:, None])  # so that exp() below neither overflows nor loses the whole tail
    lse_columns, tail_columns = [], []
    for i, temperature in enumerate(temperatures):
        last = i == len(temperatures) - 1
        scaled = logits.div_(temperature) if last else logits / temperature
        tail = scaled.exp_().sum(dim=1).log_() + largest_left / temperature
        lse = torch.logaddexp(torch.logsumexp(values / temperature, dim=1), tail)
        lse_columns.append(lse)
        tail_columns.append(tail - lse)
    at_one = lse_columns[list(temperatures).index(1.0)]
    return Captured(
        topk_ids=ids.int(),
        topk_logprobs=values - at_one[:, None],
        logsumexp=torch.stack(lse_columns, dim=1),
        tail_logprob=torch.stack(tail_columns, dim=1),
        target_logprob=torch.where(next_ids >= 0, following - at_one, torch.nan),
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
