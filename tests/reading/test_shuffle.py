"""Each sample comes once per epoch for any ranks and workers; all make the same steps; an epoch can be resumed."""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from distill import TeacherCache
from distill.errors import ConfigError
from distill.reading.samples import RowReader
from distill.reading.shuffle import Part, ShuffledBatches

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, on purpose
BATCH = 7


def shuffled(
    cache: TeacherCache, rank: int = 0, world_size: int = 1, seed: int = 5, window_blocks: int = 3
) -> ShuffledBatches:
    return cache.shuffled(BATCH, seed, rank, world_size, window_blocks=window_blocks)


def seen(
    batches: ShuffledBatches, workers: int, epoch: int = 0, batch: int = 0, method: str = "fork"
) -> list[list[int]]:
    """The samples of each batch, through a DataLoader."""
    batches.set_epoch(epoch, batch)
    context = method if workers else None
    loader = DataLoader(batches, batch_size=None, num_workers=workers, multiprocessing_context=context)
    return [found["sample"].tolist() for found in loader]


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_sample_once_and_as_many_batches_everywhere(small_store: Path, world_size: int, workers: int) -> None:
    cache = TeacherCache(str(small_store))[: 401 + world_size]  # sizes that no number of ranks or workers divides
    ranks = [shuffled(cache, rank, world_size) for rank in range(world_size)]
    found = [seen(batches, workers) for batches in ranks]
    assert {len(batches) for batches in found} == {ranks[0].batches_per_epoch(workers)}
    samples = [i for batches in found for batch in batches for i in batch if i >= 0]
    assert sorted(samples) == list(range(len(cache)))
    assert all(batch == [-1] for batches in found for batch in batches if -1 in batch)
    per_rank = [sum(i >= 0 for batch in batches for i in batch) for batches in found]
    assert max(per_rank) - min(per_rank) <= max(1, workers)


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_an_epoch_goes_on_exactly_where_it_was(small_store: Path, workers: int) -> None:
    batches = shuffled(TeacherCache(str(small_store))[:150], 1, 2)
    whole = seen(batches, workers, epoch=4)
    for done in (1, 2, 4, len(whole) - 1, len(whole)):
        assert seen(batches, workers, epoch=4, batch=done) == whole[done:]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("done", [0, 2])
def test_a_stateful_loader_goes_on_without_replay(
    workers: int, done: int, small_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchdata's protocol: state_dict in a worker after a batch; load_state_dict in a new one, before it iterates."""
    cache = TeacherCache(str(small_store))[:150]

    def worker_of(i: int) -> ShuffledBatches:
        monkeypatch.setattr(
            "distill.reading.shuffle.get_worker_info", lambda: SimpleNamespace(id=i, num_workers=workers)
        )
        return shuffled(cache, 1, 2)

    for i in range(workers):
        batches = worker_of(i)
        batches.set_epoch(4, done)
        stream, states, numbers = iter(batches), [batches.state_dict()], []
        for batch in stream:
            numbers.append(batch["sample"].tolist())
            states.append(json.loads(json.dumps(batches.state_dict())))
        assert len(numbers) > 1
        next_epoch = [batch["sample"].tolist() for batch in batches]
        for taken, state in enumerate(states):
            resumed = worker_of(i)
            resumed.load_state_dict(state)
            loads: list[int] = []
            plain = Part.sample
            monkeypatch.setattr(Part, "sample", lambda *a, plain=plain, loads=loads: loads.append(1) or plain(*a))
            assert [batch["sample"].tolist() for batch in resumed] == numbers[taken:]
            monkeypatch.setattr(Part, "sample", plain)
            assert len(loads) == sum(i >= 0 for batch in numbers[taken:] for i in batch)  # what was seen is not read
            resumed.set_epoch(4, done)
            assert [batch["sample"].tolist() for batch in resumed] == next_epoch


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("dispatch", [None, False, True])
@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_does_not_share_out_what_is_shared_out(
    processes: int, dispatch: bool | None, workers: int, small_store: Path
) -> None:
    from accelerate.data_loader import prepare_data_loader
    from accelerate.state import PartialState

    PartialState(cpu=True)
    loader = DataLoader(shuffled(TeacherCache(str(small_store)), 0, processes), batch_size=None, num_workers=workers)
    prepared = prepare_data_loader(
        loader, torch.device("cpu"), processes, 0, put_on_device=True, dispatch_batches=dispatch
    )
    with pytest.raises(ConfigError, match=r"accelerator\.prepare: expected no loader of ShuffledBatches, found one"):
        next(iter(prepared))


def test_fewer_samples_than_workers(small_store: Path) -> None:
    cache = TeacherCache(str(small_store))[:2]
    found = [seen(shuffled(cache, rank, 2), 2) for rank in range(2)]
    assert [len(batches) for batches in found] == [2, 2]
    assert sorted(i for batches in found for batch in batches for i in batch) == [-1, -1, 0, 1]


def test_what_the_order_depends_on(small_store: Path) -> None:
    cache = TeacherCache(str(small_store))[:400]
    one = seen(shuffled(cache), 0)
    assert seen(shuffled(cache), 0) == one
    assert seen(shuffled(cache, seed=6), 0) != one
    assert seen(shuffled(cache), 0, epoch=1) != one
    flat = torch.tensor([i for batch in one for i in batch]).double()
    in_store = torch.arange(len(flat)).double()
    assert torch.corrcoef(torch.stack([flat, in_store]))[0, 1].abs() < 0.2  # 0.05 expected
    inside = [abs(a - b) for batch in one for a, b in pairwise(batch)]
    assert sorted(inside)[len(inside) // 2] > BATCH  # neighbours in a batch were no neighbours in the store


def test_persistent_workers_see_the_epoch(small_store: Path) -> None:
    batches = shuffled(TeacherCache(str(small_store))[:100])
    loader = DataLoader(
        batches, batch_size=None, num_workers=2, persistent_workers=True, multiprocessing_context="fork"
    )
    orders = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        orders.append([found["sample"].tolist() for found in loader])
    assert orders == [seen(batches, 2, epoch) for epoch in range(2)]


def test_spawned_workers_read_local_stores_and_urls(small_store: Path) -> None:
    local = shuffled(TeacherCache(str(small_store))[:60])
    expected = seen(local, 1)
    remote = shuffled(TeacherCache(f"file://{small_store}")[:60])
    assert seen(remote, 1, method="forkserver") == expected
    assert seen(local, 1, method="spawn") == expected


def test_no_more_than_a_window_is_in_memory(small_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[int] = []
    plain = RowReader.read

    def counting(self: RowReader, start: int, stop: int) -> Any:
        loads.append(start)
        return plain(self, start, stop)

    monkeypatch.setattr(RowReader, "read", counting)
    stream = iter(shuffled(TeacherCache(str(small_store)), window_blocks=2))
    next(stream)
    assert len(loads) == 2
    list(stream)
    assert len(loads) == len(set(loads)) == len(TeacherCache(str(small_store))._reader.store.read_all("commits"))
