"""TeacherCache: what the teacher said, sample by sample, read from the store when it is asked for.

    cache = TeacherCache("outputs/demo.zarr", tokenizer=student_tokenizer)
    cache[0]["topk_ids"]                                    # [T, K]: what may follow each of the sample's T tokens
    train, held_out = cache.split(64)
    batches = train.shuffled(batch_size=8, seed=0)          # one batch after another, for a DataLoader
    loader = DataLoader(batches, batch_size=None, num_workers=2)

Opening reads the sample index (20 bytes a sample), nothing else.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, overload

import numpy as np
from torch.utils.data import Dataset

from distill.errors import StoreError
from distill.fingerprint import text_digest
from distill.samples import RowReader, Sample, to_sample
from distill.shuffle import Index, ShuffledBatches


class TeacherCache(Dataset[Sample]):
    """A complete store as a read-only sequence of samples; also a map-style dataset for a DistributedSampler.

    May be pickled, forked (local stores) and spawned: the store is opened anew in each process.
    """

    def __init__(
        self,
        path: str,
        options: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        allow_unfinished: bool = False,
    ) -> None:
        """Open the store at `path`, a folder or a URL.

        options: of the object store's client. tokenizer: the student's, checked against the teacher's, see
        `check_tokenizer`. allow_unfinished: take what is committed of a store that is not complete.
        Raises StoreError for what is not a store, another format version, or an unfinished one.
        """
        self._reader = RowReader(path, options or {})
        store = self._reader.store
        self.attributes = store.attributes
        starts, lengths = store.read_all("sample_start"), store.read_all("sample_length")
        self._index = Index(np.arange(len(starts)), starts, lengths)
        if not store.complete:
            commits = store.read_all("commits")
            if not allow_unfinished:
                there = f"{(commits >= 0).sum()} of {len(commits)} blocks are there"
                raise StoreError(
                    f"{path} is unfinished ({there}): run distill.generate again to its end, or open it with "
                    "allow_unfinished=True"
                )
            self._index = self._index.take(commits[starts // store.block_rows] >= 0)
        if tokenizer is not None:
            self.check_tokenizer(tokenizer)

    @property
    def path(self) -> str:
        """Where the store is."""
        return self._reader.path

    @property
    def temperatures(self) -> list[float]:
        """Of the columns of logsumexp and tail_logprob."""
        return [float(temperature) for temperature in self.attributes["temperatures"]]

    @property
    def max_length(self) -> int:
        """Tokens of the longest sample."""
        return int(self._index.lengths.max(initial=0))

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
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
        """One sample, as distill.samples describes it; or, for a slice, a cache of these samples alone."""
        if isinstance(which, slice):
            return self._of(self._index.take(which))
        if not -len(self) <= which < len(self):
            raise IndexError(f"{self.path}: expected a sample from {-len(self)} to {len(self) - 1}, found {which}")
        start, length = int(self._index.starts[which]), int(self._index.lengths[which])
        rows = self._reader.read_sample(start, start + length)
        return to_sample(int(self._index.numbers[which]), rows, self.path)

    def split(self, num_samples: int, seed: int = 0) -> "tuple[TeacherCache, TeacherCache]":
        """This cache without about `num_samples` random samples, and those: whole examples of the dataset.

        All windows of one long text go to the same side, so that nothing held out was partly learnt. The second is
        empty if `num_samples` is 0.
        """
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
        packed: bool = False,
        window_blocks: int = 16,
    ) -> ShuffledBatches:
        """Batches in random order: rank `rank`'s share of each epoch; see ShuffledBatches.

        packed: lay samples end to end in as few rows as hold them. window_blocks: blocks in the memory of a DataLoader
        worker, among which samples are shuffled.
        """
        return ShuffledBatches(self._reader, self._index, batch_size, seed, rank, world_size, packed, window_blocks)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise StoreError where `tokenizer` (the student's) gives other ids than the teacher's. It may have more."""
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
