"""The index of a store's samples: shared by processes, and never copied as a whole."""

import gc
import os
import pickle
import tracemalloc
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from distill import TeacherCache
from distill.data.plan import lay_out
from distill.errors import DataError
from distill.reading import index as index_module
from distill.reading.cache import some_examples
from distill.reading.index import Index
from distill.reading.samples import RowReader
from distill.reading.shared import SharedArray
from distill.reading.shuffle import Part, ShuffledBatches
from tests.support import planned_store


def index_of(lengths: Any, block_rows: int) -> tuple[Index, Any]:
    """An index, and the starts in it."""
    layout = lay_out(lengths, block_rows)
    return Index(SharedArray([layout.starts], np.int64), SharedArray([lengths], np.int32)), layout.starts


def batches_of(index: Index, block_rows: int, seed: int = 5) -> ShuffledBatches:
    reader: Any = SimpleNamespace(store=SimpleNamespace(block_rows=block_rows))
    return ShuffledBatches([Part(reader, index, len(index))], {}, 7, seed, 0, 1, 3)


def whole_blocks(starts: Any, block_rows: int, seed: int, epoch: int, run: int, num_runs: int) -> list[list[int]]:
    """A run's ranges of positions as they were first written, with arrays over all samples."""
    block_of = starts // block_rows
    firsts = np.flatnonzero(np.diff(block_of, prepend=-1))
    stops = np.append(firsts[1:], len(block_of))
    order = np.random.default_rng([seed, epoch]).permutation(len(firsts))
    firsts, stops = firsts[order], stops[order]
    ends = np.cumsum(stops - firsts)
    begin, end = (len(block_of) * at // num_runs for at in (run, run + 1))
    touched = range(int(np.searchsorted(ends, begin, "right")), int(np.searchsorted(ends, end, "left")) + 1)
    pieces = []
    for i in touched if end > begin else ():
        before = int(ends[i] - (stops[i] - firsts[i]))
        pieces.append([int(firsts[i]) + max(begin - before, 0), int(firsts[i]) + min(end, int(ends[i])) - before])
    return pieces


@pytest.mark.parametrize("seed", range(8))
def test_blocks_of_up_to_65536_rows_come_in_the_order_that_they_always_had(seed: int) -> None:
    random = np.random.default_rng(seed)
    block_rows = int(random.choice([64, 1000, 8192, 65536]))
    lengths = random.integers(1, min(block_rows, 900), int(random.integers(1, 3000))).astype(np.int32)
    index, starts = index_of(lengths, block_rows)
    chosen = random.random(len(lengths)) < random.choice([0.002, 0.5])
    for part, those in ((index, starts), (index.where(chosen), starts[chosen]), (index[3::5], starts[3::5])):
        for num_runs in (1, 2, 7, 64):
            for run in range(num_runs):
                begin, end = (len(part) * at // num_runs for at in (run, run + 1))
                found = batches_of(part, block_rows, seed)._pieces(0, seed, begin, end).tolist()
                expected = whole_blocks(those, block_rows, seed, seed, run, num_runs) if len(those) else []
                assert found == expected


def test_larger_blocks_are_read_piece_by_piece(small_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 512 rows, in pieces of 60: each sample once, its own tokens, and no more than a piece in one read."""
    cache = TeacherCache(str(small_store))
    expected = [sample["tokens"].tolist() for sample in cache[:]]
    monkeypatch.setattr(index_module, "PIECE_ROWS", 60)  # samples have up to 96
    spans: list[int] = []
    plain = RowReader.read

    def counting(self: RowReader, start: int, stop: int) -> Any:
        spans.append(stop - start)
        return plain(self, start, stop)

    monkeypatch.setattr(RowReader, "read", counting)
    for part in (cache, cache[5::3]):
        seen = []
        for rank in range(3):
            for batch in part.shuffled(7, rank=rank, world_size=3, window_blocks=2):
                for number, tokens in zip(batch["sample"].tolist(), batch["input_ids"].tolist(), strict=True):
                    if number >= 0:  # else a rank has fewer samples
                        assert tokens[: len(expected[number])] == expected[number]
                        seen.append(number)
        assert sorted(seen) == [int(part._index.number(i)) for i in range(len(part))]
    assert max(spans) < 60 + 96
    assert len(spans) > 4 * len(cache._reader.store.read_all("commits"))


def test_an_epoch_makes_no_array_as_long_as_the_samples() -> None:
    lengths = np.full(2_000_000, 50, np.int32)
    whole, _ = index_of(lengths, 1 << 20)
    tracemalloc.start()
    for index in (whole, whole.where(np.arange(len(lengths)) % 2 == 0)):
        batches = batches_of(index, 1 << 20)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        pieces = batches._pieces(0, 0, 0, len(index))
        assert tracemalloc.get_traced_memory()[1] - before < 500_000
        assert (pieces[:, 1] - pieces[:, 0]).sum() == len(index)
    tracemalloc.stop()


def planned(path: Path, lengths: Any, block_rows: int, trained: Any = None) -> Any:
    """A store that says that it is complete, with a sample table and perhaps a loss mask; where its samples start."""
    layout = lay_out(lengths, block_rows)
    store = planned_store(path, layout, planned=["tokens", *(["loss_mask"] if trained is not None else [])])
    if trained is not None:
        for block in range(layout.num_blocks):
            here = np.zeros(block_rows, bool)
            for i in layout.samples_of(block):
                first = layout.starts[i] - block * block_rows
                here[first : first + lengths[i]] = trained[i]
            store.write_rows("loss_mask", block, here)
    store.publish()
    store._mark(complete=True)
    return layout.starts


def test_whether_anything_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece of many, in blocks of several pieces; the last token of a sample is followed by none."""
    monkeypatch.setattr(index_module, "PIECE_ROWS", 60)
    random = np.random.default_rng(0)
    lengths = random.integers(1, 90, 300).astype(np.int32)
    trained = [np.zeros(length, bool) for length in lengths]
    for i in (5, 77, 140, 141, 299):
        lengths[i] = 50
        trained[i] = np.arange(50) == (49 if i == 141 else 20)
    planned(tmp_path / "x.zarr", lengths, 512, trained)
    cache = TeacherCache(str(tmp_path / "x.zarr"))
    learned = np.array([mask[:-1].any() for mask in trained])
    assert learned.sum() == 4
    for part in (slice(None), slice(6, 77), slice(77, 140), slice(141, 299), slice(142, None), slice(298, 140, -1)):
        if learned[part].any():
            cache[part].check_trained("to train on")
        else:
            with pytest.raises(DataError, match="loss_mask is false everywhere"):
                cache[part].check_trained("to train on")


def test_opening_holds_one_chunk_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.store.codecs._SAMPLE_CHUNK", 1 << 16)
    lengths = np.random.default_rng(0).integers(1, 50, 1_000_000).astype(np.int32)
    starts = planned(tmp_path / "x.zarr", lengths, 1 << 20)
    TeacherCache(str(tmp_path / "x.zarr"))  # whatever zarr keeps
    tracemalloc.start()
    cache = TeacherCache(str(tmp_path / "x.zarr"))
    cache.check_trained("to train on")
    assert (cache.num_tokens, cache.max_length) == (lengths.sum(), 49)
    assert tracemalloc.get_traced_memory()[1] < 4_000_000  # of 12 MB
    tracemalloc.stop()
    for i in (0, 777_777, 999_999):
        assert cache._index.rows(i) == (starts[i], starts[i] + lengths[i])


def mapping_of(values: Any) -> tuple[int, ...]:
    """What is mapped where these values are: device and inode."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= values.ctypes.data < end:
            return *(int(part, 16) for part in line.split()[3].split(":")), int(line.split()[4])
    raise AssertionError("these values are nowhere")


def tell(index: Index, pipe: Any) -> None:
    """In a child: where the index is, and what is in it."""
    arrays = arrays_of(index)
    pipe.send(([*map(mapping_of, arrays)], [int(values.sum()) for values in arrays], pickle.dumps(index)))


def arrays_of(index: Index) -> list[Any]:
    assert index._numbers is not None
    return [index._starts.values, index._lengths.values, index._numbers.values]


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_children_map_the_same_memory(method: str) -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 1_000_000).astype(np.int32)
    whole, _ = index_of(lengths, 1 << 20)
    index = whole.where(np.arange(len(lengths)) % 3 > 0)
    arrays = arrays_of(index)
    here, there = get_context(method).Pipe()
    child: Any = get_context(method).Process(target=tell, args=(index, there))  # type: ignore[attr-defined]
    child.start()
    there.close()
    mappings, sums, pickled = here.recv()
    child.join()
    assert mappings == [mapping_of(values) for values in arrays]
    assert all(inode for _, _, inode in mappings)  # a file: what a fork copies has none
    assert sums == [int(values.sum()) for values in arrays]
    copied = pickle.loads(pickled)  # outside of a start, a pickle holds the values
    for one, other in zip(arrays_of(copied), arrays, strict=True):
        assert (one == other).all()
        assert mapping_of(one) not in mappings


def descriptors() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


def test_arrays_without_memory_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are on the disk then. Descriptors are closed with the arrays; small arrays have none."""
    values = np.arange(500_000)
    gc.collect()
    open_files = descriptors()
    monkeypatch.delattr(os, "memfd_create", raising=False)
    arrays = [SharedArray[Any]([values[:100], values[100:]], dtype) for dtype in (np.int32, np.int64)]
    small = SharedArray[Any]([values[:5], values[7:9]], np.int32)
    assert descriptors() > open_files + 1
    assert small.values.tolist() == [0, 1, 2, 3, 4, 7, 8]
    assert len(SharedArray[Any]([], np.int32)) == 0
    for array in arrays:
        assert (array.values == values).all()
        assert mapping_of(array.values)[-1]
        with pytest.raises(ValueError, match="read-only"):
            array.values[0] = 1
    del array, arrays
    gc.collect()
    assert descriptors() == open_files


def one_by_one(source: Any, num_samples: int, seed: int) -> Any:
    """The split as it was first written."""
    examples, example_of, windows = np.unique(source, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(examples))
    taken = np.zeros(len(examples), bool)
    taken[order[: int(np.searchsorted(np.cumsum(windows[order]), num_samples, "left")) + 1]] = num_samples > 0
    return taken[example_of]


@pytest.mark.parametrize("seed", range(6))
def test_the_same_examples_are_held_out_as_ever(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of which have several windows; some numbers are of no sample; and there may be few samples of many."""
    monkeypatch.setattr("distill.reading.cache._DRAWN_AT_ONCE", 100)
    random = np.random.default_rng(seed)
    for count, examples in ((1, 1), (1000, 1000), (1000, 300), (1000, 5000), (50, 10**15)):
        source = random.integers(0, examples, count)
        for num_samples in (1, count // 10 + 1, count - 1, count, 2 * count):
            if num_samples:
                found = some_examples(source, num_samples, seed)
                assert (found == one_by_one(source, num_samples, seed)).all()


def test_a_cache_in_the_opposite_order(small_store: Path) -> None:
    """It is one, and its batches hold the same samples."""
    cache = TeacherCache(str(small_store))
    back = cache[40:10:-3]
    assert [sample["sample"] for sample in back] == list(range(40, 10, -3))
    assert back[1:4][-1]["sample"] == 31
    back.check_trained("to train on")
    seen = {}
    for batch in DataLoader(back.shuffled(4), batch_size=None, num_workers=0):
        for number, tokens in zip(batch["sample"].tolist(), batch["input_ids"], strict=True):
            seen[number] = tokens
    assert sorted(seen) == list(range(13, 41, 3))
    for number, tokens in seen.items():
        expected = cache[number]["tokens"]
        assert tokens[: len(expected)].equal(expected)
