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

from distill.config.train import TrainConfig
from distill.errors import ConfigError, StorageError, disk_failure
from distill.reading.cache import TeacherCache
from distill.run.nodes import PROBE
from distill.store.fingerprint import differences
from distill.store.location import Lock, fsync
from distill.teacher.source import Source

_KEPT = 2
_OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True)


def lock_output(output: Path) -> Lock:
    """Create the folder of a run where there is none, and keep other runs out as long as what is returned lives.

    Raises ConfigError where another run is writing there, or the folder cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        return Lock(output, "output", ConfigError)
    except OSError as error:
        raise ConfigError(f"output: cannot write {output}: {error.strerror}") from error


def settings_of(
    config: TrainConfig, cache: TeacherCache, source: Source, world_size: int, total_steps: int
) -> dict[str, Any]:
    """The settings that a run's losses follow from, as a flat mapping. Only a run with the same ones is continued."""
    found: dict[str, Any] = {
        **cache.identity,
        **{name.replace("teacher", "student"): value for name, value in source.fingerprint.items()},
        "workers": world_size,
        "steps": total_steps,
        "evaluation.samples": config.evaluation.samples,
    }
    for section in ("student", "loss", "optimizer", "batch"):
        found |= {f"{section}.{name}": value for name, value in asdict(getattr(config, section)).items()}
    return found | {"parallel": config.parallel, "autocast": config.autocast, "seed": config.seed}


class Checkpoints:
    """The checkpoints of one run, in a folder of its output.

    latest, step: the newest whole one and its step; None and 0 where there is none
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], lock: Lock | None = None) -> None:
        """Look for what an earlier start of this run has left in `output`.

        lock: of `output`, held as long as this object lives.
        Raises ConfigError for a checkpoint of a run with other `settings`, and for a folder that is not a run's.
        """
        self._lock = lock
        self._folder, self._settings = output / "checkpoints", dict(settings)
        found = self._whole()
        self.latest, self.step = (found[-1] if found else None), 0
        if self.latest is not None:
            state = _load(self.latest)
            self.step = int(state["step"])
            if differing := differences(state["settings"], settings, "the checkpoint"):
                raise ConfigError(
                    f"output: {output} has another run's checkpoints; choose another folder, or delete it:\n  "
                    + "\n  ".join(differing)
                )
            return
        entries = [entry.name for entry in output.iterdir()] if output.is_dir() else []
        if any(not name.startswith(PROBE) for name in entries) and "metrics.jsonl" not in entries:
            raise ConfigError(
                f"output: expected a new or empty folder, or one of an earlier run, found other files in {output}"
            )

    def save(self, step: int, module: nn.Module, optimizer: Any, scheduler: Any) -> None:
        """Write a checkpoint after `step`, all workers together; worker 0 writes what they share.

        Raises StorageError where the disk is full, or fails; the checkpoints before stay.
        """
        rank = dist.get_rank()
        weights, moments = get_state_dict(module, optimizer, options=_OPTIONS)
        partial = self._folder / f"step_{step}.partial"
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        _write(_random_state(), partial / f"rng_{rank}.pt")
        if rank == 0:
            state = {"step": step, "settings": self._settings, "model": weights, "optimizer": moments}
            _write({**state, "scheduler": scheduler.state_dict()}, partial / "state.pt")
        dist.barrier()
        if rank == 0:
            fsync(partial)
            partial.rename(self._folder / f"step_{step}")
            fsync(self._folder)
            for stale in self._folder.glob("*.partial"):  # of runs that were stopped in the middle
                shutil.rmtree(stale)
            for old in self._whole()[:-_KEPT]:
                shutil.rmtree(old)

    def restore(self, module: nn.Module, optimizer: Any, scheduler: Any) -> None:
        """Put the latest checkpoint back, if there is one; all workers together."""
        if self.latest is None:
            return
        state = _load(self.latest)
        set_state_dict(
            module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=_OPTIONS
        )
        scheduler.load_state_dict(state["scheduler"])
        random = torch.load(self.latest / f"rng_{dist.get_rank()}.pt", weights_only=True)
        torch.set_rng_state(random["cpu"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"])

    def _whole(self) -> list[Path]:
        """The whole checkpoints, oldest first."""
        found = [entry for entry in self._folder.glob("step_*") if entry.suffix != ".partial"]
        return sorted(found, key=lambda entry: int(entry.name.removeprefix("step_")))


def _write(state: dict[str, Any], file: Path) -> None:
    """Write a file of a checkpoint, and wait until it is on disk. Where that fails, what is there of it goes."""
    try:
        with file.open("wb") as opened:
            torch.save(state, opened)
            opened.flush()
            os.fsync(opened.fileno())
    except Exception as error:  # torch's own, of which a full disk was the cause
        if not (failure := disk_failure(error)):
            raise
        shutil.rmtree(file.parent, ignore_errors=True)
        raise StorageError(f"output: cannot write the checkpoint {file.parent.with_suffix('')}: {failure}") from error


def _load(checkpoint: Path) -> dict[str, Any]:
    """What state.pt holds. Raises ConfigError where it cannot be read."""
    try:
        found = torch.load(checkpoint / "state.pt", map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch's, pickle's, zipfile's or the file system's
        raise ConfigError(f"output: cannot read the checkpoint {checkpoint}: {type(error).__name__}") from error
    return dict(found)


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
