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
