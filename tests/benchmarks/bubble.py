"""How much of a pipeline's time its stages wait for each other.

    torchrun --nproc_per_node 2 -m tests.benchmarks.bubble teacher.model=FOLDER [key=value ...]

One run of distill.generate on the CPU with parallel.mode=pipeline, in which the stages' waiting is timed. The first
pass through each stage, which is late by what the stages before take, is the bubble proper; what comes on top of it is
uneven stages.
"""

import sys
import tempfile
import time
from typing import Any

import torch.distributed as dist

from distill.config.generate import GenerateConfig
from distill.generate import generate
from distill.run.board import Board, store_of
from distill.run.grid import Grid
from distill.settings import load
from distill.teacher.pipeline import Stage
from distill.teacher.worker import Worker
from tests.sharded import Quiet

waits: list[float] = []
work: list[float] = []


def timed(function: Any, into: list[float]) -> Any:
    """`function`, which also notes how many seconds it takes."""

    def call(*arguments: Any) -> Any:
        began = time.perf_counter()
        result = function(*arguments)
        into.append(time.perf_counter() - began)
        return result

    return call


def main(arguments: list[str]) -> None:
    """Run, and print each stage's share of waiting."""
    grid = Grid.from_environment()
    dist.recv = timed(dist.recv, waits)
    Stage.flush = timed(Stage.flush, waits)  # type: ignore[method-assign]
    Worker.work = _measured(Worker.work)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        own = ["parallel.mode=pipeline", f"log_dir={folder}/logs"]
        board = Board(store_of(grid))
        if grid.rank == 0:
            board.note("store of all", f"{folder}/x.zarr")
        own.append(f"store.path={board.wait('store of all')}")
        generate(load(GenerateConfig, [*arguments, *own]), grid, Quiet(grid.rank))
        board.meet("done", grid.world_size)
    print(f"stage {grid.rank}: waited {sum(waits):.1f} s of {work[0]:.1f} s, {sum(waits) / work[0]:.0%}", flush=True)


def _measured(own: Any) -> Any:
    def run(worker: Worker) -> None:
        waits.clear()  # what loading and checking took is not counted
        timed(own, work)(worker)

    return run


if __name__ == "__main__":
    main(sys.argv[1:])
