"""What a worker is told and what it holds, however large the store is."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distill.config.generate import GenerateConfig
from distill.data.plan import lay_out
from distill.run.board import Board
from distill.run.grid import Grid
from distill.store.store import Store
from distill.store.writable import WritableStore
from distill.teacher.placement import Placement
from distill.teacher.prepare import Job
from distill.teacher.worker import Worker
from tests.support import planned_store


def planned(path: Path, lengths: Any) -> WritableStore:
    """A store in which nothing is committed. Token t of sample i is 1000 i + t."""
    layout = lay_out(lengths, 64)
    store: WritableStore = planned_store(path, layout)
    for block in range(layout.num_blocks):
        tokens = [1000 * i + np.arange(lengths[i]) for i in layout.samples_of(block)]
        store.write_rows("tokens", block, np.concatenate(tokens).astype(np.int32))
    store.publish()
    return store


def test_a_worker_reads_its_blocks_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no whole array over samples. It gives the teacher the tokens of each sample."""
    monkeypatch.setattr("distill.store.codecs._SAMPLE_CHUNK", 8)
    lengths = np.random.default_rng(0).integers(2, 40, 500).astype(np.int32)
    store = planned(tmp_path / "x.zarr", lengths)
    read: list[tuple[str, int]] = []
    seen: list[Any] = []
    plain = Store.read_rows

    def spying(self: Store, name: str, start: int, stop: int) -> Any:
        read.append((name, stop - start))
        return plain(self, name, start, stop)

    def capture(samples: list[Any], *_: Any) -> None:
        seen.extend(samples)

    monkeypatch.setattr(Store, "read_rows", spying)
    teacher: Any = SimpleNamespace(capture=capture, captures=False, rope_switch=None, close=lambda: None)
    watch: Any = SimpleNamespace(beat=lambda: None)
    board: Any = SimpleNamespace()
    dealt = list(range(0, store.num_blocks, 3))
    Worker(GenerateConfig(), store, teacher, board, watch, store.num_blocks, dealt).work()
    assert {name for name, _ in read} == {"sample_start", "sample_length", "tokens"}
    assert max(count for _, count in read) <= 64  # rows of a block, of which each sample has at least two
    expected = sorted(i for block in dealt for i in store.samples_of(block))
    assert sorted(int(sample[0]) // 1000 for sample in seen) == expected
    for sample in seen:
        assert (sample == sample[0] + np.arange(lengths[sample[0] // 1000])).all()


def test_workers_are_told_what_is_missing(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(2, 40, 500).astype(np.int32)
    store = planned(tmp_path / "x.zarr", lengths)
    used = store.tokens_per_block()
    for block in (0, 5, store.num_blocks - 1):
        store._arrays["commits"][block] = used[block]
    job = Job.of(Placement("tensor", 2), store)
    assert job.missing == sorted({*range(store.num_blocks)} - {0, 5, store.num_blocks - 1})
    assert (job.done_tokens, job.longest) == (used[[0, 5, -1]].sum(), lengths.max())
    assert Job.of_note(job.note(), store) == job


def test_what_is_missing_fits_into_torchruns_store() -> None:
    """Which takes 8 MiB: 12 million blocks, every second one missing, or any half of them, through the real one."""
    from torch.distributed import TCPStore

    board = Board(TCPStore("127.0.0.1", 0, 1, True))
    store: Any = SimpleNamespace(num_blocks=12_000_000)
    for missing in (np.arange(0, 12_000_000, 2), np.flatnonzero(np.random.default_rng(0).random(12_000_000) < 0.5)):
        job = Job(Placement("data", 1), store, missing.tolist(), 5, 6)
        board.note("job", job.note())
        assert Job.of_note(board.wait("job"), store) == job
    assert Grid().deal(job.missing[:1000]) == job.missing[:1000]
