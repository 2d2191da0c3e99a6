"""Samples of a store in random order, for a DataLoader with any number of workers, on any number of ranks.

1. permute  the pieces of the store, by (seed, epoch): its blocks, or 65,536 rows each of larger blocks
2. split    the samples, in that order, into equal runs: one for each worker of each rank. A run may begin or end inside
            a piece, so that the lengths of runs differ by one sample at most
3. window   each run reads a few pieces at a time, and shuffles the samples of these pieces
4. batch    in that order. All runs make the same number of batches; a run that is too short adds an empty batch

Everything follows from (seed, epoch, ranks, workers): an epoch is resumed in its middle by arithmetic, not by replay.
"""

import sys
from collections.abc import Iterator, Mapping
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from distill.errors import ConfigError
from distill.reading.index import Index
from distill.reading.samples import Batch, RowReader, Rows, Sample, as_stored, collate, empty_sample


class ShuffledBatches(IterableDataset[Batch]):
    """Batches for ``DataLoader(batches, batch_size=None, num_workers=...)``, or to iterate over directly.

    A batch is what `collate` makes. Each sample comes once per epoch over all ranks and workers, and every rank gets
    the same number of batches.
    """

    def __init__(
        self,
        reader: RowReader,
        index: Index,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        window_blocks: int,
    ) -> None:
        self._reader, self._index = reader, index
        self._batch_size, self._seed, self._window_blocks = batch_size, seed, window_blocks
        self._rank, self._world_size = rank, world_size
        self._started: tuple[int, int] | None = None  # epoch and batch, in this process
        self._taken = 0  # batches since then
        self._resumed: dict[str, int] | None = None
        # Shared, so that DataLoader workers that live for several epochs see what set_epoch says.
        self._where = torch.zeros(2, dtype=torch.long).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int, batch: int = 0) -> None:
        """Let the next iteration begin with this rank's batch number `batch` of the epoch.

        Raises ConfigError where accelerate calls it, whose loaders do so as each epoch begins.
        """
        if sys._getframe(1).f_globals.get("__name__", "").split(".")[0] == "accelerate":
            raise ConfigError(
                "accelerator.prepare: expected no loader of ShuffledBatches, found one: accelerate would share out "
                "again what is the rank's own already, and lose the rest. Give rank and world_size to "
                "TeacherCache.shuffled, prepare model and optimizer only, and move batches to accelerator.device"
            )
        self._where.copy_(torch.tensor([epoch, batch]))
        self._started, self._taken, self._resumed = None, 0, None

    def state_dict(self) -> dict[str, int]:
        """Where the iteration in this process is: for torchdata's StatefulDataLoader, which asks in each worker."""
        epoch, batch = self._started or map(int, self._where)
        return {"epoch": epoch, "batch": batch, "taken": self._taken}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Let the next iteration in this process, the same worker of as many, begin where `state_dict` was."""
        self._resumed = dict(state)

    def batches_per_epoch(self, num_workers: int) -> int:
        """The batches that each rank gets in an epoch, with so many DataLoader workers (0: none)."""
        return max(1, num_workers) * self._batches_per_run(max(1, num_workers))

    def _batches_per_run(self, num_workers: int) -> int:
        longest_run = -(-len(self._index) // (self._world_size * num_workers))
        return -(-longest_run // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        epoch, done = map(int, self._where)
        taken = 0
        if self._resumed is not None:
            (epoch, done, taken), self._resumed = (self._resumed[name] for name in ("epoch", "batch", "taken")), None
        self._started, self._taken = (epoch, done), taken
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        # A DataLoader takes a batch of each worker in turn, beginning with worker 0, also in the middle of an epoch.
        turn = (worker + done) % num_workers
        skipped = (done - turn + num_workers - 1) // num_workers + taken
        run = self._rank * num_workers + turn
        samples = self._samples(epoch, run, self._world_size * num_workers, skipped * self._batch_size)
        attributes = self._reader.store.attributes
        for _ in range(skipped, self._batches_per_run(num_workers)):
            found = list(islice(samples, self._batch_size))
            nothing = [empty_sample(attributes["k"], len(attributes["temperatures"]))]
            self._taken += 1
            yield collate(found or nothing)

    def _samples(self, epoch: int, run: int, num_runs: int, skip: int) -> Iterator[Sample]:
        """The samples of one run after its first `skip`, which are not read."""
        pieces = self._pieces(epoch, run, num_runs)
        for window, at in enumerate(range(0, len(pieces), self._window_blocks)):
            spans = pieces[at : at + self._window_blocks]
            counts = spans[:, 1] - spans[:, 0]
            if skip >= counts.sum():
                skip -= int(counts.sum())
                continue
            order = np.random.default_rng([self._seed, epoch, run, window]).permutation(counts.sum())[skip:]
            skip = 0
            rows = [(self._index.rows(int(start))[0], self._index.rows(int(stop) - 1)[1]) for start, stop in spans]
            loaded = self._reader.read_several(rows)
            piece_of = np.repeat(np.arange(len(spans)), counts)
            positions = np.concatenate([np.arange(start, stop) for start, stop in spans])
            for i in order:
                yield self._sample(int(positions[i]), rows[piece_of[i]][0], loaded[piece_of[i]])

    def _pieces(self, epoch: int, run: int, num_runs: int) -> NDArray[np.int64]:
        """[P, 2]: the run's samples in the epoch's order, as ranges of positions in the index, each within a piece."""
        pieces = self._index.pieces(self._reader.store.block_rows)
        pieces = pieces[np.random.default_rng([self._seed, epoch]).permutation(len(pieces))]
        counts = pieces[:, 1] - pieces[:, 0]
        ends = np.cumsum(counts)  # of the pieces, in the permuted sequence of samples
        begin, end = (len(self._index) * at // num_runs for at in (run, run + 1))
        left = np.clip(begin - (ends - counts), 0, counts)  # samples of a piece that are before this run, and after it
        right = np.clip(ends - end, 0, counts)
        mine = left + right < counts
        return np.stack([pieces[mine, 0] + left[mine], pieces[mine, 1] - right[mine]], axis=1)

    def _sample(self, position: int, first_row: int, rows: Rows) -> Sample:
        start, stop = self._index.rows(position)
        found = {name: values[start - first_row : stop - first_row] for name, values in rows.items()}
        return as_stored(self._index.number(position), found)
