import shutil

import numpy as np
import pytest
import zarr

from distill.data.plan import Plan
from distill.errors import StoreError
from distill.store.metadata import damage
from distill.store.retry import RetryingStore
from distill.store.schema import CAPTURED
from distill.store.store import Store
from distill.store.writable import WritableStore
from tests.support import open_raw, planned_store, tree

ATTRIBUTES = {"method": "topk", "k": 5, "temperatures": [1.0, 2.0], "block_rows": 32, "num_blocks": 3, "num_samples": 7}
ATTRIBUTES |= {"fingerprint": "made up"}


def create(path, codec="portable", publish=True, options=None, method="topk"):
    """A store of 3 blocks of 32 rows, 20 of them in use."""
    attributes = ATTRIBUTES | {"method": method}
    store = WritableStore.create(str(path), options or {}, attributes, planned=["tokens", "loss_mask"], codec=codec)
    store.write_all("sample_start", np.array([0, 10, 32, 42, 64, 70, 74]))
    store.write_all("sample_length", np.array([10, 10, 10, 10, 6, 4, 10], np.int32))
    store.write_all("sample_index", np.arange(7))
    for block in range(3):
        store.write_rows("tokens", block, np.arange(20) + block)
        store.write_rows("loss_mask", block, np.arange(20) % 3 == block)
    if publish:
        store.publish()
    return store


def fill(store, block):
    store.write_rows("target_ids", block, np.arange(100, dtype=np.int32).reshape(20, 5) + block)
    store.write_rows("target_logprobs", block, values() - block)
    store.write_rows("logsumexp", block, np.ones((20, 2), np.float32))
    store.write_rows("tail_logprob", block, np.full((20, 2), -3, np.float16))
    if "next_logprob" in store.captured:  # not of a store of before
        store.write_rows("next_logprob", block, np.full(20, -2, np.float16))
    store.commit(block, 20)


def commit_all(store):
    for block in range(3):
        fill(store, block)


def values():
    return np.linspace(-9, 0, 100, dtype=np.float32).reshape(20, 5).astype(np.float16)


@pytest.mark.parametrize("method", ["topk", "sample"])
@pytest.mark.parametrize("codec", ["portable", "compact"])
def test_what_is_written_is_read(tmp_path, codec, method):
    store = create(tmp_path / "x.zarr", codec, method=method)
    fill(store, 1)
    again = WritableStore.open(str(tmp_path / "x.zarr"), {})
    assert again is not None
    np.testing.assert_array_equal(again.read_rows("target_logprobs", 32, 52), values() - 1)
    assert np.isnan(again.read_rows("target_logprobs", 52, 64)).all()
    assert again.read_rows("loss_mask", 32, 64).sum() == 7
    assert again.read_all("commits").tolist() == [-1, 20, -1]
    assert again.missing_blocks() == [0, 2]
    assert again.tokens_per_block().tolist() == [20, 20, 20]
    assert [again.samples_of(block) for block in range(3)] == [range(2), range(2, 4), range(4, 7)]
    assert again.block_bytes(1, ["target_logprobs"]) == (tmp_path / "x.zarr/target_logprobs/c/1/0").stat().st_size


def test_the_samples_of_a_block_are_found_in_a_few_chunks(tmp_path, monkeypatch):
    """However many samples there are: beside a search in all of them."""
    monkeypatch.setattr("distill.store.codecs._SAMPLE_CHUNK", 4)
    random = np.random.default_rng(0)
    for number, count in enumerate((1, 4, 5, 300)):
        starts = np.sort(random.choice(32 * 90, count, replace=False))
        starts[0] = 0
        lengths = np.diff(starts, append=starts[-1] + 1).astype(np.int32)  # across blocks: the table is all that counts
        store = planned_store(tmp_path / f"{number}.zarr", Plan(32, starts, lengths), num_blocks=90)
        store.publish()
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


@pytest.mark.parametrize("method", ["topk", "sample"])
def test_tensorstore_reads_the_same(tmp_path, method):
    """And it is what was written: the two readers could be wrong alike."""
    store = create(tmp_path / "x.zarr", method=method)
    commit_all(store)
    for name in store.array_names():
        np.testing.assert_array_equal(open_raw(tmp_path / "x.zarr", name), store.read_all(name))
    np.testing.assert_array_equal(open_raw(tmp_path / "x.zarr", "target_logprobs")[64:84], values() - 2)


def test_inner_chunks_across_blocks(tmp_path, monkeypatch):
    """Rows from the middle of an inner chunk to the middle of another block's, and their checksums."""
    monkeypatch.setattr("distill.store.schema.INNER_ROWS", 8)
    store = create(tmp_path / "x.zarr")
    commit_all(store)
    again = Store.existing(str(tmp_path / "x.zarr"), {})
    whole = np.concatenate([np.pad(values() - block, ((0, 12), (0, 0)), constant_values=np.nan) for block in range(3)])
    for start, stop in ((0, 96), (3, 5), (30, 70), (95, 96)):
        np.testing.assert_array_equal(again.read_rows("target_logprobs", start, stop), whole[start:stop])


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


def test_chunks_that_are_damaged_missing_or_anothers_are_errors(tmp_path):
    commit_all(create(tmp_path / "x.zarr"))
    folder, shard = tmp_path / "x.zarr", tmp_path / "x.zarr/target_logprobs/c/0/0"
    good = shard.read_bytes()
    flipped = bytearray(good)
    flipped[40] ^= 1
    for content in (
        bytes(flipped),
        good[:-1],
        b"",
        bytes(len(good)),
        (folder / "target_logprobs/c/1/0").read_bytes(),
        None,
    ):
        shard.unlink()
        if content is not None:
            shard.write_bytes(content)
        store = Store.existing(str(folder), {})
        with pytest.raises(StoreError, match=r"damaged: target_logprobs(, | of )block 0.*distill.verify"):
            store.read_rows("target_logprobs", 0, 32)
        assert (store.read_rows("target_logprobs", 32, 52) == values() - 1).all()
    (folder / "commits/c/1").write_bytes(b"")  # as a power cut may leave it
    assert Store.existing(str(folder), {}).missing_blocks() == [1]
    for name in ("sample_start", "sample_length", "sample_index"):
        (folder / name / "c/0").unlink()
        with pytest.raises(StoreError, match=f"damaged: {name}, chunk 0 does not match"):
            Store.existing(str(folder), {}).read_all(name)


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
    root = tmp_path / "x.zarr/zarr.json"
    root.write_text(root.read_text().replace('"version": 1', '"version": 2'))
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


def test_what_is_lost_is_no_interrupted_plan(tmp_path):
    """A store that lost its commits, all or their zarr.json, is not begun anew: that would delete what it has."""
    for lost, unfinished in (("commits", False), ("commits/zarr.json", False), ("commits", True)):
        path = tmp_path / f"{lost.replace('/', ' ')} {unfinished}.zarr"
        store = create(path)
        commit_all(store)
        if not unfinished:
            store.mark_complete()
        if (path / lost).is_dir():
            shutil.rmtree(path / lost)
        else:
            (path / lost).unlink()
        with pytest.raises(StoreError, match=r"damaged: commits/zarr\.json is missing"):
            WritableStore.open(str(path), {})


def test_rows_of_another_run_are_not_read(tmp_path, monkeypatch):
    """A copy over another store that broke off: the metadata of one, blocks, checksums and commits of the other."""
    for name, run in (("a", "made up"), ("b", "another")):
        monkeypatch.setitem(ATTRIBUTES, "fingerprint", run)
        store = create(tmp_path / name)
        commit_all(store)
        store.mark_complete()
    for file in ("zarr.json", "commits/zarr.json"):
        shutil.copy(tmp_path / "b" / file, tmp_path / "a" / file)
    mixed = Store.existing(str(tmp_path / "a"), {})
    for name in ("tokens", "loss_mask", *CAPTURED):
        with pytest.raises(StoreError, match=f"{name} of block 0 does not match"):
            mixed.read_rows(name, 0, 10)


def test_too_little_memory_is_no_damage(tmp_path, monkeypatch):
    commit_all(create(tmp_path / "x.zarr"))
    store = Store.existing(str(tmp_path / "x.zarr"), {})

    async def nothing_left(*_):
        raise MemoryError

    monkeypatch.setattr("zarr.core.array.AsyncArray.getitem", nothing_left)
    with pytest.raises(MemoryError):
        store.read_rows("tokens", 0, 32)


def test_a_reader_process_tells_of_damage_in_its_own_words(tmp_path):
    """torch makes an error anew from its message alone."""
    error = damage("x.zarr", "tokens, block 3")
    again = type(error)(str(error))
    assert (str(again), again.what) == (str(error), "")
    assert error.what == "tokens, block 3"


@pytest.mark.parametrize("kind", ["folder", "url"])
def test_a_store_is_opened_with_few_requests(kind, tmp_path, monkeypatch):
    """However many blocks there are, and so is found what is missing."""
    asked = []
    plain = RetryingStore.attempt

    async def counting(self, what, request):
        asked.append(what)
        return await plain(self, what, request)

    for number, blocks in enumerate((2, 60)):
        starts = np.arange(blocks) * 32
        path = tmp_path / f"{number}.zarr"
        store = planned_store(path, Plan(32, starts, np.full(blocks, 32, np.int32)))
        for block in range(blocks):
            store.write_rows("tokens", block, np.arange(32))
        store.publish()
        for block in range(0, blocks, 2):
            store._arrays["commits"][block] = 32
        monkeypatch.setattr(RetryingStore, "attempt", counting)
        asked.append("opening")
        again = WritableStore.existing(f"file://{path}" if kind == "url" else str(path), {})
        assert again.missing_blocks() == [*range(1, blocks, 2)]
        assert again.plan_is_whole
        assert again.tokens_per_block().tolist() == [32] * blocks
        monkeypatch.undo()
    first, second = "\n".join(asked).split("opening")[1:]
    assert first.split() == second.split()
    assert len(asked) < 60
