"""What each step costs with 10^8 samples and 10^11 tokens, by simulation.

    python -m tests.benchmarks.scale [samples=100000000] [rows=1]

Samples of 500 to 1500 tokens. The store has its metadata, its sample table and its commits; rows are not written: the
teacher says nothing, and readers get made-up rows. Each step runs in a process of its own: its time, its CPU time,
which other work on the machine disturbs less, and its peak memory beyond what the imports take, what is shared with
other processes included. Gathering and writing tokens are measured on less. rows=0 leaves out the last step, which
writes and reads 2^20 real rows in blocks of two sizes.
"""

import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distill.config.generate import GenerateConfig
from distill.data import plan
from distill.data.tokenize import Samples
from distill.errors import StoreError
from distill.reading.cache import some_examples
from distill.run.grid import Grid
from distill.store import schema
from distill.store.checksums import checksum
from distill.store.writable import WritableStore
from distill.teacher.choice import expected_bytes
from distill.teacher.placement import Placement
from distill.teacher.prepare import Job
from distill.teacher.worker import Worker
from tests.benchmarks.scale_readers import K, Row, complete, read_real_rows, readers, shuffled
from tests.support import planned_store

TABLE = "sample_start", "sample_length", "sample_index"


class Steps:
    """What is measured, for so many samples. Files in `scratch` are for the steps to come."""

    def __init__(self, scratch: Path, samples: int) -> None:
        self.scratch, self.samples = scratch, samples
        self.store = str(scratch / f"{samples}.zarr")

    def load(self, name: str) -> NDArray[Any]:
        """What an earlier step has saved."""
        found: NDArray[Any] = np.load(self.scratch / f"{name}.npy")
        return found

    def save(self, name: str, values: NDArray[Any]) -> None:
        """Keep it for a later step."""
        np.save(self.scratch / f"{name}.npy", values)

    # Planning, in worker 0

    def permute(self) -> tuple[str, Callable[[], Any]]:
        """permutation"""
        return "", lambda: plan.permutation(self.samples, 0)

    def choose_block_rows(self) -> tuple[str, Callable[[], Any]]:
        """auto_block_rows"""
        lengths = self.load("lengths")
        return f"{plan.auto_block_rows(lengths):,} rows", lambda: plan.auto_block_rows(lengths)

    def lay_out(self) -> tuple[str, Callable[[], Any]]:
        """lay_out"""
        lengths = self.load("lengths")
        rows = plan.auto_block_rows(lengths)
        layout = plan.lay_out(lengths, rows)
        self.save("starts", layout.starts)
        note = (
            f"{layout.num_blocks:,} blocks, {layout.num_rows / lengths.sum(dtype=np.int64) - 1:.3%} of rows are empty"
        )
        del layout
        return note, lambda: plan.lay_out(lengths, rows)

    def count_tokens(self) -> tuple[str, Callable[[], Any]]:
        """Plan.tokens_per_block"""
        lengths = self.load("lengths")
        layout = plan.Plan(plan.auto_block_rows(lengths), self.load("starts"), lengths)
        return "", layout.tokens_per_block

    def write_table(self) -> tuple[str, Callable[[], Any]]:
        """the store with its sample table, flushed"""
        arrays = self.load("starts"), self.load("lengths"), np.arange(self.samples)
        return "", lambda: create(self.store, *arrays)

    def commit(self) -> tuple[str, Callable[[], Any]]:
        """commits of all blocks but every hundredth"""
        store = opened(self.store)
        blocks = [block for block in range(store.num_blocks) if block % 100]

        def write() -> None:
            for block in blocks:
                store._arrays["commits"][block] = 1

        return f"{len(blocks):,} commits; all workers together", write

    # Dealing and resuming

    def find_missing(self) -> tuple[str, Callable[[], Any]]:
        """resume: which blocks are missing"""
        store = opened(self.store)
        return f"{store.num_blocks:,} blocks", store.missing_blocks

    def count_done(self) -> tuple[str, Callable[[], Any]]:
        """resume: tokens done and the longest sample, from the sample table"""
        store = opened(self.store)
        store.missing_blocks = lambda: list(range(0, store.num_blocks, 100))  # type: ignore[method-assign]
        return "", lambda: Job.of(Placement(), store)

    def deal(self) -> tuple[str, Callable[[], Any]]:
        """resume: the note to the workers, and the blocks of one of 1, 64, 1024"""
        store = opened(self.store)
        job = Job(Placement(), store, list(range(store.num_blocks)), 0, 0)

        def share() -> None:
            missing = Job.of_note(job.note(), store).missing
            for workers in (1, 64, 1024):
                mine = Grid(rank=workers - 1, world_size=workers).deal(missing)
                assert len(mine) in (len(missing) // workers, len(missing) // workers + 1)

        random = np.flatnonzero(np.random.default_rng(0).random(store.num_blocks) < 0.5).tolist()
        longest = len(Job(Placement(), store, random, 0, 0).note())
        return f"all missing: a note of {len(job.note()):,} bytes; half of them, at random: {longest:,}", share

    def work(self) -> tuple[str, Callable[[], Any]]:
        """a worker: open the store, and do a block with a teacher that says nothing"""
        teacher: Any = SimpleNamespace(capture=lambda *_: None, captures=False, rope_switch=None, close=lambda: None)
        other: Any = SimpleNamespace(beat=lambda: None)

        def run() -> None:
            store = opened(self.store)
            block = store.num_blocks // 3
            Worker(GenerateConfig(), store, teacher, other, other, store.num_blocks, [block]).work()

        store = opened(self.store)
        return f"{self.samples:,} samples, {store.block_rows:,} rows a block, K {K}", run

    # Reading

    def open_cache(self) -> tuple[str, Callable[[], Any]]:
        """TeacherCache: open, count tokens, find the longest, check"""

        def run() -> None:
            cache = complete(self.store)
            assert cache.num_tokens > 0
            assert cache.max_length <= 1500
            cache.check_trained("to train on")

        return f"its index has {12 * self.samples / 2**20:,.0f} MiB", run

    def split(self) -> tuple[str, Callable[[], Any]]:
        """split"""
        cache = complete(self.store)
        return "1,000 samples held out; the index is there already", lambda: cache.split(1000)

    def choose_examples(self) -> tuple[str, Callable[[], Any]]:
        """the same, of examples with two windows each"""
        source = np.arange(self.samples) // 2
        return "the choice alone", lambda: some_examples(source, 1000, 0)

    def start_epoch(self) -> tuple[str, Callable[[], Any]]:
        """shuffled: an epoch's order, of 1 of 64 ranks"""
        cache = complete(self.store)
        batches, run = shuffled(cache, world_size=64), (len(cache) * 5 // 64, len(cache) * 6 // 64)
        return f"{len(batches._pieces(0, 0, *run)):,} pieces", lambda: batches._pieces(0, 1, *run)

    def first_batch(self) -> tuple[str, Callable[[], Any]]:
        """shuffled: the first batch"""
        batches = shuffled(complete(self.store))
        return "made-up rows", lambda: next(iter(batches))

    def resumed_batch(self) -> tuple[str, Callable[[], Any]]:
        """shuffled: the first batch in the middle of an epoch"""
        batches = shuffled(complete(self.store))
        batches.set_epoch(3, batches.batches_per_epoch(0) // 2)
        return "made-up rows", lambda: next(iter(batches))

    def find_samples(self) -> tuple[str, Callable[[], Any]]:
        """random access: where 100,000 samples are"""
        index = complete(self.store).split(1000)[0]._index
        numbers = np.random.default_rng(0).integers(len(index), size=100_000).tolist()
        return "in the larger part of a split", lambda: sum(index.rows(i)[0] for i in numbers)


def create(path: str, starts: NDArray[Any], lengths: NDArray[Any], source: NDArray[Any], rows: int = 0) -> None:
    """A store without rows. rows: of a block, else chosen as ever."""
    rows = rows or plan.auto_block_rows(lengths)
    layout = plan.Plan(rows, starts, lengths)
    store = planned_store(Path(path), layout, source, k=K)
    # there are no shards of tokens: they read as fill values
    store._plan_checksums[:] = checksum(np.full(store.inner_rows, -1, np.int32), store.seed)
    store.publish()


def opened(path: str) -> WritableStore:
    """The store, to be written."""
    store = WritableStore.open(path, {})
    assert store is not None
    return store


def memory(name: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def in_child(pipe: Any, steps: Steps, name: str) -> None:
    """Run a step and send what it took."""
    torch.set_num_threads(1)
    note, body = getattr(steps, name)()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, began, worked = memory("VmRSS"), time.perf_counter(), time.process_time()
    kept = body()
    seconds, worked = time.perf_counter() - began, time.process_time() - worked
    pipe.send((seconds, worked, memory("VmHWM") - before, note))
    del kept


def measure(steps: Steps, name: str) -> Row:
    """A step in a process of its own, which has read beforehand what the step is given."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=in_child, args=(there, steps, name))
    child.start()
    there.close()
    seconds, worked, peak, note = here.recv()
    child.join()
    return (getattr(Steps, name).__doc__ or "").strip(), seconds, worked, peak, note


def gather() -> str:
    """Samples.take, as the plan calls it: tokens per second out of 200 million."""
    random = np.random.default_rng(0)
    lengths = random.integers(500, 1501, 200_000).astype(np.int32)
    ends = np.cumsum(lengths, dtype=np.int64)
    with tempfile.TemporaryFile() as file:
        np.arange(ends[-1], dtype=np.int32).tofile(file)
        file.flush()
        samples = Samples(lengths, np.arange(len(lengths)), ends, {"tokens": np.memmap(file, np.int32, "r")})
        order = random.permutation(len(lengths))
        rates = []
        for first in range(0, len(order) - 1000, 1000):
            began = time.perf_counter()
            count = len(samples.take(order[first : first + 1000])["tokens"])
            rates.append(count / (time.perf_counter() - began))
    rate = statistics.median(rates) / 1e6
    return f"Samples.take: {rate:,.0f} million tokens/s, out of 200 million in the page cache"


def write_tokens(scratch: Path) -> str:
    """Seconds to write the tokens of a block."""
    rows = schema.INNER_ROWS * 128
    lengths = np.full(10 * rows // 1024, 1024, np.int32)
    layout = plan.lay_out(lengths, rows)
    create(str(scratch / "tokens.zarr"), layout.starts, lengths, np.arange(len(lengths)), rows)
    store = opened(str(scratch / "tokens.zarr"))
    store._begin_plan()
    values = (49152 ** np.random.default_rng(0).random(rows) - 1).astype(np.int32)
    seconds = []
    for block in range(store.num_blocks):
        began = time.perf_counter()
        store.write_rows("tokens", block, values)
        seconds.append(time.perf_counter() - began)
    return f"tokens of a block of {rows:,} rows written: {statistics.median(seconds):.3f} s (not flushed)"


def budget(samples: int) -> list[str]:
    """Files and bytes of a store of K 64 and 1000 tokens a sample, for blocks of two sizes."""
    tokens = samples * 1000
    lines = [
        "| rows of a block | blocks | files at most | MiB of a block | MiB in a worker |",
        "|---|---|---|---|---|",
    ]
    for rows in (65536, plan.auto_block_rows(np.broadcast_to(np.int32(1000), samples))):
        blocks = -(-tokens // (rows - 500))
        files = blocks * (8 + 2) + 3 * -(-samples // (1 << 20))
        size = rows * expected_bytes("topk", K, 49152, 1, "portable") / 2**20
        held = 2 * rows * (6 * K + 6) / 2**20
        lines.append(f"| {rows:,} | {blocks:,} | {files:,} | {size:,.0f} | {held:,.0f} |")
    return lines


def main(arguments: list[str]) -> None:
    """Print the tables."""
    given = {"samples": 10**8, "rows": 1}
    given |= {name: int(value) for name, value in (argument.split("=") for argument in arguments)}
    count = given["samples"]
    scratch = Path(tempfile.mkdtemp())
    steps, fewer = Steps(scratch, count), Steps(scratch, max(10_000, count // 100))
    steps.save("lengths", np.random.default_rng(0).integers(500, 1501, count).astype(np.int32))
    try:
        print(f"{count:,} samples, {os.cpu_count()} cores, Python {platform.python_version()}, NumPy {np.__version__}")
        print("\n| step | seconds | CPU seconds | peak MiB | |\n|---|---|---|---|---|")

        def show(row: Row) -> None:
            print(f"| {row[0]} | {row[1]:,.2f} | {row[2]:,.2f} | {row[3]:,.0f} | {row[4]} |", flush=True)

        for name in ("permute", "choose_block_rows", "lay_out", "count_tokens", "write_table", "commit"):
            show(measure(steps, name))
        for name in ("find_missing", "count_done", "deal"):
            show(measure(steps, name))
        lengths = steps.load("lengths")[: fewer.samples]
        rows = opened(steps.store).block_rows
        layout = plan.lay_out(lengths, rows)
        create(fewer.store, layout.starts, lengths, np.arange(len(lengths)), rows)
        show(measure(fewer, "work"))
        show(measure(steps, "work"))
        for name in ("open_cache", "split", "choose_examples", "start_epoch", "first_batch", "resumed_batch"):
            show(measure(steps, name))
        show(measure(steps, "find_samples"))
        for row in readers(steps.store):
            show(row)
        print(f"\n{gather()}\n{write_tokens(scratch)}")
        if given["rows"]:
            print("\n".join(read_real_rows(scratch)))
        print("\n" + "\n".join(budget(count)))
    except StoreError as error:
        raise SystemExit(f"error: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
