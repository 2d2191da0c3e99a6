"""TeacherCache beside the raw arrays, and what it refuses."""

import json
import os
import pickle
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill import TeacherCache, collate
from distill.errors import StoreError
from distill.reading.samples import empty_sample
from distill.store.store import Store
from tests.support import generate_here, make_tokenizer, open_raw, reseal


@pytest.fixture
def copied(small_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_store, tmp_path / "copy.zarr"))


def test_samples_are_what_the_arrays_hold(small_store: Path) -> None:
    cache = TeacherCache(str(small_store), tokenizer=make_tokenizer())
    starts, lengths = open_raw(small_store, "sample_start"), open_raw(small_store, "sample_length")
    raw = {name: open_raw(small_store, name) for name in ("tokens", "target_ids", "target_logprobs", "logsumexp")}
    assert len(cache) == len(starts) > 300
    assert cache.max_length == 96
    assert cache.temperatures == [1.0, 2.0]
    for i in (0, 1, len(cache) // 2, -1):
        sample, rows = cache[i], slice(starts[i], starts[i] + lengths[i])
        assert sample["sample"] == range(len(cache))[i]
        for name, array in raw.items():
            np.testing.assert_array_equal(sample[name].numpy(), array[rows], err_msg=name)
        assert sample["tokens"].dtype == sample["target_ids"].dtype == torch.int64
        assert {sample[name].dtype for name in ("target_logprobs", "logsumexp", "tail_logprob")} == {torch.float32}
        assert sample["tail_logprob"].shape == sample["logsumexp"].shape == (lengths[i], 2)
    with pytest.raises(IndexError, match="found 100000"):
        cache[100000]


def test_slices_are_caches(small_store: Path) -> None:
    cache = TeacherCache(str(small_store))
    part = cache[10:40:3]
    assert [sample["sample"] for sample in part] == list(range(10, 40, 3))
    assert part[1:][0]["sample"] == 13
    seen = [int(i) for batch in part.shuffled(batch_size=4) for i in batch["sample"]]
    assert sorted(seen) == list(range(10, 40, 3))


def test_a_split_keeps_examples_whole(small_store: Path) -> None:
    cache = TeacherCache(str(small_store))
    source = open_raw(small_store, "sample_index")
    training, held_out = cache.split(60, seed=3)
    numbers = [{int(part[i]["sample"]) for i in range(len(part))} for part in (training, held_out)]
    assert numbers[0] | numbers[1] == set(range(len(cache)))
    assert not {source[i] for i in numbers[0]} & {source[i] for i in numbers[1]}
    assert 60 <= len(held_out) < 70
    everything, nothing = cache.split(0)
    assert (len(everything), len(nothing)) == (len(cache), 0)
    assert {int(s["sample"]) for s in cache.split(60, seed=4)[1]} != numbers[1]


def test_it_goes_to_other_processes(small_store: Path) -> None:
    cache = TeacherCache(str(small_store))
    expected = cache[5]["tokens"]
    torch.testing.assert_close(pickle.loads(pickle.dumps(cache))[5]["tokens"], expected)
    for method in ("fork", "spawn"):
        with get_context(method).Pool(1) as pool:
            torch.testing.assert_close(torch.tensor(pool.apply(_tokens, (cache, 5))), expected)


def _tokens(cache: TeacherCache, i: int) -> list[int]:
    found: list[int] = cache[i]["tokens"].tolist()
    return found


def test_a_relative_path_is_where_it_was_opened(
    small_store: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a chdir, in this process and in others: also where another store of the same name is."""
    expected = [TeacherCache(str(small_store))[i]["tokens"] for i in range(40)]
    (tmp_path / "elsewhere").mkdir()
    other = Path(shutil.copytree(copied, tmp_path / "elsewhere" / "copy.zarr"))
    for name in ("tokens", "target_ids"):
        shutil.rmtree(other / name / "c")
    monkeypatch.chdir(tmp_path)
    for elsewhere in (tmp_path / "elsewhere", tmp_path / "elsewhere" / "copy.zarr" / "tokens"):
        monkeypatch.chdir(tmp_path)
        cache = TeacherCache("copy.zarr")
        assert cache.path == "copy.zarr"
        monkeypatch.chdir(elsewhere)
        read = [cache, pickle.loads(pickle.dumps(cache))]
        assert all(part[i]["tokens"].equal(expected[i]) for part in read for i in range(0, 40, 7))
        for method in ("fork", "spawn"):
            with get_context(method).Pool(1, initializer=os.chdir, initargs=(elsewhere,)) as pool:
                assert pool.apply(_tokens, (cache, 5)) == expected[5].tolist()
        batches = cache[:40].shuffled(batch_size=8)
        for batch in torch.utils.data.DataLoader(batches, batch_size=None, num_workers=1):
            for row, i in zip(batch["input_ids"], batch["sample"].tolist(), strict=True):
                assert row[: len(expected[i])].equal(expected[i])


def test_another_store_in_its_place_is_noticed(small_store: Path, copied: Path) -> None:
    cache = TeacherCache(str(copied))
    state = pickle.dumps(cache)
    reseal(copied, fingerprint="another")
    cache._reader._opened = replace(cache._reader._opened, process=-1)  # as in a child
    for again in (lambda: pickle.loads(state), lambda: cache[0]):
        with pytest.raises(
            StoreError, match=r"copy.zarr: expected the store \w+ that was opened first, found the store \w+ at"
        ):
            again()


class Slow(OrderedDict[int, Any]):
    """Lets other threads run before each change."""

    def move_to_end(self, key: int, last: bool = True) -> None:
        time.sleep(0.001)
        super().move_to_end(key, last)

    def popitem(self, last: bool = True) -> tuple[int, Any]:
        time.sleep(0.001)
        return super().popitem(last)


def test_many_threads_read_right_values(small_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With so few chunks kept that each thread throws out those of the others."""
    monkeypatch.setattr("distill.reading.samples._CHUNKS_KEPT", 1)
    cache = TeacherCache(str(small_store))
    expected = [cache[i] for i in range(60)]  # of many chunks
    cache._reader._opened = replace(cache._reader._opened, chunks=Slow())
    with ThreadPoolExecutor(8) as pool:
        order = [int(i) for i in np.random.default_rng(0).integers(60, size=200)]
        for i, sample in zip(order, pool.map(cache.__getitem__, order), strict=True):
            torch.testing.assert_close(sample, expected[i], rtol=0, atol=0, equal_nan=True)


def test_a_tilde_is_the_home_folder(small_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(small_store.parent))
    assert TeacherCache("~/small.zarr")[0]["tokens"].equal(TeacherCache(str(small_store))[0]["tokens"])


def test_a_url_is_not_read_after_a_fork(small_store: Path) -> None:
    cache = TeacherCache(f"file://{small_store}")
    assert cache[0]["tokens"].equal(TeacherCache(str(small_store))[0]["tokens"])
    cache._reader._opened = replace(cache._reader._opened, process=-1)  # as in a child
    with pytest.raises(StoreError, match="multiprocessing_context='forkserver'"):
        cache[0]


def test_unfinished_stores(copied: Path) -> None:
    attributes = copied / "zarr.json"
    attributes.write_text(attributes.read_text().replace('"complete": true', '"complete": false'))
    (copied / "commits" / "c" / "2").unlink()
    with pytest.raises(StoreError, match=r"is unfinished \(\d+ of \d+ blocks are there\)"):
        TeacherCache(str(copied))
    cache = TeacherCache(str(copied), allow_unfinished=True)
    blocks = {int(open_raw(copied, "sample_start")[cache[i]["sample"]]) // 512 for i in range(len(cache))}
    assert blocks == set(range(open_raw(copied, "commits").size)) - {2}


def test_damage_is_named(copied: Path) -> None:
    first = TeacherCache(str(copied))
    in_block_1 = next(i for i in range(len(first)) if first._index.rows(i)[0] >= 512)
    shard = copied / "target_ids" / "c" / "1" / "0"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    with pytest.raises(StoreError, match="damaged: target_ids, block 1: "):
        TeacherCache(str(copied))[in_block_1]
    shard.write_bytes(whole)
    (copied / "logsumexp" / "c" / "1" / "0").unlink()
    with pytest.raises(StoreError, match="damaged: logsumexp of block 1 does not match its checksums"):
        TeacherCache(str(copied))[in_block_1]
    (copied / "commits" / "c" / "1").unlink()
    for read in (lambda cache: cache[in_block_1], lambda cache: list(cache.shuffled(batch_size=8))):
        with pytest.raises(StoreError, match="block 1 is not there"):
            read(TeacherCache(str(copied)))


def test_what_is_not_a_store(tmp_path: Path, copied: Path) -> None:
    with pytest.raises(StoreError, match="found no store at"):
        TeacherCache(str(tmp_path / "nothing.zarr"))
    attributes = copied / "zarr.json"
    attributes.write_text(attributes.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(StoreError, match=r"expected format version 1 at .*, found 2"):
        TeacherCache(str(copied))


def test_tokenizers(small_store: Path) -> None:
    more = make_tokenizer()
    more.add_tokens(["<new>"])
    TeacherCache(str(small_store), tokenizer=more)  # the same ids, and one that the teacher never gives
    other = make_tokenizer()
    other.get_vocab = lambda: {token: 261 - i for token, i in make_tokenizer().get_vocab().items()}
    with pytest.raises(StoreError, match="gives other ids than the teacher's"):
        TeacherCache(str(small_store), tokenizer=other)

    class Smaller:
        def __len__(self) -> int:
            return 100

        def get_vocab(self) -> dict[str, int]:
            return {}

    with pytest.raises(StoreError, match=r"expected a student's tokenizer of 262 tokens, .* found 100"):
        TeacherCache(str(small_store), tokenizer=Smaller())


def test_batches_are_aligned() -> None:
    lengths = [30, 7, 96, 1, 50, 46, 33, 33, 29, 2]
    samples = []
    for i, length in enumerate(lengths):
        tokens = 1000 * (i + 1) + torch.arange(length)  # each token tells whose it is, and where it stands
        about = tokens[:, None].float()
        samples.append({"sample": i, "tokens": tokens, "target_ids": tokens[:, None].repeat(1, 3)})
        samples[-1] |= {"target_logprobs": about.repeat(1, 3), "logsumexp": about, "tail_logprob": about}
    batch = collate(samples)
    assert batch["input_ids"].shape == (10, 96)
    real = batch["input_ids"] > 0
    sample, position = batch["input_ids"][real] // 1000 - 1, batch["input_ids"][real] % 1000
    assert sample.bincount().tolist() == lengths
    last = position == torch.tensor(lengths)[sample] - 1
    assert batch["next_tokens"][real].equal(torch.where(last, -1, batch["input_ids"][real] + 1))
    assert batch["loss_mask"][real].equal(~last)
    assert not batch["loss_mask"][~real].any()
    for name in ("target_ids", "target_logprobs", "logsumexp", "tail_logprob"):
        assert (batch[name][real] == batch["input_ids"][real][:, None]).all()
        assert (batch[name][~real] == 0).all()


def test_a_loss_mask_is_kept(small_store: Path) -> None:
    sample = TeacherCache(str(small_store))[0]
    sample["loss_mask"] = torch.arange(len(sample["tokens"])) % 2 == 0
    mask = collate([sample])["loss_mask"][0]
    assert mask[:-1].equal(sample["loss_mask"][:-1])
    assert not mask[-1]
    nothing = collate([empty_sample(8, 2)])
    assert nothing["sample"].tolist() == [-1]
    assert not nothing["loss_mask"].any()


@pytest.fixture(scope="module")
def rollouts(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 40 rollouts of 2 to 4 prompt tokens and 1 to 8 others, with the log-probabilities of a sampler."""
    folder, random = tmp_path_factory.mktemp("rollouts"), np.random.default_rng(0)
    rows = []
    for i in range(40):
        ids = [1, *map(int, random.integers(10, 200, 1 + i % 3 + 1 + i % 8))]
        prompt, rest = ids[: 2 + i % 3], ids[2 + i % 3 :]
        rows.append({"prompt_ids": prompt, "completion_ids": rest, "logprobs": [-(i + 1) / 64 for _ in rest]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"teacher.model={model_folder('llama')}", f"dataset.path={folder / 'rows.jsonl'}", "capture.k=8"]
    generate_here(folder, *arguments, f"store.path={folder / 'x.zarr'}", "store.block_rows=32")
    return folder / "x.zarr"


def test_rollouts_are_aligned_and_selected(rollouts: Path, small_store: Path) -> None:
    """Of rollout i: -(i + 1) / 64 at the rows before its own tokens, nowhere else; what a sampler said and the mask."""
    cache, index = TeacherCache(str(rollouts)), open_raw(rollouts, "sample_index")
    assert cache.arrays >= {"next_logprob", "sampled_logprob", "loss_mask"}
    said = [sample["sampled_logprob"] for sample in cache]
    for i, sample in zip(index, cache, strict=True):
        own = torch.arange(len(sample["tokens"])) >= 1 + i % 3
        own[-1] = False
        assert sample["loss_mask"].equal(own)
        assert sample["sampled_logprob"][own].eq(-(i + 1) / 64).all()
        assert sample["sampled_logprob"][~own].isnan().all()
        assert sample["next_logprob"].isnan().tolist() == [*[False] * (len(own) - 1), True]
    batch = collate([cache[3], cache[5], empty_sample(8, 1)])
    mask = batch["loss_mask"]
    assert batch["sampled_logprob"][mask].tolist() == torch.cat([said[i][said[i].isfinite()] for i in (3, 5)]).tolist()
    assert batch["next_logprob"][0][mask[0]].equal(cache[3]["next_logprob"][cache[3]["loss_mask"]])
    assert (batch["next_logprob"][~mask] == 0).all()
    assert (batch["sampled_logprob"][~mask] == 0).all()

    likely = cache.select(lambda sample: sample["next_logprob"][sample["loss_mask"]].mean() > -6.9)
    means = [sample["next_logprob"][sample["loss_mask"]].mean() for sample in cache]
    assert 0 < len(likely) < 40
    assert [sample["sample"] for sample in likely] == [i for i, mean in enumerate(means) if mean > -6.9]
    seen: list[Any] = []

    def every_other(sample: Any) -> bool:
        seen.append(sample)
        return "target_ids" not in sample and len(seen) % 2 == 1

    few = likely[::-1].select(every_other)
    assert [sample["sample"] for sample in few] == [sample["sample"] for sample in likely[::2]]
    for sample in seen:
        torch.testing.assert_close(sample["sampled_logprob"], said[sample["sample"]], equal_nan=True)
    plain = TeacherCache(str(small_store))
    assert "sampled_logprob" not in plain.arrays
    long = plain.select(lambda sample: int(sample["loss_mask"].sum()) == 95)  # all but the last one
    assert long.lengths == [96] * len(long)
    assert len(long) == plain.lengths.count(96) > 0
    assert len(plain.select(lambda _: False)) == 0


def test_opening_reads_the_index_alone(small_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    plain = Store._entries

    def spying(self: Store, name: str, start: int, stop: int) -> Any:
        read.append(name)
        return plain(self, name, start, stop)

    monkeypatch.setattr(Store, "_entries", spying)
    cache = TeacherCache(str(small_store))
    assert sorted(read) == ["sample_length", "sample_start"]
    cache[0]
    assert "tokens" in read
