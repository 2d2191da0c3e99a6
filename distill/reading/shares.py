"""Exact shares of several stores: how many samples an epoch has of each, which ones, and how they take turns.

Everything follows from a few numbers, so that all readers of all ranks agree, and any place is found without replay.

Of the n_i samples that an epoch has of store i, number m comes at the time (m + phase_i) / n_i, where the phases of the
stores are spread over (0, 1). So all stores begin and end together, and among any samples that follow each other each
store has its share, to within one or two samples.
"""

import heapq
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import islice

import numpy as np
from numpy.typing import NDArray


def apportioned(total: int, shares: Sequence[Fraction]) -> list[int]:
    """`total` in whole numbers by `shares`, which sum to 1: the largest remainders are rounded up."""
    exact = [total * share for share in shares]
    found = [int(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: found[i] - exact[i])
    for i in by_remainder[: total - sum(found)]:
        found[i] += 1
    return found


def samples_per_epoch(sizes: Sequence[int], shares: Sequence[Fraction] | None) -> list[int]:
    """How many samples an epoch has of stores of these sizes: as many as there can be, none twice. None: all of all."""
    if shares is None:
        return list(sizes)
    return apportioned(min(int(size / share) for size, share in zip(sizes, shares, strict=True)), shares)


def of_epoch(pieces: NDArray[np.int64], count: int, epoch: int, seed: Sequence[int]) -> NDArray[np.int64]:
    """[P, 2]: the samples of an epoch, as ranges within `pieces`, in their order.

    pieces: [P, 2], ranges of samples. count: the samples that each epoch has of them.

    The pieces are a circle, in the order that `seed` gives. Each epoch takes the next `count` samples on it: so none
    comes again before all have come, nor twice in one epoch.
    """
    total = int((pieces[:, 1] - pieces[:, 0]).sum())
    if count == total:
        return pieces
    circle = pieces[np.random.default_rng(seed).permutation(len(pieces))]
    begin = epoch * count % total
    found = np.concatenate([within(circle, begin, begin + count), within(circle, 0, begin + count - total)])
    return found[np.argsort(found[:, 0])]


def within(spans: NDArray[np.int64], begin: int, end: int) -> NDArray[np.int64]:
    """[P, 2]: the samples [begin, end) among those of `spans`, as ranges within the spans."""
    counts = spans[:, 1] - spans[:, 0]
    ends = np.cumsum(counts)
    left = np.clip(begin - (ends - counts), 0, counts)  # samples of a span that are before `begin`, and from `end` on
    right = np.clip(ends - end, 0, counts)
    some = left + right < counts
    return np.stack([spans[some, 0] + left[some], spans[some, 1] - right[some]], axis=1)


def first_turns(counts: Sequence[int], turns: int) -> list[int]:
    """How many samples each store has among the first `turns` of an epoch that has `counts` of them."""
    found = _before(counts, max(0, turns - len(counts)) / max(1, sum(counts)))
    for store in islice(_onward(counts, found), turns - sum(found)):
        found[store] += 1
    return found


def take_turns(counts: Sequence[int], first: int) -> Iterator[int]:
    """Which store each sample of an epoch is of, from turn `first` on."""
    return _onward(counts, first_turns(counts, first))


def _time(number: int, store: int, counts: Sequence[int]) -> float:
    """When a sample comes, with phases of 1/2S, 3/2S, ... of S stores: those of one size do not come together."""
    return (2 * (len(counts) * number + store) + 1) / (2 * len(counts) * counts[store])


def _before(counts: Sequence[int], time: float) -> list[int]:
    """The samples of each store before a time: about count * time, whatever the rounding of times."""
    found = [min(count, round(count * time)) for count in counts]
    for i, count in enumerate(counts):
        while found[i] < count and _time(found[i], i, counts) < time:
            found[i] += 1
        while found[i] > 0 and _time(found[i] - 1, i, counts) >= time:
            found[i] -= 1
    return found


def _onward(counts: Sequence[int], done: Sequence[int]) -> Iterator[int]:
    """Which store each sample is of, where so many of each are `done`; of several at one time the first store's."""
    number = list(done)
    coming = [(_time(number[i], i, counts), i) for i, count in enumerate(counts) if number[i] < count]
    heapq.heapify(coming)
    while coming:
        store = coming[0][1]
        yield store
        number[store] += 1
        if number[store] < counts[store]:
            heapq.heapreplace(coming, (_time(number[store], store, counts), store))
        else:
            heapq.heappop(coming)
