"""Checkpoints of a training run: everything that the next step depends on.

``<folder>/step_<n>/state.pt`` holds {step, settings, model, optimizer, scheduler}, ``rng_<rank>.pt`` the state of one
worker's random numbers. Where the reader stands follows from the step. A checkpoint appears under its name when it is
whole; the newest two are kept.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from distill.errors import ConfigError

_KEPT = 2
_OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True)


def newest(folder: Path) -> Path | None:
    """The last whole checkpoint in `folder`, or None."""
    found = [entry for entry in folder.glob("step_*") if entry.suffix != ".partial"]
    return max(found, key=lambda entry: int(entry.name.removeprefix("step_")), default=None)


def read_settings(checkpoint: Path) -> tuple[int, dict[str, Any]]:
    """The step and the settings of a checkpoint. Raises ConfigError where it cannot be read."""
    try:
        state = torch.load(checkpoint / "state.pt", map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch's, pickle's, zipfile's or the file system's
        raise ConfigError(f"output: cannot read the checkpoint {checkpoint}: {type(error).__name__}") from error
    return int(state["step"]), dict(state["settings"])


def save(
    folder: Path, step: int, settings: Mapping[str, Any], module: nn.Module, optimizer: Any, scheduler: Any
) -> None:
    """Write a checkpoint after `step`, all workers together; worker 0 writes what is shared."""
    rank = dist.get_rank()
    weights, moments = get_state_dict(module, optimizer, options=_OPTIONS)
    partial = folder / f"step_{step}.partial"
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    torch.save(_random_state(), partial / f"rng_{rank}.pt")
    if rank == 0:
        state = {"step": step, "settings": dict(settings), "model": weights, "optimizer": moments}
        torch.save({**state, "scheduler": scheduler.state_dict()}, partial / "state.pt")
        for file in partial.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
    dist.barrier()
    if rank == 0:
        partial.rename(folder / f"step_{step}")
        for stale in folder.glob("*.partial"):  # of runs that were cut off in the middle
            shutil.rmtree(stale)
        found = sorted(folder.glob("step_*"), key=lambda entry: int(entry.stem.removeprefix("step_")))
        for old in found[:-_KEPT]:
            shutil.rmtree(old)


def restore(checkpoint: Path, module: nn.Module, optimizer: Any, scheduler: Any) -> None:
    """Put a checkpoint back, all workers together."""
    state = torch.load(checkpoint / "state.pt", map_location="cpu", mmap=True, weights_only=True)
    set_state_dict(
        module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=_OPTIONS
    )
    scheduler.load_state_dict(state["scheduler"])
    random = torch.load(checkpoint / f"rng_{dist.get_rank()}.pt", weights_only=True)
    torch.set_rng_state(random["cpu"])
    if "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"])


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
