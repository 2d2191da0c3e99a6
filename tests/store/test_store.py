import shutil

import numpy as np
import pytest
import zarr

from distill.errors import StoreError
from distill.store.schema import ArraySpec
from distill.store.store import Store
from distill.store.writable import WritableStore
from tests.support import open_raw, tree

SPECS = [
    ArraySpec("tokens", "row", (), "int32", -1),
    ArraySpec("target_logprobs", "row", (("k", 5),), "float16", np.nan),
    ArraySpec("loss_mask", "row", (), "bool", False),
    ArraySpec("sample_start", "sample", (), "int64", 0),
]


def create(path, codec="portable", publish=True):
    attributes = {"block_rows": 32, "complete": False}
    store = WritableStore.create(str(path), {}, attributes, SPECS, {"row": 96, "sample": 7}, 16, codec)
    store.write_all("sample_start", np.arange(7))
    if publish:
        store.publish(3)
    return store


def commit_all(store):
    for block in range(3):
        store.write_rows("target_logprobs", block, values())
        store.commit(block, 20, ["target_logprobs"])


def values(rows=20):
    return np.linspace(-9, 0, rows * 5, dtype=np.float32).reshape(rows, 5).astype(np.float16)


@pytest.mark.parametrize("codec", ["portable", "compact"])
def test_what_is_written_is_read(tmp_path, codec):
    store = create(tmp_path / "x.zarr", codec)
    store.write_rows("target_logprobs", 1, values())
    store.write_rows("loss_mask", 1, np.arange(20) % 3 == 0)
    store.commit(1, 20, ["target_logprobs"])
    again = WritableStore.open(str(tmp_path / "x.zarr"), {})
    assert again is not None
    np.testing.assert_array_equal(again.read_rows("target_logprobs", 32, 52), values())
    assert np.isnan(again.read_rows("target_logprobs", 52, 96)).all()
    assert again.read_rows("loss_mask", 32, 96).sum() == 7
    assert again.read_all("commits").tolist() == [-1, 20, -1]
    assert again.missing_blocks() == [0, 2]
    assert again.block_bytes(1, ["target_logprobs"]) == (tmp_path / "x.zarr/target_logprobs/c/1/0").stat().st_size


def test_the_samples_of_a_block_are_found_in_a_few_chunks(tmp_path, monkeypatch):
    """However many samples there are: beside a search in all of them."""
    monkeypatch.setattr("distill.store.codecs._SAMPLE_CHUNK", 4)
    random = np.random.default_rng(0)
    for number, count in enumerate((1, 4, 5, 300)):
        starts = np.sort(random.choice(32 * 90, count, replace=False))
        starts[0] = 0
        lengths = np.diff(starts, append=starts[-1] + 1).astype(np.int32)  # across blocks: the table is all that counts
        specs = [*SPECS, ArraySpec("sample_length", "sample", (), "int32", 0)]
        sizes = {"row": 32 * 90, "sample": count}
        store = WritableStore.create(
            str(tmp_path / f"{number}.zarr"), {}, {"block_rows": 32, "complete": False}, specs, sizes, 16, "portable"
        )
        store.write_all("sample_start", starts)
        store.write_all("sample_length", lengths)
        assert (store.num_blocks, store.num_samples) == (90, count)
        expected = np.bincount(starts // 32, weights=lengths, minlength=90)
        assert store.tokens_per_block().tolist() == expected.tolist()
        read: list[tuple[str, int, int]] = []
        monkeypatch.setattr(Store, "read_rows", spying(read))
        for block in [*range(90), 0, 89, 44, *random.integers(90, size=50)]:
            read.clear()
            expected = np.flatnonzero(starts // 32 == block)
            assert list(store.samples_of(int(block))) == expected.tolist()
            assert all(stop - start <= 4 for _, start, stop in read)
        assert len(read) <= 2  # the first of each chunk is known by now
        monkeypatch.undo()
        monkeypatch.setattr("distill.store.codecs._SAMPLE_CHUNK", 4)


def spying(read):
    plain = Store.read_rows

    def read_rows(self, name, start, stop):
        read.append((name, start, stop))
        return plain(self, name, start, stop)

    return read_rows


def test_tensorstore_reads_the_same(tmp_path):
    store = create(tmp_path / "x.zarr")
    store.write_rows("target_logprobs", 2, values(32))
    store.write_rows("tokens", 2, np.arange(32))
    store.commit(2, 32, ["target_logprobs", "tokens"])
    for name in ("tokens", "target_logprobs", "loss_mask", "sample_start", "commits"):
        np.testing.assert_array_equal(open_raw(tmp_path / "x.zarr", name), store.read_all(name))
    assert open_raw(tmp_path / "x.zarr", "commits").tolist() == [-1, -1, 32]


def test_an_interrupted_plan_is_no_store(tmp_path):
    create(tmp_path / "x.zarr", publish=False)
    begun = Store.open(str(tmp_path / "x.zarr"), {})
    assert begun is not None
    assert not begun.published
    create(tmp_path / "x.zarr")  # begun anew in the same place
    begun = Store.open(str(tmp_path / "x.zarr"), {})
    assert begun is not None
    assert begun.published
    with pytest.raises(StoreError, match="another run has begun"):
        create(tmp_path / "x.zarr")
    assert Store.open(str(tmp_path / "nothing"), {}) is None
    assert not (tmp_path / "nothing").exists()


def test_a_flipped_bit_is_found(tmp_path):
    store = create(tmp_path / "x.zarr")
    store.write_rows("target_logprobs", 0, values(32))
    shard = tmp_path / "x.zarr/target_logprobs/c/0/0"
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    shard.write_bytes(content)
    with pytest.raises(StoreError, match="damaged data in target_logprobs, rows 0 to 32"):
        store.read_rows("target_logprobs", 0, 32)


def test_strangers_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thing").write_text("x")
    zarr.create_group(tmp_path / "group.zarr")
    before = tree(tmp_path)
    for name, message in (("file", "found a file"), ("folder", "other content"), ("group.zarr", "another Zarr group")):
        with pytest.raises(StoreError, match=message):
            Store.open(str(tmp_path / name), {})
    assert tree(tmp_path) == before
    create(tmp_path / "x.zarr")
    zarr.open_group(tmp_path / "x.zarr").attrs["version"] = 2
    with pytest.raises(StoreError, match=r"expected format version 1 at .*, found 2"):
        Store.open(str(tmp_path / "x.zarr"), {})


def test_strangers_behind_a_url_are_refused(tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(StoreError, match="found other content"):
        Store.open(f"file://{tmp_path}", {})
    (tmp_path / "empty").mkdir()
    assert Store.open(f"file://{tmp_path}/empty", {}) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "precious"]


def test_only_one_run_writes_a_store(tmp_path):
    first = create(tmp_path / "x.zarr")
    second = WritableStore.open(str(tmp_path / "x.zarr"), {})
    assert second is not None
    with pytest.raises(StoreError, match="another run is writing"):
        second.lock()
    del first
    second.lock()


def test_completion_sweeps_up_after_the_killed(tmp_path):
    store = create(tmp_path / "x.zarr")
    stale = tmp_path / "x.zarr" / "tokens" / "0.123.partial"
    stale.write_text("half a file")
    with pytest.raises(RuntimeError, match=r"blocks \[0, 1, 2\] are not committed"):
        store.mark_complete()
    assert stale.exists()
    commit_all(store)
    store.mark_complete()
    assert not stale.exists()
    again = Store.open(str(tmp_path / "x.zarr"), {})
    assert again is not None
    assert again.complete


def test_object_stores_hold_the_same_bytes(tmp_path):
    """The client of object stores, on a folder: the keys and bytes are those of a local store."""
    (tmp_path / "remote.zarr").mkdir()
    for path in (str(tmp_path / "local.zarr"), f"file://{tmp_path}/remote.zarr"):
        store = create(path)
        commit_all(store)
        store.mark_complete()
    assert tree(tmp_path / "remote.zarr") == tree(tmp_path / "local.zarr")
    shutil.rmtree(tmp_path / "remote.zarr")
