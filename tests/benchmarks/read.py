"""Tokens per second out of a DataLoader: a store beside the same samples in other formats.

    python -m tests.benchmarks.read [rounds=5] [block_rows=65536]

Half a million made-up tokens, K = 64: samples of 50 to 1000 tokens, ids with Zipf's frequencies, log-probabilities that
fall with the rank, rounded as in a store. One epoch of batches of 8 with 2 DataLoader workers, starting them included:
the store in turn with each of the others, `rounds` times after one to warm up; medians of the ratios within a round.

store     TeacherCache(...).shuffled(8). Blocks of 65536 rows are what stores of 4 million to a billion tokens have
memmap    a file per array, read with np.memmap
hdf5      h5py: for each sample a group of datasets with gzip
lists     Hugging Face datasets: a row per sample, [T, K] as lists of lists, read as NumPy arrays. Only for an eighth of
          the epoch, being slow
flat      the same, but [T, K] as one list of T * K numbers that is reshaped after reading

All hold the same values in the same dtypes, and give the same batches, those of the store's epoch, by the same collate:
the first is compared. All files are in the page cache, which favours the large ones. Tokens per CPU second (of all
three processes) are given too: what else the machine does disturbs them less.
"""

import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from distill import TeacherCache, collate
from distill.data import plan
from distill.reading.samples import Batch, Rows, Sample
from distill.store import schema
from distill.store.writable import WritableStore
from distill.teacher.capture import as_float16, round_logprobs

K, VOCABULARY, BATCH, TOKENS = 64, 49152, 8, 500_000
ARRAYS = ("tokens", *schema.CAPTURED)


def zipf(random: np.random.Generator, *shape: int) -> NDArray[np.int32]:
    """Ids, of which v has a frequency of about 1 / (v + 1)."""
    return (VOCABULARY ** random.random(shape) - 1).astype(np.int32)


def made_up(random: np.random.Generator, num_rows: int) -> Rows:
    """Rows that compress about as well as a teacher's."""
    tail = random.uniform(0.01, 0.3, (num_rows, 1))
    falling = -np.cumsum(random.exponential(1.5, (num_rows, K)) / np.arange(1, K + 1), axis=1)
    logprobs = falling - np.log(np.exp(falling).sum(axis=1, keepdims=True)) + np.log1p(-tail)
    return {
        "tokens": zipf(random, num_rows),
        "target_ids": zipf(random, num_rows, K),
        "target_logprobs": round_logprobs(logprobs.astype(np.float32)),
        "logsumexp": random.normal(20, 3, (num_rows, 1)).astype(np.float32),
        "tail_logprob": round_logprobs(np.log(tail).astype(np.float32)),
        "next_logprob": as_float16(-random.exponential(2.5, num_rows).astype(np.float32)),
    }


def write_store(path: Path, block_rows: int) -> list[Rows]:
    """A complete store; the samples that are in it."""
    random = np.random.default_rng(0)
    layout = plan.lay_out(random.integers(50, 1001, TOKENS // 525).astype(np.int32), block_rows)
    store = WritableStore.create(
        str(path),
        {},
        attributes={
            "method": "topk",
            "k": K,
            "fingerprint": "made up",
            "temperatures": [1.0],
            "block_rows": block_rows,
            "num_blocks": layout.num_blocks,
            "num_samples": len(layout.lengths),
        },
        planned=["tokens"],
        codec="portable",
    )
    store.write_all("sample_start", layout.starts)
    store.write_all("sample_length", layout.lengths)
    store.write_all("sample_index", np.arange(len(layout.lengths)))
    drawn = [made_up(random, int(used)) for used in layout.tokens_per_block()]
    for block, rows in enumerate(drawn):
        store.write_rows("tokens", block, rows["tokens"])
    store.publish()
    samples = []
    for block, rows in enumerate(drawn):
        for name in schema.CAPTURED:
            store.write_rows(name, block, rows[name])
        store.commit(block, len(rows["tokens"]))
        ends = np.cumsum([layout.lengths[i] for i in layout.samples_of(block)])[:-1]
        parts = {name: np.split(values, ends) for name, values in rows.items()}
        samples += [dict(zip(parts, sample, strict=True)) for sample in zip(*parts.values(), strict=True)]
    store.mark_complete()
    return samples


class Samples(Dataset[Sample]):
    """Samples by number, out of files that each process opens for itself."""

    def __init__(self, path: Path) -> None:
        self.path, self._process = path, -1

    def __getitem__(self, i: int) -> Sample:
        if self._process != os.getpid():
            self._process = os.getpid()
            self.open()
        return {"sample": i, **{name: torch.from_numpy(values) for name, values in self.rows(i).items()}}

    def write(self, samples: list[Rows]) -> None:
        """Create the files."""
        raise NotImplementedError

    def open(self) -> None:
        """Open them."""
        raise NotImplementedError

    def rows(self, i: int) -> Rows:
        """The arrays of one sample."""
        raise NotImplementedError


class Memmap(Samples):
    """A file per array, and one of offsets. Nothing is read or copied before collate does."""

    def write(self, samples: list[Rows]) -> None:
        """Create the files."""
        self.path.mkdir()
        np.save(self.path / "offsets.npy", np.cumsum([0, *(len(rows["tokens"]) for rows in samples)]))
        for name in ARRAYS:
            np.save(self.path / f"{name}.npy", np.concatenate([rows[name] for rows in samples]))

    def open(self) -> None:
        """Map them."""
        self._offsets = np.load(self.path / "offsets.npy")
        self._arrays = {name: np.load(self.path / f"{name}.npy", mmap_mode="c") for name in ARRAYS}

    def rows(self, i: int) -> Rows:
        """Slices of the maps."""
        return {name: values[self._offsets[i] : self._offsets[i + 1]] for name, values in self._arrays.items()}


class HDF5(Samples):
    """A group per sample: no other sample's rows are decompressed with it."""

    def write(self, samples: list[Rows]) -> None:
        """Create the file."""
        with h5py.File(self.path, "w") as file:
            for i, rows in enumerate(samples):
                for name, values in rows.items():
                    file.create_dataset(f"{i}/{name}", data=values, chunks=values.shape, compression="gzip")

    def open(self) -> None:
        """Open it."""
        self._file = h5py.File(self.path, "r")

    def rows(self, i: int) -> Rows:
        """Decompressed."""
        return {name: values[:] for name, values in self._file[str(i)].items()}


class Lists(Samples):
    """Hugging Face datasets, a row per sample."""

    def write(self, samples: list[Rows]) -> None:
        """Create the folder."""
        names = {"tokens": "int32", "target_ids": "int32", "logsumexp": "float32"}
        columns = {name: self._column(name, datasets.Value(names.get(name, "float16"))) for name in ARRAYS}
        made = datasets.Dataset.from_generator(
            lambda: ({name: self._value(values) for name, values in rows.items()} for rows in samples),
            features=datasets.Features(columns),
            cache_dir=str(self.path / "cache"),
        )
        made.save_to_disk(str(self.path / "saved"))

    def open(self) -> None:
        """Map it."""
        self._dataset = datasets.load_from_disk(str(self.path / "saved")).with_format("numpy")

    def rows(self, i: int) -> Rows:
        """As the library gives them."""
        found: Rows = self._dataset[i]
        return found

    def _column(self, name: str, value: Any) -> Any:
        return datasets.List(value if name == "tokens" else datasets.List(value))

    def _value(self, values: NDArray[Any]) -> Any:
        return values


class Flat(Lists):
    """One list per array and sample, which Arrow gives as a NumPy array without a copy."""

    def rows(self, i: int) -> Rows:
        """Reshaped."""
        found = super().rows(i)
        length = len(found["tokens"])
        return {name: values if name == "tokens" else values.reshape(length, -1) for name, values in found.items()}

    def _column(self, name: str, value: Any) -> Any:
        return datasets.List(value)

    def _value(self, values: NDArray[Any]) -> Any:
        return values.reshape(-1)


def read(batches: Iterable[Batch]) -> tuple[list[list[int]], float, float]:
    """The samples of each batch; the seconds that the epoch took, and CPU seconds of this process and the workers."""
    began, cpu = time.perf_counter(), cpu_seconds()
    seen = [batch["sample"].tolist() for batch in batches]
    return seen, time.perf_counter() - began, cpu_seconds() - cpu


def cpu_seconds() -> float:
    """Of this process and of the workers that have ended."""
    both = (resource.getrusage(which) for which in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def main(arguments: list[str]) -> None:
    """Write the formats, run each pair in turn, print each round, then the medians."""
    given = {"rounds": 5, "block_rows": 65536}
    given |= {name: int(value) for name, value in (argument.split("=") for argument in arguments)}
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    scratch = Path(tempfile.mkdtemp())
    samples = write_store(scratch / "store", given["block_rows"])
    others: dict[str, Samples] = {
        kind.__name__.lower(): kind(scratch / kind.__name__) for kind in (Memmap, HDF5, Lists, Flat)
    }
    for other in others.values():
        other.write(samples)
    cache = TeacherCache(str(scratch / "store"))
    batches = cache.shuffled(BATCH)
    first = next(iter(batches))
    print(f"{len(cache)} samples, {cache.num_tokens:,} tokens, torch {torch.__version__}")
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in others}
    for number in range(given["rounds"] + 1):
        for name, other in others.items():
            if number == 0:
                found = collate([other[i] for i in first["sample"].tolist()])
                assert all(found[key].equal(values) for key, values in first.items()), name
            batches.set_epoch(number)
            order, *ours = read(DataLoader(batches, batch_size=None, num_workers=2))
            order = order[: len(order) // 8] if name == "lists" else order
            _, *theirs = read(DataLoader(other, batch_sampler=order, num_workers=2, collate_fn=collate))
            tokens = sum(len(samples[i]["tokens"]) for batch in order for i in batch)
            (our_speed, ours_by_cpu), (their_speed, theirs_by_cpu) = (
                [count / seconds for seconds in times] for count, times in ((cache.num_tokens, ours), (tokens, theirs))
            )
            if number > 0:
                ratios[name].append((our_speed / their_speed, ours_by_cpu / theirs_by_cpu))
                print(f"round {number}: store {our_speed:,.0f}, {name} {their_speed:,.0f} tokens/s", flush=True)
    for name, pairs in ratios.items():
        for what, of_rounds in zip(("tokens/s", "tokens per CPU second"), zip(*pairs, strict=True), strict=True):
            spread = f"from {min(of_rounds):.2f} to {max(of_rounds):.2f}"
            print(f"{what}: the store has {statistics.median(of_rounds):.2f}x {name} ({spread})")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main(sys.argv[1:])
