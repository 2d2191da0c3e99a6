"""Train a student from a store: what the teacher said once is read again and again, the teacher never runs.

    python -m distill.train                                                   # the demo's store, one worker
    torchrun --nproc_per_node 8 -m distill.train configs/train_eight_gpus.yaml store.path=outputs/mine.zarr

1. open      the store; hold samples out                                      distill/reading/cache.py
2. build     the student: a checkpoint, random, or some of the teacher's layers   distill/student/model.py
3. read      shuffled batches, this worker's share                            distill/student/batches.py
4. step      the mean loss over all workers' tokens, its gradient, AdamW      distill/student/training.py
5. measure   on what was held out, now and then                               distill/student/evaluate.py
6. keep      a checkpoint now and then; at the end the student                distill/student/checkpoint.py

The same command again continues from the newest checkpoint, with the losses of a run that was never stopped.
"""

import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill import __version__
from distill.config import TrainConfig
from distill.errors import ConfigError
from distill.run.board import Board, store_of
from distill.run.grid import Grid, refuse_other_launchers
from distill.run.nodes import check_nodes
from distill.run.session import Session, run_worker
from distill.settings import to_yaml

if TYPE_CHECKING:
    import torch
    from torch import nn

    from distill.reading.cache import TeacherCache
    from distill.run.watch import Watch
    from distill.student.batches import StepBatches
    from distill.student.loss import DistillationLoss
    from distill.student.metrics import Metrics
    from distill.student.training import Training
    from distill.teacher.source import Source

logger = logging.getLogger("distill.train")  # __name__ is __main__ here


def main(arguments: Sequence[str]) -> int:
    """Run with these command-line arguments; return the exit status: 0 done, 1 failed, 2 bad usage or input."""
    return run_worker(TrainConfig, "[torchrun --nproc_per_node N | python] -m distill.train", arguments, train)


def train(config: TrainConfig, grid: Grid, session: Session) -> None:
    """The six steps above, as the worker that `grid` describes."""
    # Imported here, and below: torch, transformers and zarr take seconds, which --help or a misspelt key should not.
    from distill.run.device import pick_device
    from distill.run.groups import process_group
    from distill.run.watch import Watch
    from distill.student import metrics, model
    from distill.student.loss import DistillationLoss
    from distill.student.training import Training

    refuse_other_launchers()
    loss = DistillationLoss(**asdict(config.loss))
    device = pick_device("device", config.device, grid.local_rank, grid.local_world_size)
    session.open(config.log_dir, grid.log_name)
    board = Board(store_of(grid))
    check_nodes(grid, board, config, config.output)
    run = open_run(config, grid, loss)
    if run.is_complete:
        if grid.rank == 0:
            logger.info("%s is complete already: nothing to do", run.output)
            logger.info(metrics.summary(run.output))
        return

    grid = replace(grid, shard_size=grid.world_size)  # all workers wait for each other
    with (
        Watch(board, grid, config.timeout_seconds, session.abort) as watch,
        process_group(grid, device, config.timeout_seconds),
    ):
        student = model.build(config.student, run.source, config.seed)
        board.meet("students are built", grid.world_size)  # however long that takes
        watch.follow(student)
        training = Training(config, student, loss, run.trained_on.temperatures, run.batches.total_steps, device)
        if run.checkpoint is not None:
            training.restore(run.checkpoint)
        session.how_to_go_on = "the same command goes on from the newest checkpoint"
        measured = metrics.Metrics(run.output, training.step, visible=grid.rank == 0)
        if grid.rank == 0:
            (run.output / "config.yaml").write_text(to_yaml(config))
            announce(config, grid, run, student, training.step)
        learn(config, run, training, measured, session, watch, device)
        watch.rest()
        training.save_student(run.source.tokenizer, run.output)
        if grid.rank == 0:
            logger.info(metrics.summary(run.output))


@dataclass(frozen=True)
class Run:
    """What a run reads and where it stands, before a student is built.

    settings:   what its losses follow from; kept in its checkpoints
    checkpoint: the newest one, if any
    """

    output: Path
    source: "Source"
    trained_on: "TeacherCache"
    held_out: "TeacherCache"
    batches: "StepBatches"
    settings: dict[str, Any]
    checkpoint: Path | None
    is_complete: bool


def open_run(config: TrainConfig, grid: Grid, loss: "DistillationLoss") -> Run:
    """Open the store and the run's folder. Raises UserError where student, loss, store and folder do not match."""
    from distill.reading.cache import TeacherCache
    from distill.student import checkpoint, model
    from distill.student.batches import StepBatches

    cache = TeacherCache(config.store.path, config.store.options)
    teacher = cache.attributes["teacher"]
    source = model.find(config.student, teacher["model"], teacher["revision"])
    model.check(source, loss, cache)
    trained_on, held_out = split(cache, config)
    batches = StepBatches(trained_on, config, grid)
    settings = checkpoint.settings_of(
        config, cache.attributes["fingerprint"], source.fingerprint, grid.world_size, batches.total_steps
    )
    output = Path(config.output)
    latest, step = checkpoint.find(output, settings)
    is_complete = step == batches.total_steps and model.is_saved(output)
    return Run(output, source, trained_on, held_out, batches, settings, latest, is_complete)


def split(cache: "TeacherCache", config: TrainConfig) -> "tuple[TeacherCache, TeacherCache]":
    """What is trained on, and what is held out. Raises ConfigError where nothing is left to train on."""
    trained_on, held_out = cache.split(config.evaluation.samples, config.seed)
    if not len(trained_on):
        raise ConfigError(
            f"evaluation.samples: expected fewer than the {len(cache)} samples of {cache.path}, found "
            f"{config.evaluation.samples}: nothing is left to train on"
        )
    return trained_on, held_out


def announce(config: TrainConfig, grid: Grid, run: Run, student: "nn.Module", step: int) -> None:
    """Say what is trained, on how much, and from where."""
    logger.info(
        "distill %s, %d worker(s), %s: %s of %s parameters, %s training samples, %s held out, %s",
        __version__, grid.world_size, config.parallel, type(student).__name__,
        f"{sum(weight.numel() for weight in student.parameters()):,}",
        f"{len(run.trained_on):,}", f"{len(run.held_out):,}", f"from step {step} of {run.batches.total_steps}",
    )  # fmt: skip


def learn(
    config: TrainConfig, run: Run, training: "Training", measured: "Metrics", session: Session, watch: "Watch",
    device: "torch.device",
) -> None:  # fmt: skip
    """Take the steps that are left, with evaluations and checkpoints; leave at a checkpoint when a signal comes."""
    import torch.distributed as dist

    from distill.student.gradients import summed

    total = run.batches.total_steps
    bar = session.bar(total, training.step, "student", "step")
    session.graceful = True
    if training.step == 0 and len(run.held_out):
        measured.add(training.evaluate(run.held_out))
    for parts in run.batches.read(training.step, device):
        watch.beat()
        figures = training.take_step(parts)
        measured.add(figures)
        last = training.step == total
        stopping = summed(float(session.stopping is not None), device) > 0  # a signal may reach one worker only
        if len(run.held_out) and (last or training.step % config.evaluation.every == 0):
            measured.add(training.evaluate(run.held_out))
        if last or stopping or training.step % config.checkpoint_every == 0:
            watch.rest()
            training.save_checkpoint(run.output / "checkpoints", run.settings)
        bar.step(f"loss {figures['loss']:.3f}")  # after the checkpoint, which must be written even without a console
        if stopping and not last:
            dist.barrier()  # the checkpoint is in its place
            at = f"a checkpoint of step {training.step} is there"
            session.how_to_go_on = f"{at}, and the same command goes on from it"
            session.leave(session.stopping or signal.SIGTERM)
    session.graceful = False
    bar.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
