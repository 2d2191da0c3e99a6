"""Several stores as one: shares exact in every epoch, for all ranks and readers; nothing lost, doubled or mixed up."""

import json
import pickle
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from distill import TeacherCache, collate
from distill.errors import ConfigError, DataError, StoreError
from distill.reading.mixture import Mixture
from distill.reading.samples import RowReader, Sample
from distill.reading.shuffle import Part, ShuffledBatches
from tests.support import masked_store, reseal

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, on purpose
BATCH = 8


@pytest.fixture
def caches(small_store: Path, sampled_store: Path) -> list[TeacherCache]:
    """70 samples of top-8 at two temperatures, and 110 samples of at most 16 ids."""
    return [TeacherCache(str(small_store))[5:75], TeacherCache(str(sampled_store))[:110]]


def mix(caches: list[TeacherCache], *weights: float, seed: int = 0) -> Mixture:
    mixture = TeacherCache.mix(caches, list(weights) or None, seed)
    assert isinstance(mixture, Mixture)
    return mixture


def seen(
    batches: ShuffledBatches, workers: int = 0, epoch: int = 0, batch: int = 0, method: str = "fork"
) -> list[list[int]]:
    """The samples of each batch, through a DataLoader."""
    batches.set_epoch(epoch, batch)
    context = method if workers else None
    loader = DataLoader(batches, batch_size=None, num_workers=workers, multiprocessing_context=context)
    return [found["sample"].tolist() for found in loader]


def of_store(caches: list[TeacherCache], number: int) -> tuple[int, int]:
    """Which store a sample of a mixture is of, and its number there."""
    store = 0
    while number >= caches[store].attributes["num_samples"]:
        number -= caches[store].attributes["num_samples"]
        store += 1
    return store, number


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (3, 2), (2, 3)])
def test_shares_are_exact_over_all_ranks_and_readers(world_size: int, workers: int, caches: list[TeacherCache]) -> None:
    """Of 70 and 110 samples, 3 to 1: 70 and 23 of 93 an epoch. Each sample once; in every batch of either store."""
    mixture = mix(caches, 3, 1)
    ranks = [mixture.shuffled(BATCH, 5, rank, world_size, window_blocks=3) for rank in range(world_size)]
    times: Counter[tuple[int, int]] = Counter()
    orders = []
    for epoch in range(6):
        found = [seen(batches, workers, epoch) for batches in ranks]
        assert {len(batches) for batches in found} == {ranks[0].batches_per_epoch(workers)}
        epoch_of = [of_store(caches, i) for batches in found for batch in batches for i in batch if i >= 0]
        assert len(epoch_of) == len(set(epoch_of)) == len(mixture) == 93
        assert Counter(store for store, _ in epoch_of) == {0: 70, 1: 23}
        assert {number for store, number in epoch_of if store == 0} == set(range(5, 75))
        times.update(epoch_of)
        second = [times[1, number] for number in range(110)]
        assert max(second) - min(second) <= 1  # none again before all have come
        for batch in (batch for batches in found for batch in batches if batch != [-1]):
            assert abs(sum(of_store(caches, i)[0] == 1 for i in batch) - len(batch) * 23 / 93) <= 1
        orders.append(epoch_of)
    assert orders[0][:20] != orders[1][:20]
    assert min(times[1, number] for number in range(110)) == 1


def test_without_weights_all_samples_come(caches: list[TeacherCache]) -> None:
    mixture = mix(caches)
    assert len(mixture) == 180
    assert mixture.per_epoch == [70, 110]
    for epoch in range(2):
        found = [of_store(caches, i) for batch in seen(mixture.shuffled(BATCH), epoch=epoch) for i in batch]
        assert sorted(found) == [(0, i) for i in range(5, 75)] + [(1, i) for i in range(110)]
        firsts = [sum(store == 0 for store, _ in found[:at]) for at in range(181)]
        assert max(abs(first - at * 70 / 180) for at, first in enumerate(firsts)) <= 1  # throughout the epoch


def same(found: Sample, expected: Sample, columns: list[int]) -> None:
    """The sample of a mixture, from a cache of temperature 1 as well, beside that of its store."""
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"sample"}:
        values = expected[name][:, columns] if name in ("logsumexp", "tail_logprob") else expected[name]
        torch.testing.assert_close(found[name], values, rtol=0, atol=0, equal_nan=True)


def test_samples_and_batches_have_what_their_store_says(caches: list[TeacherCache]) -> None:
    """Every value, of both methods and widths; the columns of temperature 1, which is the one that both have."""
    mixture = mix(caches, 1, 1)
    assert mixture.temperatures == [1.0]
    assert mixture.attributes["k"] == 16
    assert len(mixture) == 140
    assert mixture.lengths == [len(sample["tokens"]) for sample in mixture]
    assert mixture.num_tokens == sum(mixture.lengths)
    assert mixture.max_length == max(cache.max_length for cache in caches)
    by_number = {sample["sample"]: sample for sample in mixture}
    for number, sample in by_number.items():
        store, own = of_store(caches, number)
        same(sample, caches[store][own - 5 * (store == 0)], [0])
    rows = 0
    for batch in mixture.shuffled(BATCH):
        assert batch["target_ids"].shape[2] == (16 if (batch["sample"] >= 1177).any() else 8)
        expected = collate([by_number[i] for i in batch["sample"].tolist()])
        for name, values in batch.items():
            torch.testing.assert_close(values, expected[name], rtol=0, atol=0, equal_nan=True)
        for row, number in enumerate(batch["sample"].tolist()):
            sample = by_number[number]
            length, k = sample["target_ids"].shape
            assert batch["target_ids"][row, :length, :k].equal(sample["target_ids"])
            assert (batch["target_ids"][row, :length, k:] == -1).all()
            assert not batch["target_logprobs"][row, :length, k:].isfinite().any()
            assert batch["loss_mask"][row].sum() == length - 1
            rows += 1
    assert rows == 140


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_an_epoch_goes_on_exactly_where_it_was(workers: int, caches: list[TeacherCache]) -> None:
    batches = mix(caches, 3, 1).shuffled(5, 1, 1, 2, window_blocks=2)
    whole = seen(batches, workers, epoch=4)
    for done in range(1, len(whole) + 1) if workers == 0 else (1, 2, 4, len(whole)):
        assert seen(batches, workers, epoch=4, batch=done) == whole[done:]


def test_a_stateful_loader_goes_on_without_replay(caches: list[TeacherCache], monkeypatch: pytest.MonkeyPatch) -> None:
    """torchdata's protocol, resumed and resumed again: what was seen is not read."""
    monkeypatch.setattr("distill.reading.shuffle.get_worker_info", lambda: SimpleNamespace(id=1, num_workers=2))
    mixture = mix(caches, 3, 1)
    batches = mixture.shuffled(5, 1, 1, 2)
    batches.set_epoch(4, 1)
    stream, states, numbers = iter(batches), [batches.state_dict()], []
    for batch in stream:
        numbers.append(batch["sample"].tolist())
        states.append(json.loads(json.dumps(batches.state_dict())))
    assert len(numbers) > 2
    loads: list[int] = []
    plain = Part.sample

    def counting(self: Part, *where: Any) -> Sample:
        loads.append(1)
        return plain(self, *where)

    monkeypatch.setattr(Part, "sample", counting)
    for taken, state in enumerate(states):
        resumed = mixture.shuffled(5, 1, 1, 2)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state  # also before it goes on
        again = iter(resumed)
        if taken + 1 < len(states):
            assert next(again)["sample"].tolist() == numbers[taken]
            assert resumed.state_dict() == states[taken + 1]
        twice = mixture.shuffled(5, 1, 1, 2)
        twice.load_state_dict(resumed.state_dict())
        loads.clear()
        assert [batch["sample"].tolist() for batch in twice] == numbers[taken + 1 :]
        assert len(loads) == sum(i >= 0 for batch in numbers[taken + 1 :] for i in batch)


def test_what_the_order_depends_on(caches: list[TeacherCache]) -> None:
    one = seen(mix(caches, 3, 1).shuffled(BATCH))
    assert seen(mix(caches, 3, 1).shuffled(BATCH)) == one
    assert seen(mix(caches, 0.75, 0.25).shuffled(BATCH)) == one  # weights are relative
    assert seen(mix(caches, 3, 1).shuffled(BATCH, seed=1)) != one
    first, other = (
        {i for batch in found for i in batch} for found in (one, seen(mix(caches, 3, 1, seed=1).shuffled(BATCH)))
    )
    assert first != other  # of the larger store: which ones come first
    assert {i for batch in seen(mix(caches, 3, 1).shuffled(BATCH, seed=1)) for i in batch} == first


def test_one_store_is_as_if_there_were_no_mixture(caches: list[TeacherCache]) -> None:
    assert TeacherCache.mix(caches[:1]) is TeacherCache.mix(caches[:1], [0.3]) is caches[0]


def test_readers_that_are_spawned_and_live_on(caches: list[TeacherCache], small_store: Path) -> None:
    remote = TeacherCache(f"file://{small_store}")[5:75]
    expected = [seen(mix(caches, 3, 1).shuffled(BATCH), 2, epoch) for epoch in range(2)]
    batches = mix([remote, caches[1]], 3, 1).shuffled(BATCH)
    loader = DataLoader(
        batches, batch_size=None, num_workers=2, persistent_workers=True, multiprocessing_context="forkserver"
    )
    for epoch in range(2):
        batches.set_epoch(epoch)
        assert [found["sample"].tolist() for found in loader] == expected[epoch]


def test_as_a_sequence_it_is_the_epoch_that_it_was_told(caches: list[TeacherCache]) -> None:
    mixture = mix(caches, 3, 1)
    for epoch in (0, 1, 7, 0):
        mixture.set_epoch(epoch)
        numbers = [sample["sample"] for sample in mixture]
        assert sorted(numbers) == sorted(i for batch in seen(mixture.shuffled(BATCH), epoch=epoch) for i in batch)
        assert numbers == sorted(numbers)
        assert mixture[-1]["sample"] == numbers[-1]
        assert mixture.lengths == [len(sample["tokens"]) for sample in mixture]
        for which in (slice(3, 80), slice(60, None, 5), slice(None, None, -1), slice(85, 2, -3), slice(0, 0), slice(4)):
            part = mixture[which]
            assert [sample["sample"] for sample in part] == numbers[which]
            assert [sample["sample"] for sample in part[::-1]] == numbers[which][::-1]
    with pytest.raises(IndexError, match="expected a sample from -93 to 92, found 93"):
        mixture[93]
    mixture.set_epoch(2)
    copy = pickle.loads(pickle.dumps(mixture))
    assert [sample["sample"] for sample in copy] == [sample["sample"] for sample in mixture]
    loader = DataLoader(
        mixture, 4, num_workers=2, persistent_workers=True, collate_fn=collate, multiprocessing_context="spawn"
    )
    for epoch in (2, 3):
        mixture.set_epoch(epoch)
        assert [i for batch in loader for i in batch["sample"].tolist()] == [one["sample"] for one in mixture]


def test_held_out_by_shares_and_whole_examples(caches: list[TeacherCache]) -> None:
    train, held_out = mix(caches, 3, 1).split(24, seed=3)
    assert isinstance(train, Mixture)
    assert isinstance(held_out, Mixture)
    assert [len(part) for part in held_out.parts] == held_out.per_epoch
    assert 18 <= len(held_out.parts[0]) <= 20
    assert 6 <= len(held_out.parts[1]) <= 8  # the last example may have several windows
    for cache, *sides in zip(caches, train.parts, held_out.parts, strict=True):
        numbers = [{sample["sample"] for sample in side} for side in sides]
        assert numbers[0] | numbers[1] == {sample["sample"] for sample in cache}
        index = cache._reader.store.read_all("sample_index")
        assert not {index[i] for i in numbers[0]} & {index[i] for i in numbers[1]}
        assert [sample["sample"] for sample in sides[1]] == [
            sample["sample"] for sample in cache.split(18 if cache is caches[0] else 6, seed=3)[1]
        ]
    assert train.per_epoch == [len(train.parts[0]), round(len(train.parts[0]) / 3)]
    nothing = mix(caches, 3, 1).split(0)
    assert [len(side) for side in nothing] == [93, 0]
    by_size = mix(caches).split(18)[1]
    assert 7 <= by_size.per_epoch[0] <= 9
    assert 11 <= by_size.per_epoch[1] <= 13
    with pytest.raises(ConfigError, match=r"expected to leave some of the 70 samples of .*small\.zarr to train on"):
        mix(caches, 3, 1).split(93)


def test_what_is_held_out_of_one_teacher_is_not_trained_on_with_another(
    sampled_store: Path, other_teacher: Path, small_store: Path
) -> None:
    """Two stores of one dataset, in windows of other lengths, and one of another dataset."""
    parts = [TeacherCache(str(path)) for path in (sampled_store, small_store, other_teacher)]
    mixture = mix(parts, 2, 1, 1)
    largest = sum(max(Counter(part._sources().tolist()).values()) for part in parts)
    for wanted, sides in ((40, mixture.split(40)), (30, mixture.split(40)[0].split(30))):
        train, held_out = (
            [
                {cache._reader.store.read_all("sample_index")[sample["sample"]] for sample in part}
                for part, cache in zip(side.parts, parts, strict=True)
            ]
            for side in sides
        )
        assert held_out[2]
        assert held_out[2] <= held_out[0]
        assert not (train[0] | train[2]) & held_out[0]
        assert not train[1] & held_out[1]
        assert wanted <= len(sides[1]) < wanted + largest  # the last example of a dataset is taken whole


def test_three_stores_of_other_temperatures_and_without_masks(
    sampled_store: Path, other_teacher: Path, small_store: Path, tmp_path: Path
) -> None:
    masked = TeacherCache(str(masked_store(small_store, tmp_path / "masked.zarr", range(0, 1177, 2))))[:40]
    parts = [masked, TeacherCache(str(other_teacher))[:40]]
    mixture = mix(parts)
    assert mixture.temperatures == [1.0, 2.0]  # [2.0, 1.0] in the second
    assert "loss_mask" not in mixture.arrays
    for i, sample in enumerate(mixture):
        same(sample, parts[i // 40][i % 40], [0, 1] if i < 40 else [1, 0])
    (batch,) = mixture.shuffled(80)
    for number, mask in zip(batch["sample"].tolist(), batch["loss_mask"], strict=True):
        store, own = of_store(parts, number)
        assert mask.sum() == (own % 2 == 0 if store == 0 else len(parts[1][own]["tokens"]) - 1)
    assert "teacher" in mixture.attributes
    three = mix([*parts, TeacherCache(str(sampled_store))])
    assert three.temperatures == [1.0]
    assert not {"teacher", "method", "fingerprint", "digest"} & three.attributes.keys()  # no one's is all's
    kept = three.select(lambda sample: sample["sample"] % 3 == 0)
    assert [sample["sample"] for sample in kept] == [s["sample"] for s in three if s["sample"] % 3 == 0]


def test_an_array_that_one_store_lacks_is_left_out(caches: list[TeacherCache], monkeypatch: pytest.MonkeyPatch) -> None:
    """next_logprob, of a store of before there was one: no batch has it, whatever stores are in the batch."""
    plain = RowReader.read
    old = caches[0]._reader

    def read(self: RowReader, *rows: int) -> Any:
        found = plain(self, *rows)
        return {name: found[name] for name in found if self is not old or name != "next_logprob"}

    monkeypatch.setattr(RowReader, "read", read)
    monkeypatch.setattr(
        TeacherCache,
        "arrays",
        property(
            lambda self: frozenset(self._reader.store.captured) - ({"next_logprob"} if self._reader is old else set())
        ),
    )
    mixture = mix(caches, 1, 1)
    assert "next_logprob" not in mixture.arrays
    assert not any("next_logprob" in sample for sample in mixture)
    assert not any("next_logprob" in batch for batch in mixture.shuffled(2))


def test_no_more_than_a_window_is_in_memory(
    sampled_store: Path, small_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window's pieces are shared out by what is read of each store; every piece is read once."""
    parts = [TeacherCache(str(small_store)), TeacherCache(str(sampled_store))]
    loads: list[tuple[str, int]] = []
    plain = RowReader.read

    def counting(self: RowReader, start: int, stop: int) -> Any:
        loads.append((self.path, start))
        return plain(self, start, stop)

    monkeypatch.setattr(RowReader, "read", counting)
    stream = iter(mix(parts).shuffled(BATCH, window_blocks=10))
    next(stream)
    blocks = [part._reader.store.num_blocks for part in parts]
    shares = [max(1, 10 * number // sum(blocks)) for number in blocks]
    assert [sum(path == part.path for path, _ in loads) for part in parts] == shares
    assert 9 <= sum(shares) <= 10
    list(stream)
    assert len(loads) == len(set(loads)) == sum(blocks)


def test_what_is_refused(caches: list[TeacherCache], small_store: Path, tmp_path: Path) -> None:
    small, sampled = (cache.path for cache in caches)
    both = f"for each of {small}, {sampled}, found"
    for weights in ([0.5], [0.5, 0.3, 0.2], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")], []):
        with pytest.raises(ConfigError, match=f"^weights: expected a number > 0 {both}"):
            TeacherCache.mix(caches, weights)
    with pytest.raises(ConfigError, match=rf"^weights: expected a number > 0 for each of {small}, found \[1, 2\]"):
        TeacherCache.mix(caches[:1], [1, 2])
    with pytest.raises(ConfigError, match=rf"found none of the 110 of {sampled} in an epoch of 70$"):
        TeacherCache.mix(caches, [1, 0.001])
    with pytest.raises(ConfigError, match=rf"found none of the 0 of {sampled} in an epoch of 0$"):
        TeacherCache.mix([caches[0], caches[1][:0]], [1, 1])
    assert len(TeacherCache.mix([caches[0], caches[1][:0]])) == 70
    with pytest.raises(ConfigError, match="expected caches to mix, found none"):
        TeacherCache.mix([])
    with pytest.raises(ConfigError, match="expected caches of single stores to mix, found a Mixture"):
        TeacherCache.mix([mix(caches), caches[0]])
    whole = TeacherCache(small)
    with pytest.raises(ConfigError, match=rf"found {small} and {small}, which are the same one"):
        TeacherCache.mix([whole[:50], whole[50:]])
    shutil.copytree(small_store, tmp_path / "other.zarr")
    other, copy = str(tmp_path / "other.zarr"), TeacherCache(str(tmp_path / "other.zarr"))
    with pytest.raises(ConfigError, match="which are the same one"):
        TeacherCache.mix([whole, copy])
    for tokenizer in (
        {"vocab_size": 262, "vocab_digest": "0"},
        {"vocab_size": 300, "vocab_digest": "af4f83c0df8e62fd"},
    ):
        reseal(tmp_path / "other.zarr", tokenizer=tokenizer)
        with pytest.raises(
            ConfigError, match=rf"one vocabulary to mix, found 262 tokens \(\w+\) in {small} and .*{other}$"
        ):
            TeacherCache.mix([whole, TeacherCache(other)])
    reseal(tmp_path / "other.zarr", tokenizer=whole.attributes["tokenizer"], vocab_size=1024)  # padded otherwise
    assert TeacherCache.mix([whole, TeacherCache(other)]).attributes["vocab_size"] == 1024
    reseal(tmp_path / "other.zarr", complete=False)
    with pytest.raises(StoreError, match=rf"{other}: expected a complete store to mix, found an unfinished one"):
        TeacherCache.mix([whole, TeacherCache(other, allow_unfinished=True)])
    silent = TeacherCache(str(masked_store(small_store, tmp_path / "silent.zarr", [])))
    with pytest.raises(DataError, match=r"silent\.zarr: expected tokens to learn from in the 1,177 samples to mix"):
        TeacherCache.mix([silent, caches[1]])


def test_sizes_of_one_and_more_runs_than_samples(caches: list[TeacherCache]) -> None:
    tiny = mix([caches[0][:1], caches[1][:1]])
    found = [seen(tiny.shuffled(BATCH, rank=rank, world_size=3), 2) for rank in range(3)]
    assert sorted(i for batches in found for batch in batches for i in batch) == [-1] * 4 + [5, 1177]
    assert np.ptp([len(batches) for batches in found]) == 0
