"""Mixture: several caches of one vocabulary as one, each with its exact share of every epoch.

    mixture = TeacherCache.mix([TeacherCache("a.zarr"), TeacherCache("b.zarr")], weights=[0.7, 0.3])

An epoch has as many samples as there can be without taking one twice: n = min over the caches of size / share. Of each
cache it has n times its share, rounded by largest remainders. Of a cache that has more, the next epoch takes others,
until all had their turn (`shares.of_epoch`). What all caches have is in a sample: temperatures, logsumexp,
tail_logprob, next_logprob, sampled_logprob. So what a batch has does not depend on which samples are in it. A cache
without a loss mask counts all its tokens. A sample's number is its number in its store plus the samples of the stores
before it, so that no two samples have the same one.

S samples of some caches.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from distill.errors import ConfigError, DataError, StoreError
from distill.reading.cache import TeacherCache, some_examples
from distill.reading.samples import Sample, View
from distill.reading.shares import apportioned, samples_per_epoch
from distill.reading.shuffle import Part

_NEED_NOT_BE = frozenset({"logsumexp", "tail_logprob", "next_logprob", "sampled_logprob"})
_WHICH_WHEN = 1  # ends the seeds of which samples come in which epoch, beside those that shuffle


class Mixture(TeacherCache):
    """A TeacherCache of several: `shuffled` gives batches of all of them, epoch after epoch.

    As a sequence it has the samples of the epoch that `set_epoch` said, those of one cache after those of another.
    A slice of it has these samples in every epoch. `attributes` has what the stores agree about; k and vocab_size of
    the widest, and the temperatures that all have.
    """

    def __init__(
        self, caches: Sequence[TeacherCache], views: Sequence[View], shares: Sequence[Fraction] | None, seed: int
    ) -> None:
        """views: how the samples of each look. shares: of an epoch's samples, which sum to 1; None: all of all.

        Raises ConfigError where the samples are too few for every cache to have one in each epoch.
        """
        self._caches, self._views, self._shares, self._seed = tuple(caches), tuple(views), shares, seed
        self._counts = samples_per_epoch([len(cache) for cache in caches], shares)
        for cache, count in sorted(zip(caches, self._counts, strict=True), key=lambda pair: len(pair[0])):
            if shares is not None and not count:
                raise ConfigError(
                    f"weights: expected a sample of every store in an epoch, found none of the {len(cache):,} of "
                    f"{cache.path} in an epoch of {sum(self._counts):,}"
                )
        self.attributes = _in_common(caches)
        # Shared, so that DataLoader workers that live for several epochs see what set_epoch says.
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()  # type: ignore[no-untyped-call]
        self._chosen: tuple[int, list[TeacherCache]] | None = None

    @property
    def parts(self) -> tuple[TeacherCache, ...]:
        """The caches."""
        return self._caches

    @property
    def per_epoch(self) -> list[int]:
        """How many samples an epoch has of each of `parts`."""
        return list(self._counts)

    @property
    def path(self) -> str:
        """The stores' folders or URLs."""
        return ", ".join(cache.path for cache in self._caches)

    @property
    def identity(self) -> dict[str, Any]:
        """What identifies the stores, and their shares, as settings."""
        shares = None if self._shares is None else [str(share) for share in self._shares]
        return {"store": [cache.attributes["fingerprint"] for cache in self._caches], "store.weights": shares}

    @property
    def arrays(self) -> frozenset[str]:
        """The names of the arrays over rows that all stores have."""
        return frozenset.intersection(*(cache.arrays for cache in self._caches))

    @property
    def max_length(self) -> int:
        """The number of tokens of the longest sample of any epoch."""
        return max(cache.max_length for cache in self._caches)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each sample of the epoch."""
        return [length for cache in self._now() for length in cache.lengths]

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all samples of the epoch."""
        return sum(cache.num_tokens for cache in self._now())

    def __len__(self) -> int:
        """The samples of an epoch."""
        return sum(self._counts)

    def set_epoch(self, epoch: int) -> None:
        """Be the samples of this epoch, counted from 0, as a sequence. Batches of `shuffled` have their own epoch."""
        self._epoch.fill_(epoch)
        self._now()

    def _now(self) -> list[TeacherCache]:
        """The samples of the epoch, of each cache."""
        epoch = int(self._epoch)
        if self._chosen is None or self._chosen[0] != epoch:
            parts = zip(self._caches, self._batched(), strict=True)
            self._chosen = (
                epoch,
                [
                    cache if part.count == len(cache) else cache._of(part.index.at(part.of_epoch(epoch)))
                    for cache, part in parts
                ],
            )
        return self._chosen[1]

    def _batched(self) -> list[Part]:
        """What batches are made of: every cache."""
        found = zip(self._caches, self._counts, self._views, strict=True)
        return [
            Part(cache._reader, cache._index.ascending(), count, (self._seed, number, 0, 0, 0, _WHICH_WHEN), view)
            for number, (cache, count, view) in enumerate(found)
        ]

    def __getitem__(self, which: Any) -> Any:
        """One sample of the epoch; for a slice, a cache of these samples only."""
        if isinstance(which, slice):
            return self._slice(range(len(self))[which])
        if not -len(self) <= which < len(self):
            raise IndexError(f"{self.path}: expected a sample from {-len(self)} to {len(self) - 1}, found {which}")
        position = range(len(self))[which]
        for cache, view in zip(self._now(), self._views, strict=True):
            if position < len(cache):
                return view.of(cache[position])
            position -= len(cache)
        raise AssertionError(position)

    def _slice(self, chosen: range) -> "Mixture":
        ascending = chosen if chosen.step > 0 else chosen[::-1]
        edges = accumulate(self._counts, initial=0)
        found: list[TeacherCache] = []
        for cache, (first, end) in zip(self._now(), pairwise(edges), strict=True):
            part = ascending[bisect_left(ascending, first) : bisect_left(ascending, end)]
            kept = cache[part.start - first : part.stop - first : part.step] if len(part) else cache[:0]
            found.append(kept if chosen.step > 0 else kept[::-1])
        order = slice(None, None, 1 if chosen.step > 0 else -1)
        return Mixture(found[order], self._views[order], None, self._seed)

    def select(self, keep: Callable[[Sample], bool]) -> "Mixture":
        """A mixture, of the same shares, of those samples for which `keep` is true: as of a TeacherCache."""
        found = [
            cache.select(lambda sample, view=view: keep(view.of(sample)))  # type: ignore[misc]
            for cache, view in zip(self._caches, self._views, strict=True)
        ]
        return Mixture(found, self._views, self._shares, self._seed)

    def split(self, num_samples: int, seed: int = 0) -> tuple[TeacherCache, TeacherCache]:
        """A mixture of the same shares without about `num_samples` samples, and all of these as one of all of all.

        Of each cache its share is held out, by whole examples, as TeacherCache.split does it. From stores of the same
        dataset the same examples are taken: what is held out of one is not trained on with another one's teacher.
        Raises ConfigError if it is negative, or if nothing is left of a cache.
        """
        if num_samples < 0:
            raise ConfigError(f"{self.path}: expected 0 or more samples to hold out, found {num_samples}")
        total = max(1, sum(map(len, self._caches)))
        shares = self._shares or [Fraction(len(cache), total) for cache in self._caches]
        groups = self._of_one_dataset()
        wanted = apportioned(num_samples, [sum((shares[i] for i in group), Fraction(0)) for group in groups])
        sides = {i: (cache, cache[:0]) for i, cache in enumerate(self._caches)}
        for group, count in zip(groups, wanted, strict=True):
            if count:
                sources = [self._caches[i]._sources() for i in group]
                held_out = np.split(
                    some_examples(np.concatenate(sources), count, seed), np.cumsum(list(map(len, sources)))[:-1]
                )
                sides |= {i: self._caches[i]._without(mask) for i, mask in zip(group, held_out, strict=True)}
        for i, (left, _) in sides.items():
            if len(self._caches[i]) and not len(left):
                raise ConfigError(
                    f"expected to leave some of the {len(self._caches[i]):,} samples of {self._caches[i].path} to "
                    f"train on, found all of them among the {num_samples:,} that are held out of all stores"
                )
        return (
            Mixture([left for left, _ in sides.values()], self._views, self._shares, self._seed),
            Mixture([held_out for _, held_out in sides.values()], self._views, None, self._seed),
        )

    def _of_one_dataset(self) -> list[list[int]]:
        """The numbers of the caches, those whose stores were made from the same dataset together."""
        groups: dict[Any, list[int]] = {}
        for i, cache in enumerate(self._caches):
            settings = cache.attributes["config"]
            names = ("dataset.content", "dataset.remote", "dataset.name", "dataset.split")
            dataset = str([settings.get(name) for name in names]) if "dataset.content" in settings else i
            groups.setdefault(dataset, []).append(i)
        return list(groups.values())

    def check_trained(self, purpose: str) -> None:
        """Raise DataError where nothing can be learned from the samples of any cache."""
        for cache in filter(len, self._caches):
            try:
                return cache.check_trained(purpose)
            except DataError as error:
                last = error
        raise DataError(f"{self.path}: expected samples {purpose}, found none") if not len(self) else last

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise StoreError where the student's `tokenizer` gives other ids than that of the teachers."""
        self._caches[0].check_tokenizer(tokenizer)


def mix(caches: Sequence[TeacherCache], weights: Sequence[float] | None, seed: int) -> TeacherCache:
    """See TeacherCache.mix."""
    caches = list(caches)
    for cache in caches:
        if not isinstance(cache, TeacherCache) or isinstance(cache, Mixture):
            raise ConfigError(f"expected caches of single stores to mix, found a {type(cache).__name__}")
    if not caches:
        raise ConfigError("expected caches to mix, found none")
    shares = _shares(caches, weights)
    if len(caches) == 1:
        return caches[0]
    for number, cache in enumerate(caches):
        _check_alike(caches[:number], cache)
    temperatures = _temperatures(caches)
    if not temperatures:
        raise ConfigError(
            "expected a temperature that all stores hold, found "
            + ", ".join(f"{cache.temperatures} in {cache.path}" for cache in caches)
        )
    there = frozenset.intersection(*(cache.arrays for cache in caches))
    firsts = accumulate((cache.attributes["num_samples"] for cache in caches[:-1]), initial=0)
    views = [
        View(
            first,
            tuple(map(cache.temperatures.index, temperatures)) if cache.temperatures != temperatures else None,
            (cache.arrays & _NEED_NOT_BE) - there,
        )
        for first, cache in zip(firsts, caches, strict=True)
    ]
    return Mixture(caches, views, shares, seed)


def _shares(caches: Sequence[TeacherCache], weights: Sequence[float] | None) -> list[Fraction] | None:
    """The weights as shares, with the decimals that they are written with. Raises ConfigError where they do not fit."""
    if weights is None:
        return None
    good = [isinstance(weight, int | float) and math.isfinite(weight) and weight > 0 for weight in weights]
    if len(weights) != len(caches) or not all(good):
        raise ConfigError(
            f"weights: expected a number > 0 for each of {', '.join(cache.path for cache in caches)}, found "
            f"{list(weights)}"
        )
    exact = [Fraction(str(float(weight))) for weight in weights]
    return [weight / sum(exact) for weight in exact]


def _check_alike(others: Sequence[TeacherCache], cache: TeacherCache) -> None:
    """Raise ConfigError, StoreError or DataError where a cache cannot be mixed with these others."""
    for other in others[:1]:
        vocabularies = [(one.attributes["tokenizer"], one.path) for one in (other, cache)]
        if len({(found["vocab_size"], found["vocab_digest"]) for found, _ in vocabularies}) > 1:
            shown = (
                f"{found['vocab_size']:,} tokens ({found['vocab_digest']}) in {path}" for found, path in vocabularies
            )
            raise ConfigError(f"expected stores of one vocabulary to mix, found {' and '.join(shown)}")
    for other in others:
        if other.attributes["digest"] == cache.attributes["digest"]:
            raise ConfigError(
                f"expected different stores to mix, found {other.path} and {cache.path}, which are the same one: its "
                "samples would come twice in an epoch"
            )
    if not cache._reader.store.complete:
        raise StoreError(f"{cache.path}: expected a complete store to mix, found an unfinished one")
    if len(cache):
        cache.check_trained("to mix")


def _temperatures(caches: Sequence[TeacherCache]) -> list[float]:
    """The temperatures that all have, in the order of the first."""
    return [t for t in caches[0].temperatures if all(t in cache.temperatures for cache in caches)]


def _in_common(caches: Sequence[TeacherCache]) -> dict[str, Any]:
    """The attributes about which stores agree, and those of a mixture of them."""
    all_of_them = [cache.attributes for cache in caches]
    first = all_of_them[0]
    found = {name: value for name, value in first.items() if all(one.get(name) == value for one in all_of_them)}
    unknown = sorted({name for one in all_of_them for name in one.get("unknown", ())})
    return found | {
        "k": max(one["k"] for one in all_of_them),
        "vocab_size": max(one["vocab_size"] for one in all_of_them),
        "tokenizer": first["tokenizer"],
        "temperatures": _temperatures(caches),
        **({"unknown": unknown} if unknown else {}),
    }
