"""Samples out of a store, checked, and several of them as one batch.

T tokens of a sample, K kept ids, n temperatures, B rows of a batch, L tokens of a row.

A sample is a dict of tensors; row t of each is about token t, and speaks of token t + 1:

    sample          int      its number in the store
    tokens          [T]      int64
    topk_ids        [T, K]   int64, by descending probability
    topk_logprobs   [T, K]   float32, at temperature 1
    logsumexp       [T, n]   float32
    tail_logprob    [T, n]   float32
    loss_mask       [T]      bool, with chat data only: the next token was written by the assistant
"""

import math
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from distill.errors import StoreError
from distill.store import Store

Sample = dict[str, Any]
Rows = dict[str, NDArray[Any]]
Batch = dict[str, Tensor]

_ROW_ARRAYS = ("tokens", "topk_ids", "topk_logprobs", "logsumexp", "tail_logprob", "loss_mask")
_TARGETS = ("topk_ids", "topk_logprobs", "logsumexp", "tail_logprob")
_CHUNKS_KEPT = 4


class RowReader:
    """Rows of a store, whole inner chunks at a time, opened where they are needed: in the process that reads."""

    def __init__(self, path: str, options: Mapping[str, Any]) -> None:
        self.path, self._options = path, dict(options)
        self._open()

    def _open(self) -> None:
        store = Store.open(self.path, self._options)
        if store is None or not store.published:
            raise StoreError(f"store.path: found no store at {self.path}")
        self._store, self._process = store, os.getpid()
        there = store.array_names()
        self._names = [name for name in _ROW_ARRAYS if name in there]
        self._committed: set[int] = set()
        self._chunks: OrderedDict[int, Rows] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    @property
    def store(self) -> Store:
        """The store, opened in this process."""
        if self._process != os.getpid():
            if "://" in self.path:  # the client's threads did not survive the fork, and would be waited for
                raise StoreError(
                    f"{self.path} cannot be read after a fork: give the DataLoader multiprocessing_context='forkserver'"
                )
            self._open()
        return self._store

    def read(self, start: int, stop: int) -> Rows:
        """All arrays of the rows [start, stop), which lie in one block.

        Raises StoreError where a checksum is wrong or the block is not committed.
        """
        store = self.store
        block = start // store.block_rows
        if block not in self._committed:
            if store.read_rows("commits", block, block + 1)[0] < 0:
                raise StoreError(f"{self.path}: block {block} is not there (it has no commit)")
            self._committed.add(block)
        return {name: store.read_rows(name, start, stop) for name in self._names}

    def read_sample(self, start: int, stop: int) -> Rows:
        """Like `read`, for one sample, with the last few inner chunks kept for the next."""
        size = min(self.store.inner_rows, self.store.block_rows)
        parts = []
        for chunk in range(start // size, (stop - 1) // size + 1):
            if chunk not in self._chunks:
                self._chunks[chunk] = self.read(chunk * size, (chunk + 1) * size)
                if len(self._chunks) > _CHUNKS_KEPT:
                    self._chunks.popitem(last=False)
            self._chunks.move_to_end(chunk)
            first = chunk * size
            parts.append({k: v[max(start - first, 0) : stop - first] for k, v in self._chunks[chunk].items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def as_stored(number: int, rows: Rows, where: str) -> Sample:
    """The rows of one sample as tensors of the store's own dtypes, which are half as large; collate widens them.

    Raises StoreError where rows that should be in use hold fill values: a chunk is missing.
    """
    if (rows["tokens"] < 0).any() or np.isnan(rows["logsumexp"]).any():
        raise StoreError(f"{where}: sample {number} has empty rows: a chunk is missing, the store is damaged")
    return {"sample": number, **{name: torch.from_numpy(values) for name, values in rows.items()}}


def to_sample(number: int, rows: Rows, where: str) -> Sample:
    """The same with the dtypes above."""
    sample = as_stored(number, rows, where)
    for name in rows:
        if name != "loss_mask":
            sample[name] = sample[name].float() if sample[name].is_floating_point() else sample[name].long()
    return sample


def empty_sample(k: int, num_temperatures: int) -> Sample:
    """A sample of one token without a next one, number -1: what a rank gets that has run short. Nothing is learnt."""
    sample: Sample = {"sample": -1, "tokens": torch.zeros(1, dtype=torch.long)}
    sample["topk_ids"] = torch.zeros((1, k), dtype=torch.long)
    sample["topk_logprobs"] = torch.zeros((1, k))
    sample["logsumexp"] = sample["tail_logprob"] = torch.zeros((1, num_temperatures))
    return sample


def collate(samples: Sequence[Sample], packed: bool = False) -> Batch:
    """Several samples as one batch: a row each, padded on the right, or packed end to end into few rows.

        sample          [B'] int64      the samples' numbers (B' samples, B rows; -1: an empty batch)
        input_ids       [B, L] int64
        position_ids    [B, L] int64    0, 1, 2, ... anew for each sample. With them and no attention_mask,
                                        transformers keeps packed samples from seeing each other
        next_tokens     [B, L] int64    the token that follows, the label of this row; -1 where none does
        loss_mask       [B, L] bool     rows to learn from: a token follows, in chats the assistant's
        topk_ids, topk_logprobs, logsumexp, tail_logprob      [B, L, ...] as in a sample, 0 in padding

    Row t of each array is about the token that follows input_ids[:, t]: nothing needs shifting.
    """
    lengths = [len(sample["tokens"]) for sample in samples]
    longest = max(lengths)
    rows = _pack(lengths, longest) if packed else [[i] for i in range(len(samples))]
    shape = (len(rows), longest)
    batch: Batch = {
        "sample": torch.tensor([sample["sample"] for sample in samples]),
        "input_ids": _zeros(shape, torch.int64),
        "position_ids": _zeros(shape, torch.int64),
        "next_tokens": _zeros(shape, torch.int64).fill_(-1),
        "loss_mask": _zeros(shape, torch.bool),
    }
    for name in _TARGETS:
        dtype = torch.int64 if name == "topk_ids" else torch.float32
        batch[name] = _zeros((*shape, samples[0][name].shape[1]), dtype)
    for row, members in enumerate(rows):
        start = 0
        for sample, length in ((samples[i], lengths[i]) for i in members):
            stop = start + length
            batch["input_ids"][row, start:stop] = sample["tokens"]
            batch["position_ids"][row, start:stop] = torch.arange(length)
            batch["next_tokens"][row, start : stop - 1] = sample["tokens"][1:]
            batch["loss_mask"][row, start : stop - 1] = sample["loss_mask"][:-1] if "loss_mask" in sample else True
            for name in _TARGETS:
                batch[name][row, start:stop] = sample[name]
            start = stop
        batch["position_ids"][row, start:] = torch.arange(longest - start)  # padding counts as one more sample
    return batch


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros; in a DataLoader's worker already in shared memory, to which they would be copied otherwise."""
    if get_worker_info() is None:
        return torch.zeros(shape, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)  # new pages are zeros


def _pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The samples of each row: the longest first, each into the first row with room (first-fit decreasing)."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row, left in enumerate(room) if left >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows
