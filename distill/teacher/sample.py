"""Variance-optimal (VarOpt) sampling of next-token distributions: at most K ids a row, unbiased.

N rows, V vocabulary, W width of a shard of it, K ids at most, C = min(K, W), h ids kept and d drawn, n = h + d.

A row has n = ceil(sum_v min(1, K p_v)) ids: a confident one few, an open one K. Those with p above a threshold t are
kept with p as their weight; each other one is drawn with probability p / t, and then weighs t = (mass of all that are
not kept) / d. So the expected weight of every id is its p, the weights of a row sum to 1, and no sampling of n ids has
a smaller summed variance (Cohen, Duffield, Kaplan, Lund, Thorup, Stream Sampling for Variance-Optimal Estimation of
Subset Sums, SODA 2009). The most probable id is always kept.

Draws are systematic: the ids that are not kept lie side by side on a line, each as long as its p, and every t there is
a point; one number u of the row says where the first is. No id is as long as t, so that none is drawn twice.

The vocabulary may be split in shards: of each, `_begin` finds the candidates, `_decide` says what to draw in each, and
`_draw` does. K numbers of a row travel, never V.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.teacher.capture import Candidates, Captured, largest, logit_of
from distill.teacher.share import Share

_WIDTH = 64  # ids of a bin: points are looked for among the sums of bins, then inside the bins that they hit
_POINTS_AT_A_TIME = 1 << 16
_NOTHING = 1e-6  # of an id: so little mass gets no draw
_MARGIN = 1e-4  # an id that is so close to t is kept: rounding must not draw it twice
_BELOW_ONE = 1 - 1e-12


def uniforms(seed: int, first_row: int, num_rows: int) -> NDArray[np.float64]:
    """The number u in [0, 1) of rows of a store: of row r it is number r of PCG64([seed, 1]), whoever asks."""
    return np.random.Generator(np.random.PCG64([seed, 1]).advance(first_row)).random(num_rows)


def sample(logits: Tensor, k: int, next_ids: Tensor, u: Tensor, share: Share) -> Captured | None:
    """What is kept of logits, at most k ids of a row (k at least 2), as in `method.capture`.

    target_ids [N, K] are the ids that are kept, by descending p (ties by lowest id), those drawn, by ascending id, then
    -1. target_logprobs are those of the kept, nan beyond. tail_logprob [N, 1] is the log of the mass that was sampled.
    """
    powers, candidates = _begin(logits, k, next_ids, share.first_id)
    shards = share.collect(candidates, k)
    plan = _decide(shards, k, u) if shards else None
    orders = share.deal(plan.orders if plan else [], torch.empty(len(logits), 4, dtype=torch.float64, device=u.device))
    drawn = _draw(powers, candidates.ids - share.first_id, orders, k)
    parts = share.gather(torch.where(drawn < 0, -1, drawn + share.first_id))
    return plan.captured(parts) if plan else None


@dataclass(frozen=True)
class _Powers:
    """exp(logit - the largest of the row) of a shard. others: [N, W], 0 at the candidates; candidates: [N, C].

    bins: [N, bins] float64, the sums of others over _WIDTH ids each
    """

    others: Tensor
    candidates: Tensor
    bins: Tensor


def _begin(logits: Tensor, k: int, next_ids: Tensor, first_id: int) -> tuple[_Powers, Candidates]:
    """What a shard contributes: as `capture.reduce`, at temperature 1, and what `_draw` needs."""
    values, at, _ = largest(logits, k)
    following = logit_of(logits, next_ids - first_id, next_ids < 0)
    top = torch.where(values[:, :1] == -torch.inf, 0.0, values[:, :1])  # of a shard where no id is possible
    powers = logits.sub_(top).exp_()
    kept = powers.gather(1, at)
    powers.scatter_(1, at, 0.0)
    whole = powers.shape[1] // _WIDTH * _WIDTH
    bins = powers[:, :whole].reshape(len(powers), -1, _WIDTH).sum(dim=2)
    if whole < powers.shape[1]:
        bins = torch.cat([bins, powers[:, whole:].sum(dim=1, keepdim=True)], dim=1)
    bins = bins.double()
    rest = (bins.sum(dim=1, keepdim=True).log() + top).float()
    return _Powers(powers, kept, bins), Candidates(values, at + first_id, rest, following)


@dataclass(frozen=True)
class _Plan:
    """What the first worker decides for N rows.

    kept:   [N, K] ids by descending logit; the first h of a row are kept. logprobs: [N, K] of these
    counts: [N, 2] h and d
    orders: for each shard [N, 4] float64: how many of its candidates are kept, how many points it has, the first one's
            place on its part of the line, as a share of that, and the distance to the next one
    """

    kept: Tensor
    logprobs: Tensor
    counts: Tensor
    orders: list[Tensor]
    logsumexp: Tensor
    tail_logprob: Tensor
    next_logprob: Tensor

    def captured(self, drawn: Sequence[Tensor]) -> Captured:
        """With the ids drawn in each shard, [N, K - 1], -1 beyond a row's."""
        k = self.kept.shape[1]
        place = torch.arange(k, device=self.kept.device)
        num_kept, num_drawn = self.counts[:, :1], self.counts[:, 1:]
        found = drawn[0]
        if len(drawn) > 1:  # they ascend from shard to shard; close the gaps
            found = torch.cat(list(drawn), dim=1)
            found = found.gather(1, (found < 0).sort(dim=1, stable=True).indices[:, : k - 1])
        shifted = found.gather(1, (place - num_kept).clamp(min=0, max=k - 2))
        ids = torch.where(place < num_kept + num_drawn, shifted, -1)
        return Captured(
            target_ids=torch.where(place < num_kept, self.kept, ids).int(),
            target_logprobs=torch.where(place < num_kept, self.logprobs, torch.nan),
            logsumexp=self.logsumexp,
            tail_logprob=self.tail_logprob,
            next_logprob=self.next_logprob,
        )


def _decide(shards: Sequence[Candidates], k: int, u: Tensor) -> _Plan:
    """How many ids each of N rows keeps and draws, and in which shard."""
    values, order = torch.cat([shard.values for shard in shards], dim=1).sort(dim=1, descending=True, stable=True)
    ids = torch.cat([shard.ids for shard in shards], dim=1).gather(1, order)[:, :k]
    widths = torch.tensor([shard.values.shape[1] for shard in shards], device=u.device)
    origin = torch.arange(len(shards), device=u.device).repeat_interleave(widths)[order[:, :k]]  # [N, K] shard numbers
    # Masses as shares of the largest logit's power, in float64: sums from the smallest on, nothing is subtracted.
    top = values[:, :1].double()
    powers = (values.double() - top).exp()
    rests = (torch.cat([shard.rest for shard in shards], dim=1).double() - top).exp()  # [N, shards]
    outside = rests.sum(dim=1, keepdim=True) + powers[:, k:].sum(dim=1, keepdim=True)
    powers = powers[:, :k]
    left = torch.cat([powers, outside], dim=1).flip(1).cumsum(dim=1).flip(1)  # [N, K + 1]: of all but the first i
    total, place = left[:, :1], torch.arange(k, device=u.device)
    num_large = (powers * k > total).sum(dim=1, keepdim=True)
    open_ids = k * left.gather(1, num_large) / total  # of those below 1 / k
    n = (num_large + open_ids - _NOTHING).ceil().clamp(1, k).nan_to_num(1).long()
    reaches = (powers * (n - place) > left[:, :k] * (1 - _MARGIN)) & (place < n - 1)  # one slot is for the rest
    num_kept = torch.where(place == 0, True, reaches).long().cumprod(dim=1).sum(dim=1, keepdim=True)
    num_drawn = n - num_kept
    is_kept = place < num_kept
    mass = left.gather(1, num_kept)  # of what is not kept
    kept_in = [(is_kept & (origin == i)).sum(dim=1, keepdim=True) for i in range(len(shards))]
    masses = torch.cat(
        [
            rests[:, [i]] + ((shard.values.double() - top).exp() * _from(shard.values, kept_in[i])).sum(1, keepdim=True)
            for i, shard in enumerate(shards)
        ],
        dim=1,
    )  # [N, shards], of what is not kept
    logsumexp = total.log() + top
    return _Plan(
        kept=ids,
        logprobs=(values[:, :k].double() - logsumexp).float(),
        counts=torch.cat([num_kept, num_drawn], dim=1),
        orders=_orders(masses, kept_in, num_drawn, u[:, None]),
        logsumexp=logsumexp.float(),
        tail_logprob=(mass / total).log().float(),
        next_logprob=torch.stack([shard.following for shard in shards]).amax(dim=0) - logsumexp[:, 0].float(),
    )


def _from(values: Tensor, first: Tensor) -> Tensor:
    """[N, C]: whether a place is `first` [N, 1] or later."""
    return torch.arange(values.shape[1], device=values.device) >= first


def _orders(masses: Tensor, kept_in: Sequence[Tensor], num_drawn: Tensor, u: Tensor) -> list[Tensor]:
    """Which points of the line are in which shard, as `_Plan.orders`."""
    ends = masses.cumsum(dim=1)
    between = ends[:, -1:] / num_drawn.clamp(min=1)  # t
    found, began, start = [], torch.zeros_like(num_drawn), torch.zeros_like(u)
    for i, kept in enumerate(kept_in):
        end = ends[:, [i]]
        until = num_drawn
        if i < len(kept_in) - 1:
            until = (end / between - u).ceil().nan_to_num(0).long().clamp(min=0).minimum(num_drawn)
            until = torch.where(end == ends[:, -1:], num_drawn, until)  # nothing is left for later shards
        width = masses[:, [i]]
        first = ((u + began) * between - start) / width
        found.append(torch.cat([kept.double(), (until - began).double(), first, between / width], dim=1))
        began, start = until, end
    return found


def _draw(powers: _Powers, ids: Tensor, orders: Tensor, k: int) -> Tensor:
    """The ids, counted from the shard's first, of its points: [N, K - 1] int64, ascending, then -1."""
    num_kept, num_points, first, step = orders.unbind(dim=1)
    back = powers.candidates * _from(powers.candidates, num_kept[:, None])
    others, bins = powers.others.scatter_(1, ids, back), powers.bins
    bins.scatter_add_(1, ids // _WIDTH, back.double())
    place = torch.arange(k - 1, device=bins.device)
    ends = bins.cumsum(dim=1)
    at = (first[:, None] + place * step[:, None]).clamp(min=0) * ends[:, -1:]
    at = at.minimum(ends[:, -1:] * _BELOW_ONE)
    hit = torch.searchsorted(ends, at, right=True).clamp(max=bins.shape[1] - 1)
    drawn = torch.full_like(hit, -1)
    for some in torch.split((place < num_points[:, None]).nonzero(), _POINTS_AT_A_TIME):
        row, point = some.unbind(dim=1)
        bin_of = hit[row, point]
        inner = bin_of[:, None] * _WIDTH + torch.arange(_WIDTH, device=bins.device)
        lengths = others[row[:, None], inner.clamp(max=others.shape[1] - 1)].double()
        inside = lengths.masked_fill_(inner >= others.shape[1], 0.0).cumsum(dim=1)
        rest = (at[row, point] - (ends[row, bin_of] - bins[row, bin_of])).clamp(min=0)
        rest = rest.minimum(inside[:, -1] * _BELOW_ONE)
        drawn[row, point] = bin_of * _WIDTH + (inside <= rest[:, None]).sum(dim=1).clamp(max=_WIDTH - 1)
    return drawn
