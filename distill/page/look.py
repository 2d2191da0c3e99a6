"""What a report reads of a store: some samples at even distances, whole, and the figures over their rows.

A store of any size is looked at in the same time: at most 256 samples are read, and the table of all lengths.

N rows looked at, K kept ids, T tokens of a sample, P bins of positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from distill.reading.cache import TeacherCache
from distill.reading.samples import Sample
from distill.teacher.choice import least_entropy

MOST_SAMPLES = 256
MOST_SHOWN = 400
"""Tokens of a sample that are shown."""

_OF_A_KIND = 3
_BINS = 24


@dataclass
class Look:
    """Figures of a store, and the samples to show.

    lengths:   tokens of every sample of the store
    mass:      [K], the mean probability of the k most probable ids, where it is known
    entropy:   [N] nats, the least that it may be; of the rows that have ids and a tail, as mass
    positions: [P, 4]: first position, tokens learned from, the mean of the teacher's -log p, its standard error
    shown:     by kind (typical, most surprising, random): samples, each once
    """

    num_samples: int
    num_tokens: int
    lengths: NDArray[np.int64]
    mass: NDArray[np.float64]
    entropy: NDArray[np.float64]
    positions: NDArray[np.float64]
    shown: dict[str, list[Sample]] = field(default_factory=dict)


def look(cache: TeacherCache, seed: int = 0) -> Look:
    """Read what a report shows. Raises StoreError where the store is damaged.

    seed: of the samples that are shown as random ones
    """
    chosen = np.unique(np.linspace(0, len(cache) - 1, min(len(cache), MOST_SAMPLES)).astype(np.int64))
    mass = np.zeros(int(cache.attributes["k"]))
    entropies: list[NDArray[np.float64]] = []
    surprises: list[tuple[NDArray[np.int64], NDArray[np.float64]]] = []
    means = np.full(len(chosen), np.nan)
    column, num_tokens = cache.temperatures.index(1.0), 0
    for i, number in enumerate(chosen):
        sample = cache[int(number)]
        if "tail_logprob" in sample:  # else the store does not say what there is beside the kept ids
            ids, tail = sample["target_ids"].numpy(), sample["tail_logprob"][:, column].numpy()
            said = (ids[:, 0] >= 0) & ~np.isnan(tail)  # what others captured has rows without ids
            logprobs = sample["target_logprobs"].numpy()[said]
            mass += np.nan_to_num(np.exp(logprobs.astype(np.float64))).cumsum(axis=1).sum(axis=0)
            entropies.append(least_entropy(ids[said], logprobs, tail[said]))
        num_tokens += len(sample["tokens"])
        at, nll = surprise(sample)
        surprises.append((at, nll))
        if len(nll):
            means[i] = nll.mean()
    entropy = np.concatenate([np.zeros(0), *entropies])
    lengths = np.asarray(cache.lengths, np.int64)
    found = Look(len(chosen), num_tokens, lengths, mass / max(1, len(entropy)), entropy, by_position(surprises))
    found.shown = {kind: [cache[i] for i in which] for kind, which in _choose(chosen, means, seed).items()}
    return found


def surprise(sample: Sample) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The positions of the tokens that are learned from, and -log p of each, of the teacher, nats.

    Both are empty where the store does not say (one of an older version has no next_logprob).
    """
    if "next_logprob" not in sample:
        return np.zeros(0, np.int64), np.zeros(0)
    nll = -sample["next_logprob"].numpy().astype(np.float64)
    there = ~np.isnan(nll)
    if "loss_mask" in sample:
        there &= sample["loss_mask"].numpy()
    rows = np.flatnonzero(there)
    return rows + 1, nll[rows]


def by_position(surprises: Sequence[tuple[NDArray[np.int64], NDArray[np.float64]]]) -> NDArray[np.float64]:
    """[P, 4] as in Look, over bins of as many positions each; a bin without tokens is left out."""
    at = np.concatenate([positions for positions, _ in surprises])
    nll = np.concatenate([values for _, values in surprises])
    if not len(at):
        return np.zeros((0, 4))
    width = max(1, -(-int(at.max() + 1) // _BINS))
    bins = at // width
    count = np.bincount(bins)
    mean = np.bincount(bins, nll) / np.maximum(count, 1)
    spread = np.bincount(bins, (nll - mean[bins]) ** 2) / np.maximum(count - 1, 1)
    there = count > 0
    rows = [np.arange(len(count)) * width, count, mean, np.sqrt(spread / np.maximum(count, 1))]
    return np.stack(rows, axis=1)[there].astype(np.float64)


def _choose(chosen: NDArray[np.int64], means: NDArray[np.float64], seed: int) -> dict[str, list[int]]:
    """The numbers of samples of each kind: by how surprised the teacher was of them, in the mean over their tokens."""
    known = np.flatnonzero(~np.isnan(means))
    most = known[np.argsort(-means[known], kind="stable")][:_OF_A_KIND]
    left = np.setdiff1d(known, most)
    apart = np.abs(means[left] - np.median(means[known])) if len(left) else np.zeros(0)
    typical = left[np.argsort(apart, kind="stable")][:_OF_A_KIND]
    others = np.setdiff1d(np.arange(len(chosen)), np.union1d(most, typical))
    random = np.random.default_rng(seed).permutation(others)[:_OF_A_KIND]
    kinds = {"typical": typical, "most surprising": most, "random": random}
    return {kind: [int(chosen[i]) for i in which] for kind, which in kinds.items() if len(which)}
