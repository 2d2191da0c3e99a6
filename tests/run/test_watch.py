"""A worker that hangs is named; a slow one is not."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distill.errors import PeerError
from distill.run.board import Board
from distill.run.grid import Grid
from distill.run.watch import Watch

Work = Callable[[Watch], None]


def together(works: list[Work], timeout: float, shard_size: int = 1, frozen: int | None = None) -> list[PeerError]:
    """Let a worker in a thread do each work under a watch; the alarms. `frozen`: a worker whose watch thread stands."""
    board, alarms = Board(torch.distributed.HashStore()), list[PeerError]()
    grids = [Grid(rank=rank, world_size=len(works), shard_size=shard_size) for rank in range(len(works))]

    def run(grid: Grid) -> None:
        watch = Watch(board, grid, timeout, alarms.append)
        with watch:
            if grid.rank == frozen:
                time.sleep(timeout / 4)
                watch._over.set()
            works[grid.rank](watch)

    threads = [threading.Thread(target=run, args=(grid,)) for grid in grids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return alarms


def steady(watch: Watch, seconds: float = 2.0) -> None:
    for _ in range(int(seconds / 0.05)):
        watch.beat()
        time.sleep(0.05)
    watch.rest()


def hangs(watch: Watch) -> None:
    watch.beat()
    time.sleep(2.0)
    watch.rest()


@pytest.mark.parametrize("who", [0, 1, 2])
def test_who_makes_no_progress_is_named(who: int, caplog: pytest.LogCaptureFixture) -> None:
    alarms = together([hangs if rank == who else steady for rank in range(3)], timeout=0.5)
    assert [alarm.ranks for alarm in alarms] == [[who]]
    assert str(alarms[0]) == f"worker {who} has made no progress for 0.5 s (timeout_seconds)"
    assert "no progress for 0.5 s, at:" in caplog.text  # and where it stands


@pytest.mark.parametrize("who", [0, 2])
def test_a_frozen_process_is_named(who: int) -> None:
    alarms = together([steady] * 3, timeout=0.5, frozen=who)
    assert [alarm.ranks for alarm in alarms] == [[who]]


def test_slow_early_and_finished_workers_are_left_alone() -> None:
    def slow(watch: Watch) -> None:
        for _ in range(4):
            watch.beat()
            time.sleep(0.4)

    def late(_: Watch) -> None:
        time.sleep(1.5)

    def early(watch: Watch) -> None:
        watch.beat()

    assert together([steady, slow, late, early], timeout=0.8) == []
    assert together([late, slow], timeout=0.8) == []


def test_in_lockstep_who_did_least_is_named() -> None:
    """One of two that wait for each other hangs; both stand still."""

    def victim(watch: Watch) -> None:
        watch.beat()
        hangs(watch)

    alarms = together([victim, hangs, steady, steady], timeout=0.5, shard_size=2)
    assert [alarm.ranks for alarm in alarms] == [[1]]


def test_in_lockstep_who_waits_for_a_slow_one_is_left_alone() -> None:
    assert together([steady, hangs], timeout=0.5, shard_size=2) == []


def test_in_lockstep_who_hangs_is_named_although_others_are_done() -> None:
    def done(watch: Watch) -> None:
        watch.beat()
        watch.rest()
        time.sleep(2.0)

    assert [alarm.ranks for alarm in together([hangs, done], timeout=0.5, shard_size=2)] == [[0]]


def test_every_layer_is_progress(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    watch = Watch(Board(torch.distributed.HashStore()), Grid(), 600, print)
    model = Model()
    watch.follow(model)
    model(torch.zeros(2))
    assert watch._beats == 3
