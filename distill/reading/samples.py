"""Samples out of a store, checked, and several of them as one batch.

T tokens of a sample, K kept ids, n temperatures, B rows of a batch, L tokens of a row.

A sample is a dict of tensors, without those that the store marks as unknown. Row t of each tensor is about the token
that follows token t:

    sample          int      its number in the store
    tokens          [T]      int64
    target_ids        [T, K]   int64, by descending probability; of a store of samples, those kept, those drawn, then -1
    target_logprobs   [T, K]   float32, at temperature 1; nan where an id was drawn, or there is none
    logsumexp       [T, n]   float32
    tail_logprob    [T, n]   float32, of all ids without a target_logprob: each drawn one weighs an equal part of it
    next_logprob    [T]      float32, the teacher's, at temperature 1, of the token that really follows; nan at the last
    sampled_logprob [T]      float32, where a student wrote the tokens and said so: its own; nan where not trained on
    loss_mask       [T]      bool, where not every token is trained on: whether the one that follows is
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.errors import StoreError
from distill.settings import expand
from distill.store.store import Store

Sample = dict[str, Any]
Rows = dict[str, NDArray[Any]]

_TARGETS = ("target_ids", "target_logprobs", "logsumexp", "tail_logprob")
_OF_NEXT = ("next_logprob", "sampled_logprob")
_CHUNKS_KEPT = 4
_SPANS_AT_A_TIME = 8


@dataclass(frozen=True)
class _Opened:
    """The store as one process has it open. chunks: the last few, by number; other threads may read too."""

    store: Store
    names: list[str]
    process: int = field(default_factory=os.getpid)
    committed: set[int] = field(default_factory=set)
    chunks: OrderedDict[int, Rows] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)


class RowReader:
    """Rows of a store, read in whole inner chunks, by any number of threads.

    Each process that reads opens the store for itself: at the place where it was first opened, wherever the process has
    gone since, and only if it is the same store still.
    """

    def __init__(self, path: str, options: Mapping[str, Any]) -> None:
        self.path, self._options = expand(path, "store.path"), dict(options)
        self._place = self.path if "://" in self.path else str(Path(self.path).absolute())
        self._identity: str | None = None
        self._open()

    def _open(self) -> _Opened:
        store = Store.existing(self._place, self._options, known=self._identity is not None)
        identity = str(store.attributes["digest"])
        if self._identity not in (None, identity):
            raise StoreError(
                f"{self.path}: expected the store {self._identity} that was opened first, found the store "
                f"{identity} at {self._place}"
            )
        self._identity = identity
        self._opened = _Opened(store, [name for name in (*store.planned, *store.captured) if name not in store.unknown])
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_opened"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    @property
    def store(self) -> Store:
        """The store, opened in this process."""
        return self._here().store

    def _here(self) -> _Opened:
        opened = self._opened
        if opened.process == os.getpid():
            return opened
        if "://" in self.path:  # the client's threads did not survive the fork, and it would wait for them
            raise StoreError(
                f"{self.path} cannot be read after a fork: give the DataLoader multiprocessing_context='forkserver'"
            )
        return self._open()

    def read(self, start: int, stop: int) -> Rows:
        """The rows [start, stop), which are in one block, of all arrays.

        Raises StoreError where a checksum is wrong, or the block is not committed.
        """
        opened = self._here()
        block = start // opened.store.block_rows
        if block not in opened.committed:
            if opened.store.read_rows("commits", block, block + 1)[0] < 0:
                raise StoreError(f"{self.path}: block {block} is not there (it has no commit)")
            opened.committed.add(block)
        return opened.store.read_arrays(opened.names, start, stop)

    def read_several(self, spans: Sequence[tuple[int, int]]) -> list[Rows]:
        """The rows of each span, as in `read`. Over a link they are asked for together."""
        if "://" not in self.path:
            return [self.read(*span) for span in spans]
        with ThreadPoolExecutor(_SPANS_AT_A_TIME) as pool:
            return list(pool.map(lambda span: self.read(*span), spans))

    def read_sample(self, start: int, stop: int) -> Rows:
        """The rows of one sample, as in `read`. The last few inner chunks are kept, for samples to come."""
        store = self.store
        size = store.inner_rows
        parts = []
        for number in range(start // size, (stop - 1) // size + 1):
            first, chunk = number * size, self._chunk(number, size)
            parts.append({name: rows[max(start - first, 0) : stop - first] for name, rows in chunk.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _chunk(self, number: int, size: int) -> Rows:
        opened = self._here()
        with opened.lock:
            chunk = opened.chunks.get(number)
        if chunk is None:  # read without the lock: threads read at the same time
            chunk = self.read(number * size, (number + 1) * size)
        with opened.lock:
            opened.chunks[number] = chunk
            opened.chunks.move_to_end(number)
            if len(opened.chunks) > _CHUNKS_KEPT:
                opened.chunks.popitem(last=False)
        return chunk


@dataclass(frozen=True)
class View:
    """How the samples of a store look beside those of other stores.

    first_number: is added to their numbers
    columns:      the columns of logsumexp and tail_logprob that are there; None: all
    without:      the names of what is left out
    """

    first_number: int = 0
    columns: tuple[int, ...] | None = None
    without: frozenset[str] = frozenset()

    def of(self, sample: Sample) -> Sample:
        """The sample as it looks then."""
        found = {name: values for name, values in sample.items() if name not in self.without}
        if self.columns is not None:
            found |= {name: found[name][:, self.columns] for name in ("logsumexp", "tail_logprob") if name in found}
        return found | {"sample": sample["sample"] + self.first_number}


def as_stored(number: int, rows: Rows) -> Sample:
    """The rows of one sample as tensors with the store's own dtypes: half the memory; `collate` widens them."""
    return {"sample": number, **{name: torch.from_numpy(values) for name, values in rows.items()}}


def to_sample(number: int, rows: Rows) -> Sample:
    """The same, with the dtypes of the table above."""
    sample = as_stored(number, rows)
    for name in rows:
        if name != "loss_mask":
            sample[name] = sample[name].float() if sample[name].is_floating_point() else sample[name].long()
    return sample


def empty_sample(k: int, num_temperatures: int) -> Sample:
    """A sample of one token, number -1, for a rank that has no more samples. No token follows: nothing is learned."""
    sample: Sample = {"sample": -1, "tokens": torch.zeros(1, dtype=torch.long)}
    sample["target_ids"] = torch.zeros((1, k), dtype=torch.long)
    sample["target_logprobs"] = torch.zeros((1, k))
    sample["logsumexp"] = sample["tail_logprob"] = torch.zeros((1, num_temperatures))
    sample |= {name: torch.zeros(1) for name in _OF_NEXT}
    return sample


class Batch(dict[str, Tensor]):
    """A batch by the names of its tensors. A DataLoader's worker sends it through its pipe, by value.

    torch would pass a descriptor of shared memory for each tensor, through a socket in TMPDIR: it fails where the path
    is long, /dev/shm small (containers), or many batches are held.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, ({name: values.numpy() for name, values in self.items()},)

    def __copy__(self) -> "Batch":
        return Batch(self)


def _received(arrays: Rows) -> Batch:
    return Batch({name: torch.from_numpy(values) for name, values in arrays.items()})


def collate(samples: Sequence[Sample]) -> Batch:
    """Several samples as one batch, a row for each, padded on the right: a causal student needs no attention mask.

    K is that of the widest sample. A narrower one goes on with ids of -1.

        sample          [B] int64       the samples' numbers (-1: an empty batch)
        input_ids       [B, L] int64
        next_tokens     [B, L] int64    the token that follows: the label of position t; -1 where none follows
        loss_mask       [B, L] bool     positions to learn from: a token follows that is trained on
        target_ids, target_logprobs, logsumexp, tail_logprob      [B, L, ...] as in a sample, 0 in padding
        next_logprob, sampled_logprob   [B, L] float32, 0 outside the loss_mask

    What a sample lacks, the batch lacks too.

    Position t of each array is about the token that follows input_ids[:, t]: nothing has to be shifted.
    """
    lengths = [len(sample["tokens"]) for sample in samples]
    shape = (len(samples), max(lengths))
    batch = Batch(
        sample=torch.tensor([sample["sample"] for sample in samples]),
        input_ids=torch.zeros(shape, dtype=torch.int64),
        next_tokens=torch.full(shape, -1),
        loss_mask=torch.zeros(shape, dtype=torch.bool),
    )
    targets = [name for name in _TARGETS if all(name in sample for sample in samples)]
    k = max(sample["target_ids"].shape[1] for sample in samples)
    for name in targets:
        dtype = torch.int64 if name == "target_ids" else torch.float32
        width = k if name.startswith("target_") else samples[0][name].shape[1]
        batch[name] = torch.zeros((*shape, width), dtype=dtype)
    of_next = [name for name in _OF_NEXT if all(name in sample for sample in samples)]
    batch.update({name: torch.zeros(shape) for name in of_next})
    for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        batch["input_ids"][row, :length] = sample["tokens"]
        batch["next_tokens"][row, : length - 1] = sample["tokens"][1:]
        batch["loss_mask"][row, : length - 1] = sample["loss_mask"][:-1] if "loss_mask" in sample else True
        for name in targets:
            batch[name][row, :length] = _widened(name, sample[name], batch[name].shape[2])
        for name in of_next:
            batch[name][row, :length] = sample[name]
    for name in of_next:
        batch[name].masked_fill_(~batch["loss_mask"], 0)
    return batch


def _widened(name: str, values: Tensor, width: int) -> Tensor:
    """[T, K] as [T, width] where `name` is target_ids or target_logprobs; all other values as they are.

    What is added is no id, and tells no more of the method than the row did: by a last log-probability of NaN a row of
    samples is known.
    """
    missing = width - values.shape[1]
    if missing <= 0 or not name.startswith("target_"):
        return values
    none = values.new_full((), -1) if name == "target_ids" else values[:, -1:].clone()
    if name == "target_logprobs":
        none = none.masked_fill(~none.isnan(), -torch.inf)
    return torch.cat([values, none.expand(len(values), missing)], dim=1)
