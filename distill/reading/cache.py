"""TeacherCache: a store as a sequence of samples, each read when it is asked for.

    cache = TeacherCache("outputs/demo.zarr", tokenizer=student_tokenizer)
    cache[0]["target_ids"]                                    # [T, K]: what may follow each of the sample's T tokens
    train, held_out = cache.split(64)
    batches = train.shuffled(batch_size=8, seed=0)          # batch after batch, for a DataLoader
    loader = DataLoader(batches, batch_size=None, num_workers=2)

Opening reads where each sample starts and how long it is (12 bytes a sample, uncompressed), nothing else. All
processes of a machine that got the cache from one another share that.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from distill.errors import ConfigError, DataError, StoreError
from distill.reading.index import Index
from distill.reading.samples import RowReader, Sample, empty_sample, to_sample
from distill.reading.shuffle import Part, ShuffledBatches
from distill.store.fingerprint import text_digest

_DRAWN_AT_ONCE = 1 << 20


class TeacherCache(Dataset[Sample]):
    """A complete store as a read-only sequence of samples; also a map-style dataset for a DistributedSampler.

    It may be pickled and spawned, and forked with a local store: each process opens the store again.
    """

    def __init__(
        self,
        path: str,
        options: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        allow_unfinished: bool = False,
    ) -> None:
        """Open the store at `path`, a folder or a URL.

        options: of the object store's client. tokenizer: the student's, compared with the teacher's by
        `check_tokenizer`. allow_unfinished: take what is committed of a store that is not complete.
        Raises StoreError for what is not a store, for another format version, and for an unfinished store.
        """
        self._reader = RowReader(path, options or {})
        store = self._reader.store
        self.attributes = store.attributes
        self._index = Index.of(store)
        if not store.complete:
            committed = store.committed()
            if not allow_unfinished:
                there = f"{committed.sum()} of {len(committed)} blocks are there"
                raise StoreError(
                    f"{path} is unfinished ({there}): run {store.command} again to its end, or open it with "
                    "allow_unfinished=True"
                )
            starts = store.read_chunks("sample_start")
            self._index = self._index.where(np.concatenate([committed[part // store.block_rows] for part in starts]))
        if tokenizer is not None:
            self.check_tokenizer(tokenizer)

    @staticmethod
    def mix(caches: "Sequence[TeacherCache]", weights: Sequence[float] | None = None, seed: int = 0) -> "TeacherCache":
        """Several caches of one vocabulary as one, a Mixture; of one cache, that cache.

        weights: the share of each cache in every epoch's samples, relative to their sum; None: all samples of all. An
        epoch takes no sample twice: of a cache that has more than its share, the next one takes others, until all had
        their turn. seed: of which ones come when.
        Raises ConfigError where weights do not fit the caches, and for caches that cannot be mixed: of different
        vocabularies, or of one store; StoreError for an unfinished store, DataError for one without tokens to learn
        from.
        """
        from distill.reading.mixture import mix  # it is made of caches

        return mix(caches, weights, seed)

    @property
    def parts(self) -> "tuple[TeacherCache, ...]":
        """The caches of single stores that this one consists of: itself, or those of a Mixture."""
        return (self,)

    @property
    def per_epoch(self) -> list[int]:
        """How many samples an epoch has of each of `parts`."""
        return [len(self)]

    @property
    def identity(self) -> dict[str, Any]:
        """What identifies the store, as a setting of what is made with it."""
        return {"store": self.attributes["fingerprint"]}

    @property
    def path(self) -> str:
        """The store's folder or URL; of a Mixture all of them, with commas between."""
        return self._reader.path

    @property
    def temperatures(self) -> list[float]:
        """The temperatures of the columns of logsumexp and tail_logprob."""
        return [float(temperature) for temperature in self.attributes["temperatures"]]

    @property
    def arrays(self) -> frozenset[str]:
        """The names of the store's arrays over rows, but for those that it marks as unknown.

        target_ids, target_logprobs and tokens are always there.
        """
        store = self._reader.store
        return frozenset([*store.planned, *store.captured]) - store.unknown

    @property
    def max_length(self) -> int:
        """The number of tokens of the longest sample."""
        return max((int(lengths.max()) for lengths in self._index.lengths()), default=0)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each sample."""
        return [length for lengths in self._index.lengths() for length in lengths.tolist()]

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all samples."""
        return sum(int(lengths.sum(dtype=np.int64)) for lengths in self._index.lengths())

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    @overload
    def __getitem__(self, which: int) -> Sample: ...
    @overload
    def __getitem__(self, which: slice) -> "TeacherCache": ...
    def __getitem__(self, which: int | slice) -> "Sample | TeacherCache":
        """One sample, as in distill/reading/samples.py; for a slice, a cache of these samples only."""
        if isinstance(which, slice):
            return self._of(self._index[which])
        if not -len(self) <= which < len(self):
            raise IndexError(f"{self.path}: expected a sample from {-len(self)} to {len(self) - 1}, found {which}")
        position = range(len(self))[which]
        rows = self._reader.read_sample(*self._index.rows(position))
        return to_sample(self._index.number(position), rows)

    def split(self, num_samples: int, seed: int = 0) -> "tuple[TeacherCache, TeacherCache]":
        """Two caches: one without about `num_samples` random samples, and one with these samples only.

        Whole examples of the dataset are taken: all windows of a long text go to the same side, so that no part of a
        held-out text is trained on. The second cache is empty if `num_samples` is 0.
        Raises ConfigError if it is negative.
        """
        if num_samples < 0:
            raise ConfigError(f"{self.path}: expected 0 or more samples to hold out, found {num_samples}")
        if num_samples == 0:
            return self._of(self._index), self[:0]
        return self._without(some_examples(self._sources(), num_samples, seed))

    def _sources(self) -> NDArray[np.int64]:
        """[S] int64: the example of the dataset that each sample is from."""
        return self._index.sources(self._reader.store)

    def _without(self, held_out: NDArray[np.bool_]) -> "tuple[TeacherCache, TeacherCache]":
        """Two caches: of the samples for which `held_out` [S] is false, and of the others."""
        return self._of(self._index.where(~held_out)), self._of(self._index.where(held_out))

    def select(self, keep: Callable[[Sample], bool]) -> "TeacherCache":
        """A cache of those samples for which `keep` is true. All are read once, without the teacher's distributions.

        keep: is called with sample, tokens, loss_mask (true where a token follows that is trained on), and if they are
        there next_logprob and sampled_logprob, of one sample after the other, as in distill/reading/samples.py:

            likely = cache.select(lambda sample: sample["next_logprob"][sample["loss_mask"]].mean() > -2)
        """
        index, store = self._index.ascending(), self._reader.store
        names = [name for name in ("tokens", "loss_mask", "next_logprob", "sampled_logprob") if name in self.arrays]
        wanted = np.zeros(len(index), bool)
        for start, stop in index.pieces(store.block_rows).tolist():
            starts, lengths = index.spans(start, stop)
            rows = store.read_arrays(names, first := int(starts[0]), int(starts[-1] + lengths[-1]))
            for i, (at, length) in enumerate(zip(starts - first, lengths, strict=True), start):
                sample = to_sample(index.number(i), {name: rows[name][at : at + length] for name in names})
                sample.setdefault("loss_mask", torch.arange(int(length)) < int(length) - 1)
                wanted[i] = bool(keep(sample))
        return self._of(index.where(wanted))

    def shuffled(
        self,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        window_blocks: int = 16,
    ) -> ShuffledBatches:
        """Batches in random order, of rank `rank`'s share of each epoch: see ShuffledBatches.

        window_blocks: how many blocks a DataLoader worker holds in memory, or of larger blocks pieces of 65,536 rows;
        their samples are shuffled among each other.
        Raises DataError as `check_trained` does, and ConfigError for numbers that make no batches.
        """
        if batch_size < 1 or window_blocks < 1 or not 0 <= rank < world_size:
            raise ConfigError(
                f"{self.path}: expected batch_size and window_blocks of at least 1 and 0 <= rank < world_size, found "
                f"{batch_size}, {window_blocks}, {rank} and {world_size}"
            )
        self.check_trained("to train on")
        nothing = empty_sample(self.attributes["k"], len(self.temperatures))
        return ShuffledBatches(self._batched(), nothing, batch_size, seed, rank, world_size, window_blocks)

    def _batched(self) -> list[Part]:
        """What batches are made of."""
        return [Part(self._reader, self._index.ascending(), len(self))]

    def check_trained(self, purpose: str) -> None:
        """Raise DataError where nothing can be learned from these samples, or measured on them.

        purpose: of these samples, for the message
        """
        store, index = self._reader.store, self._index.ascending()
        masked = "loss_mask" in store.array_names()
        if not masked and any((lengths > 1).any() for lengths in index.lengths()):  # no token follows a last one
            return
        for start, stop in (
            index.pieces(store.block_rows).tolist() if masked else ()
        ):  # the first is nearly always enough
            starts, lengths = index.spans(start, stop)
            rows = store.read_rows("loss_mask", int(starts[0]), int(starts[-1] + lengths[-1]))
            trained = np.append(0, np.cumsum(rows))
            starts = starts - starts[0]
            if (trained[starts + lengths - 1] > trained[starts]).any():
                return
        why = "loss_mask is false everywhere" if masked else "all are short"
        raise DataError(
            f"{self.path}: expected tokens to learn from in the {len(self):,} samples {purpose}, found none: {why}"
        )

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise StoreError where the student's `tokenizer` gives other ids than the teacher's. It may have more."""
        size, digest = (self.attributes["tokenizer"][name] for name in ("vocab_size", "vocab_digest"))
        vocabulary = tokenizer.get_vocab()
        if len(tokenizer) < size:
            raise StoreError(
                f"{self.path}: expected a student's tokenizer of {size:,} tokens, as the teacher's, "
                f"found {len(tokenizer):,}"
            )
        shared = sorted((token, i) for token, i in vocabulary.items() if i < size)
        if digest not in (text_digest(json.dumps(pairs)) for pairs in (shared, sorted(vocabulary.items()))):
            raise StoreError(
                f"{self.path}: the student's tokenizer of {len(tokenizer):,} tokens gives other ids than the teacher's "
                f"of {size:,}; the ids of the store mean nothing to it"
            )

    def _of(self, index: Index) -> "TeacherCache":
        part = object.__new__(TeacherCache)
        part._reader, part.attributes, part._index = self._reader, self.attributes, index
        return part


def some_examples(source: NDArray[np.int64], num_samples: int, seed: int) -> NDArray[np.bool_]:
    """[S] bool: the samples of random whole examples, as many as have about `num_samples` samples together.

    source: [S] int64, the example that each sample is from
    """
    if source.max(initial=0) > 8 * len(source):  # examples without samples, far more than are worth counting
        source = np.unique(source, return_inverse=True)[1]
    windows = np.bincount(source)  # [E], the samples of each example
    if not windows.all():  # examples without samples are not drawn
        source, windows = (np.cumsum(windows > 0) - 1)[source], windows[windows > 0]
    order = np.arange(len(windows), dtype=np.int32 if len(windows) < 1 << 31 else np.int64)
    np.random.default_rng(seed).shuffle(order)
    taken = np.zeros(len(windows), bool)
    count = 0
    for at in range(0, len(order), _DRAWN_AT_ONCE):
        drawn = order[at : at + _DRAWN_AT_ONCE]
        counts = count + np.cumsum(windows[drawn])
        enough = int(np.searchsorted(counts, num_samples)) + 1
        taken[drawn[:enough]] = True
        if enough <= len(drawn):
            break
        count = int(counts[-1])
    return taken[source]
