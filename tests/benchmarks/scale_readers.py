"""The part of `scale` that is about readers: the index that they share, and rows out of small and large blocks."""

import os
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from zarr.storage import LocalStore

from distill import TeacherCache
from distill.reading.samples import RowReader, Rows
from distill.reading.shuffle import ShuffledBatches
from tests.benchmarks import read

K, READERS = 64, 4
Row = tuple[str, float, float, float, str]
"""A line of the table: a step, its seconds, those of CPUs, its MiB, and what to know of it."""


def complete(path: str) -> TeacherCache:
    """The store as readers see it, as if all rows were there."""
    plain: Any = RowReader._open

    def opens(reader: RowReader) -> Any:
        found = plain(reader)
        found.store.attributes["complete"] = True
        return found

    setattr(RowReader, "_open", opens)  # noqa: B010
    return TeacherCache(path)


class MadeUpRows:
    """A reader that gives the same rows for every place."""

    path = "made up"

    def __init__(self, block_rows: int) -> None:
        self.store = SimpleNamespace(block_rows=block_rows)
        self._rows: Rows | None = None

    def read_several(self, spans: Sequence[tuple[int, int]]) -> list[Rows]:
        """As a reader does on a local disk."""
        return [self.read(*span) for span in spans]

    def read(self, start: int, stop: int) -> Rows:
        """Copies, as a reader's rows are."""
        if self._rows is None:
            some = 65536 + 1500
            self._rows = {
                "tokens": np.ones(some, np.int32),
                "target_ids": np.ones((some, K), np.int32),
                "target_logprobs": np.ones((some, K), np.float16),
                "logsumexp": np.ones((some, 1), np.float32),
                "tail_logprob": np.ones((some, 1), np.float16),
            }
        return {name: values[: stop - start].copy() for name, values in self._rows.items()}


def shuffled(cache: TeacherCache, world_size: int = 1) -> ShuffledBatches:
    """Batches of 8, out of made-up rows."""
    batches = cache.shuffled(8, world_size=world_size)
    made_up: Any = MadeUpRows(cache._reader.store.block_rows)
    batches._parts = [replace(part, reader=made_up) for part in batches._parts]
    return batches


def readers(store: str) -> list[Row]:
    """The readers of a DataLoader: until the first batch, and what of the index is not shared."""
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    cache = complete(store).split(1000)[0]
    rows: list[Row] = []
    for method in ("fork", "forkserver", "spawn"):
        batches = shuffled(cache)
        began, began_working = time.perf_counter(), time.process_time()
        loader = DataLoader(batches, batch_size=None, num_workers=READERS, multiprocessing_context=method)
        stream: Any = iter(loader)
        for _ in range(READERS):
            next(stream)
        seconds = time.perf_counter() - began
        private, mapped = zip(*(of_index(worker.pid) for worker in stream._workers), strict=True)
        note = f"the index of each has {max(mapped):,.0f} MiB, of which {max(private):,.0f} MiB are its own"
        worked = time.process_time() - began_working + sum(cpu_seconds(worker.pid) for worker in stream._workers)
        rows.append((f"{READERS} readers by {method}: their first batches", seconds, worked, max(private), note))
        del stream, loader
    return rows


def cpu_seconds(process: int) -> float:
    """What a process has used so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def of_index(process: int) -> tuple[float, float]:
    """MiB of the mapped index of a process: what no other process has, and its size."""
    private = mapped = 0
    inside = False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        field, *values = line.split()
        if "-" in field and not field.endswith(":"):
            inside = "distill samples" in line
        elif inside and field in ("Private_Clean:", "Private_Dirty:"):
            private += int(values[0])
        elif inside and field == "Size:":
            mapped += int(values[0])
    assert mapped
    return private / 1024, mapped / 1024


def read_real_rows(scratch: Path) -> list[str]:
    """Reading 2^20 real rows out of small and large blocks, by one process."""
    read.TOKENS = 1 << 20
    sizes = 65536, 1 << 20
    caches = []
    for rows in sizes:
        read.write_store(scratch / str(rows), rows)
        caches.append(TeacherCache(str(scratch / str(rows))))
    requests = count_requests()
    took: list[list[tuple[float, float]]] = [[], []]
    asked = []
    for epoch in range(5):
        chosen = np.random.default_rng(epoch).integers(len(caches[0]), size=30).tolist()
        for of_size, cache in zip(took, caches, strict=True):
            batches = cache.shuffled(8)
            batches.set_epoch(epoch)
            requests.clear()
            began = time.process_time()
            for _ in batches:
                pass
            middle = time.process_time()
            asked.append(len(requests))
            for i in chosen:
                cache[i]
            of_size.append((middle - began, (time.process_time() - middle) / len(chosen)))
    lines = []
    for rows, cache, of_size, count in zip(sizes, caches, took, asked[-2:], strict=True):
        epochs, samples = zip(*of_size, strict=True)
        lines.append(
            f"blocks of {rows:,} rows: {cache.num_tokens / statistics.median(epochs):,.0f} tokens per CPU second "
            f"shuffled, {count} requests for an epoch of {cache.num_tokens:,} tokens; "
            f"{1000 * statistics.median(samples):.1f} ms for a random sample"
        )
    ratio = statistics.median(one[0] / other[0] for one, other in zip(*took, strict=True))
    return [*lines, f"shuffled, the large blocks have {ratio:.2f}x the speed of the small ones"]


def count_requests() -> list[str]:
    """What is asked of stores from now on."""
    requests: list[str] = []
    plain = LocalStore.get

    async def get(self: LocalStore, key: str, *arguments: Any, **named: Any) -> Any:
        requests.append(key)
        return await plain(self, key, *arguments, **named)

    setattr(LocalStore, "get", get)  # noqa: B010
    return requests
