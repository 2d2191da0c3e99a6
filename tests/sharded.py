"""Several runs of distill.generate in one launch, since starting the workers costs more than the runs.

    torchrun --nproc_per_node 4 -m tests.sharded RUNS.json

RUNS.json is a list of {"arguments": [...], "damage": 1.01}; the damage, if any, scales a weight of the last worker of
each replica. Beside each store lie STORE.captured.RANK.pt, what was captured, in float32, before it was rounded, and
STORE.loaded.RANK.json, how many numbers of each weight the worker loaded.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

import distill.teacher.loading
from distill.config.generate import GenerateConfig
from distill.generate import generate
from distill.run.board import shared_store
from distill.run.grid import Grid
from distill.run.session import Session
from distill.settings import load
from distill.teacher.model import Teacher


class Quiet(Session):
    """A session that leaves logging and the console alone."""

    def open(self, log_dir: str, name: str) -> None:
        """Only make the folder."""
        Path(log_dir).mkdir(parents=True, exist_ok=True)


def record(found: dict[bytes, Any]) -> Any:
    """Teacher.capture, which also puts what it captures into `found`, by the tokens of the batch."""
    own = Teacher.capture

    def capture(teacher: Teacher, samples: Any, *settings: Any) -> Any:
        captured = own(teacher, samples, *settings)
        if captured is not None:
            found[b"|".join(sample.tobytes() for sample in samples)] = vars(captured)
        return captured

    return capture


def watched(factor: float | None, loaded: dict[str, int]) -> Any:
    """teacher.load, which also notes what was loaded, and scales one weight of a replica's last worker."""
    own = distill.teacher.loading.load

    def load(*arguments: Any) -> Any:
        model, share = own(*arguments)
        for name, weight in model.named_parameters():
            loaded[name] = (weight.to_local() if hasattr(weight, "to_local") else weight).numel()
        if factor and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            weight = [weight for name, weight in model.named_parameters() if "down_proj" in name][-1]
            weight.data.mul_(factor)
        return model, share

    return load


def main(file: str) -> None:
    """Do the runs of `file`, one after the other."""
    grid = Grid.from_environment()
    plain = distill.teacher.loading.load, Teacher.capture
    for run in json.loads(Path(file).read_text()):
        captured: dict[bytes, Any] = {}
        loaded: dict[str, int] = {}
        Teacher.capture = record(captured)  # type: ignore[method-assign]
        distill.teacher.loading.load = watched(run.get("damage"), loaded)
        config = load(GenerateConfig, run["arguments"])
        shared_store.cache_clear()  # a round of its own
        generate(config, grid, Quiet(grid.rank))
        distill.teacher.loading.load, Teacher.capture = plain  # type: ignore[method-assign]
        Path(f"{config.store.path}.loaded.{grid.rank}.json").write_text(json.dumps(loaded))
        if captured:
            torch.save(captured, f"{config.store.path}.captured.{grid.rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
