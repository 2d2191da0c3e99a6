"""Resident memory of each worker of one replica, after loading and a first pass, and its share of the weights.

torchrun --nproc_per_node 4 -m tests.benchmarks.share_memory tensor FOLDER     # or pipeline, or data with one worker
"""

import re
import sys
import threading
import time
from pathlib import Path

import torch

from distill.config.generate import TeacherConfig
from distill.run.board import Board, store_of
from distill.run.grid import Grid
from distill.run.groups import process_group
from distill.teacher.loading import load
from distill.teacher.model import Teacher, slice_bytes
from distill.teacher.placement import Needs, Placement
from distill.teacher.source import locate

CPU = torch.device("cpu")


def resident(kind: str) -> float:
    """MiB of this process: VmRSS, all of it; RssAnon, what is not mapped from files."""
    found = re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def main(mode: str, folder: str) -> None:
    """Load one replica on all workers of this machine, run it once, and print how much each has grown at its peak."""
    torch.set_num_threads(1)
    grid = Grid.from_environment()
    grid, board = grid.sharded(grid.world_size), Board(store_of(grid))
    source = locate(TeacherConfig(model=folder))
    needs = Needs.of(source, torch.float32, 1024, slice_bytes(CPU))
    peak = before = {kind: resident(kind) for kind in ("VmRSS", "RssAnon")}
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.002):
            peak = {kind: max(most, resident(kind)) for kind, most in peak.items()}

    watching = threading.Thread(target=watch)
    watching.start()
    with process_group(grid, CPU, 600):
        placement = Placement(mode, grid.world_size)
        model, share = load(source, CPU, placement, needs, None, Path("unused"))
        own = sum(
            (weight.to_local() if hasattr(weight, "to_local") else weight).numel() for weight in model.parameters()
        )
        board.meet("loaded", grid.world_size)
        Teacher(model, CPU, share)
        board.meet("ran", grid.world_size)
    over.set()
    watching.join()
    grown = {kind: f"{peak[kind] - before[kind]:.0f} MiB" for kind in peak}
    print(
        f"worker {grid.rank}: {own * 4 / 2**20:.0f} of {needs.parameters / 2**20:.0f} MiB of weights; "
        f"resident + {grown['VmRSS']}, of which {grown['RssAnon']} its own",
        flush=True,
    )
    time.sleep(0.5)


if __name__ == "__main__":
    main(*sys.argv[1:])
