"""Students, prompts and rollouts for the tests."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch

from distill.config.rollout import RolloutConfig
from distill.rollouts import prepare
from distill.rollouts.prompts import Prompts, Reader
from distill.rollouts.sampling import Sampler, stop_ids
from distill.rollouts.worker import Worker
from distill.run.board import Board
from distill.run.device import pick_device
from distill.run.grid import Grid
from distill.run.watch import Watch
from distill.settings import load
from tests.support import environment


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(student: Path, *arguments: str, context: int | None = None) -> Prompts:
    """The prompts that these settings mean."""
    config = load(RolloutConfig, [f"student.model={student}", *arguments])
    return Reader(config.prompts, prepare.find(config)).read(context)


def sampler_of(student: Path, *arguments: str, sequences: int = 8) -> Sampler:
    """A student that writes."""
    config = load(RolloutConfig, [f"student.model={student}", *arguments])
    source = prepare.find(config)
    model = prepare.load(config, source, torch.device("cpu"))
    return Sampler(model, source, config.sampling, stop_ids(source, config.sampling.stop), sequences)


def roll_out(*arguments: str) -> list[dict[str, Any]]:
    """What distill.rollout does, by one worker, in this process. Returns the rollouts."""
    config = load(RolloutConfig, arguments)
    Path(config.log_dir).mkdir(parents=True, exist_ok=True)
    grid, board = Grid(), Board(torch.distributed.HashStore())
    device = pick_device("device", "cpu", 0, 1)
    source = prepare.find(config)
    job = prepare.plan_job(config, grid, board, source, device)
    if job is not None:
        sampler = Sampler(
            prepare.load(config, source, device), source, config.sampling, job.stops, config.batch.sequences
        )
        watch = Watch(board, grid, 600.0, lambda error: None)
        Worker(config, job, source.tokenizer, board, watch).work(sampler, job.missing)
    return rows_of(Path(config.output))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rollouts in a folder, in order."""
    return [row for file in sorted(folder.glob("*.parquet")) for row in pyarrow.parquet.read_table(file).to_pylist()]


def command(workers: int | None, arguments: Sequence[str]) -> list[str]:
    """The command line of distill.rollout; without torchrun where `workers` is None."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(workers)] if workers is not None else []
    return [sys.executable, *launcher, "-m", "distill.rollout", *arguments]


def run(folder: Path, *arguments: str, workers: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run distill.rollout in `folder`, to its end. A time-out here means that the workers have a deadlock."""
    return subprocess.run(
        command(workers, arguments), cwd=folder, env={**os.environ, **environment()}, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
