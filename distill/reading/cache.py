"""TeacherCache: a store as a sequence of samples, each read when it is asked for.

    cache = TeacherCache("outputs/demo.zarr", tokenizer=student_tokenizer)
    cache[0]["target_ids"]                                    # [T, K]: what may follow each of the sample's T tokens
    train, held_out = cache.split(64)
    batches = train.shuffled(batch_size=8, seed=0)          # batch after batch, for a DataLoader
    loader = DataLoader(batches, batch_size=None, num_workers=2)

Opening reads where each sample starts and how long it is (12 bytes a sample, uncompressed), nothing else.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, overload

import numpy as np
from torch.utils.data import Dataset

from distill.errors import ConfigError, DataError, StoreError
from distill.reading.samples import RowReader, Sample, to_sample
from distill.reading.shuffle import Index, ShuffledBatches
from distill.store.fingerprint import text_digest


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
        starts, lengths = store.read_all("sample_start"), store.read_all("sample_length")
        self._index = Index(np.arange(len(starts)), starts, lengths)
        if not store.complete:
            committed = store.committed()
            if not allow_unfinished:
                there = f"{committed.sum()} of {len(committed)} blocks are there"
                raise StoreError(
                    f"{path} is unfinished ({there}): run distill.generate again to its end, or open it with "
                    "allow_unfinished=True"
                )
            self._index = self._index.take(committed[starts // store.block_rows])
        if tokenizer is not None:
            self.check_tokenizer(tokenizer)

    @property
    def path(self) -> str:
        """The store's folder or URL."""
        return self._reader.path

    @property
    def temperatures(self) -> list[float]:
        """The temperatures of the columns of logsumexp and tail_logprob."""
        return [float(temperature) for temperature in self.attributes["temperatures"]]

    @property
    def max_length(self) -> int:
        """The number of tokens of the longest sample."""
        return int(self._index.lengths.max(initial=0))

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each sample."""
        return [int(length) for length in self._index.lengths]

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all samples."""
        return int(self._index.lengths.sum(dtype=np.int64))

    def __len__(self) -> int:
        return len(self._index.numbers)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    @overload
    def __getitem__(self, which: int) -> Sample: ...
    @overload
    def __getitem__(self, which: slice) -> "TeacherCache": ...
    def __getitem__(self, which: int | slice) -> "Sample | TeacherCache":
        """One sample, as in distill/reading/samples.py; for a slice, a cache of these samples only."""
        if isinstance(which, slice):
            return self._of(self._index.take(which))
        if not -len(self) <= which < len(self):
            raise IndexError(f"{self.path}: expected a sample from {-len(self)} to {len(self) - 1}, found {which}")
        start, length = int(self._index.starts[which]), int(self._index.lengths[which])
        rows = self._reader.read_sample(start, start + length)
        return to_sample(int(self._index.numbers[which]), rows, self.path)

    def split(self, num_samples: int, seed: int = 0) -> "tuple[TeacherCache, TeacherCache]":
        """Two caches: one without about `num_samples` random samples, and one with these samples only.

        Whole examples of the dataset are taken: all windows of a long text go to the same side, so that no part of a
        held-out text is trained on. The second cache is empty if `num_samples` is 0.
        Raises ConfigError if it is negative.
        """
        if num_samples < 0:
            raise ConfigError(f"{self.path}: expected 0 or more samples to hold out, found {num_samples}")
        source = self._reader.store.read_all("sample_index")[self._index.numbers]
        examples, example_of, windows = np.unique(source, return_inverse=True, return_counts=True)
        order = np.random.default_rng(seed).permutation(len(examples))
        taken = np.zeros(len(examples), bool)
        taken[order[: int(np.searchsorted(np.cumsum(windows[order]), num_samples, "left")) + 1]] = num_samples > 0
        held_out = taken[example_of]
        return self._of(self._index.take(~held_out)), self._of(self._index.take(held_out))

    def shuffled(
        self,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        window_blocks: int = 16,
    ) -> ShuffledBatches:
        """Batches in random order, of rank `rank`'s share of each epoch: see ShuffledBatches.

        window_blocks: how many blocks a DataLoader worker holds in memory; their samples are shuffled among each other.
        Raises DataError as `check_trained` does, and ConfigError for numbers that make no batches.
        """
        if batch_size < 1 or window_blocks < 1 or not 0 <= rank < world_size:
            raise ConfigError(
                f"{self.path}: expected batch_size and window_blocks of at least 1 and 0 <= rank < world_size, found "
                f"{batch_size}, {window_blocks}, {rank} and {world_size}"
            )
        self.check_trained("to train on")
        return ShuffledBatches(self._reader, self._index, batch_size, seed, rank, world_size, window_blocks)

    def check_trained(self, purpose: str) -> None:
        """Raise DataError where nothing can be learned from these samples, or measured on them.

        purpose: of these samples, for the message
        """
        store, reading = self._reader.store, self._index.take(self._index.lengths > 1)  # no token follows a last one
        masked = "loss_mask" in store.array_names()
        if len(reading.numbers) and not masked:
            return
        block_of = reading.starts // store.block_rows
        for block in np.unique(block_of):  # the first one is nearly always enough
            first, here = int(block) * store.block_rows, reading.take(block_of == block)
            trained = np.cumsum([0, *store.read_rows("loss_mask", first, first + store.block_rows)])
            starts = here.starts - first
            if (trained[starts + here.lengths - 1] > trained[starts]).any():
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
