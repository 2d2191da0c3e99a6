"""Checkpoints of a training run: everything that the next step depends on.

``<folder>/step_<n>/state.pt`` holds {step, settings, model, optimizer, scheduler}; ``rng_<rank>.pt`` holds the state of
one worker's random numbers. The position of the reader follows from the step. A checkpoint gets its name when it is
whole. The newest two are kept.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from distill.config import TrainConfig
from distill.errors import ConfigError
from distill.run.nodes import PROBE
from distill.store.fingerprint import differences

_KEPT = 2
_OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True)


def settings_of(
    config: TrainConfig, store: str, student: Mapping[str, str], world_size: int, total_steps: int
) -> dict[str, Any]:
    """The settings that a run's losses follow from, as a flat mapping. Only a run with the same ones is continued.

    store, student: fingerprints
    """
    found: dict[str, Any] = {
        "store": store,
        **{name.replace("teacher", "student"): value for name, value in student.items()},
        "workers": world_size,
        "steps": total_steps,
        "evaluation.samples": config.evaluation.samples,
    }
    for section in ("student", "loss", "optimizer", "batch"):
        found |= {f"{section}.{name}": value for name, value in asdict(getattr(config, section)).items()}
    return found | {"parallel": config.parallel, "autocast": config.autocast, "seed": config.seed}


def find(output: Path, settings: Mapping[str, Any]) -> tuple[Path | None, int]:
    """The newest checkpoint of the run in `output`, and its step; None and 0 where there is none.

    Raises ConfigError for a checkpoint of a run with other `settings`, and for a folder that is not a run's.
    """
    latest = newest(output / "checkpoints")
    if latest is not None:
        state = _load(latest)
        if differing := differences(state["settings"], settings, "the checkpoint"):
            raise ConfigError(
                f"output: {output} has another run's checkpoints; choose another folder, or delete it:\n  "
                + "\n  ".join(differing)
            )
        return latest, int(state["step"])
    entries = [entry.name for entry in output.iterdir()] if output.is_dir() else []
    if any(not name.startswith(PROBE) for name in entries) and "metrics.jsonl" not in entries:
        raise ConfigError(
            f"output: expected a new or empty folder, or one of an earlier run, found other files in {output}"
        )
    return None, 0


def newest(folder: Path) -> Path | None:
    """The last whole checkpoint in `folder`, or None."""
    found = [entry for entry in folder.glob("step_*") if entry.suffix != ".partial"]
    return max(found, key=lambda entry: int(entry.name.removeprefix("step_")), default=None)


def _load(checkpoint: Path) -> dict[str, Any]:
    """What state.pt holds. Raises ConfigError where it cannot be read."""
    try:
        state: dict[str, Any] = torch.load(checkpoint / "state.pt", map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch's, pickle's, zipfile's or the file system's
        raise ConfigError(f"output: cannot read the checkpoint {checkpoint}: {type(error).__name__}") from error
    return state


def save(
    folder: Path, step: int, settings: Mapping[str, Any], module: nn.Module, optimizer: Any, scheduler: Any
) -> None:
    """Write a checkpoint after `step`, all workers together; worker 0 writes what they share."""
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
        for stale in folder.glob("*.partial"):  # of runs that were stopped in the middle
            shutil.rmtree(stale)
        found = sorted(folder.glob("step_*"), key=lambda entry: int(entry.stem.removeprefix("step_")))
        for old in found[:-_KEPT]:
            shutil.rmtree(old)


def restore(checkpoint: Path, module: nn.Module, optimizer: Any, scheduler: Any) -> int:
    """Put a checkpoint back, all workers together; return its step."""
    state = _load(checkpoint)
    set_state_dict(
        module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=_OPTIONS
    )
    scheduler.load_state_dict(state["scheduler"])
    random = torch.load(checkpoint / f"rng_{dist.get_rank()}.pt", weights_only=True)
    torch.set_rng_state(random["cpu"])
    if "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"])
    return int(state["step"])


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
