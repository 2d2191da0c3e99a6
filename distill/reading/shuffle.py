"""Samples of one or several stores in random order, for a DataLoader with any number of workers, on any ranks.

1. permute  the pieces of a store, by (seed, epoch): its blocks, or 65,536 rows each of larger blocks
2. split    the samples, in that order, into equal runs: one for each worker of each rank. A run may begin or end inside
            a piece, so that the lengths of runs differ by one sample at most
3. window   each run reads a few pieces at a time, and shuffles the samples of these pieces
4. batch    in that order. All runs make the same number of batches; a run that is too short adds an empty batch

Of several stores each is permuted and windowed by itself, and they take turns: see `shares`. So every run, and every
few batches of it, have each store's share. The pieces of a window are shared out by what an epoch reads of each store.

Everything follows from (seed, epoch, ranks, workers): an epoch is resumed in its middle by arithmetic, not by replay.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from distill.errors import ConfigError
from distill.reading.index import Index
from distill.reading.samples import Batch, RowReader, Rows, Sample, View, as_stored, collate
from distill.reading.shares import first_turns, of_epoch, take_turns, within


@dataclass(frozen=True, eq=False)
class Part:
    """What batches are made of, or the part of it that one of several stores has.

    index: which samples of the store, in its order
    count: how many of them an epoch has; the next one goes on with others
    seed:  gives which ones these are
    view:  how its samples look beside those of other stores
    """

    reader: RowReader
    index: Index
    count: int
    seed: tuple[int, ...] = ()
    view: View = View()

    @property
    def read_at_once(self) -> NDArray[np.int64]:
        """[P, 2]: the samples of each piece, as the range of their positions in the index."""
        return self.index.pieces(self.reader.store.block_rows)

    def of_epoch(self, epoch: int) -> NDArray[np.int64]:
        """[P, 2]: the samples of an epoch, as such ranges, each within a piece, in the order of the store."""
        return of_epoch(self.read_at_once, self.count, epoch, self.seed)

    def sample(self, position: int, first_row: int, rows: Rows) -> Sample:
        """The sample at a position of the index, out of rows of the store from `first_row` on."""
        start, stop = self.index.rows(position)
        found = {name: values[start - first_row : stop - first_row] for name, values in rows.items()}
        return self.view.of(as_stored(self.index.number(position), found))


class ShuffledBatches(IterableDataset[Batch]):
    """Batches for ``DataLoader(batches, batch_size=None, num_workers=...)``, or to iterate over directly.

    A batch is what `collate` makes. Each sample comes once per epoch over all ranks and workers, and every rank gets
    the same number of batches.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        nothing: Sample,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        window_blocks: int,
    ) -> None:
        """nothing: the sample of an empty batch."""
        self._parts, self._nothing = list(parts), nothing
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
        if self._resumed is not None:  # and not iterated yet
            return dict(self._resumed)
        epoch, batch = self._started or map(int, self._where)
        return {"epoch": epoch, "batch": batch, "taken": self._taken}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Let the next iteration in this process, the same worker of as many, begin where `state_dict` was."""
        self._resumed = dict(state)

    def batches_per_epoch(self, num_workers: int) -> int:
        """The batches that each rank gets in an epoch, with so many DataLoader workers (0: none)."""
        return max(1, num_workers) * self._batches_per_run(max(1, num_workers))

    def _batches_per_run(self, num_workers: int) -> int:
        longest_run = -(-sum(part.count for part in self._parts) // (self._world_size * num_workers))
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
        for _ in range(skipped, self._batches_per_run(num_workers)):
            found = list(islice(samples, self._batch_size))
            self._taken += 1
            yield collate(found or [self._nothing])

    def _samples(self, epoch: int, run: int, num_runs: int, skip: int) -> Iterator[Sample]:
        """The samples of one run after its first `skip`, which are not read."""
        counts = [part.count for part in self._parts]
        begin, end = (sum(counts) * at // num_runs for at in (run, run + 1))
        now = min(begin + skip, end)
        places = [first_turns(counts, turn) for turn in (begin, end, now)]
        bounds = zip(*places, self._window_pieces(), strict=True)
        streams = [self._of_part(number, epoch, run, *bound) for number, bound in enumerate(bounds)]
        for number in islice(take_turns(counts, now), end - now):
            yield next(streams[number])

    def _window_pieces(self) -> list[int]:
        """The pieces that a run reads of each part at a time."""
        read = [len(part.read_at_once) * part.count / max(1, len(part.index)) for part in self._parts]
        return [max(1, int(self._window_blocks * (pieces / sum(read)))) for pieces in read]

    def _of_part(
        self, number: int, epoch: int, run: int, begin: int, end: int, now: int, window_pieces: int
    ) -> Iterator[Sample]:
        """The samples of one part in one run: of those that an epoch has, in its order, [begin, end), from `now` on."""
        part, pieces, skip = self._parts[number], self._pieces(number, epoch, begin, end), now - begin
        for window, at in enumerate(range(0, len(pieces), window_pieces)):
            spans = pieces[at : at + window_pieces]
            counts = spans[:, 1] - spans[:, 0]
            if skip >= counts.sum():
                skip -= int(counts.sum())
                continue
            order = self._random(number, epoch, run, window).permutation(counts.sum())[skip:]
            skip = 0
            rows = [(part.index.rows(int(start))[0], part.index.rows(int(stop) - 1)[1]) for start, stop in spans]
            loaded = part.reader.read_several(rows)
            piece_of = np.repeat(np.arange(len(spans)), counts)
            positions = np.concatenate([np.arange(start, stop) for start, stop in spans])
            for i in order:
                yield part.sample(int(positions[i]), rows[piece_of[i]][0], loaded[piece_of[i]])

    def _pieces(self, number: int, epoch: int, begin: int, end: int) -> NDArray[np.int64]:
        """[P, 2]: [begin, end) of a part's samples in the epoch's order, as ranges of positions within its pieces."""
        pieces = self._parts[number].of_epoch(epoch)
        return within(pieces[self._random(number, epoch).permutation(len(pieces))], begin, end)

    def _random(self, number: int, *what: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *what, *[number] * (number > 0)])  # the first is as one alone
