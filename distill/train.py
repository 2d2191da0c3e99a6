"""Train a student from a store: what the teacher said once is read again and again, the teacher never runs.

    python -m distill.train                                                   # the demo's store, one worker
    torchrun --nproc_per_node 8 -m distill.train configs/train_eight_gpus.yaml store.path=outputs/mine.zarr

1. open      the store, or several; hold samples out            distill/reading/cache.py, distill/reading/mixture.py
2. build     the student: a checkpoint, random, or some of the teacher's layers   distill/student/model.py
3. read      shuffled batches, this worker's share                            distill/student/batches.py
4. step      the mean loss over all workers' tokens, its gradient, AdamW      distill/student/training.py
5. measure   on what was held out, now and then                               distill/student/evaluate.py
6. keep      a checkpoint now and then; at the end the student                distill/student/checkpoint.py

The same command again continues from the newest checkpoint, with the losses of a run that was never stopped.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from distill import __version__
from distill.config.train import TrainConfig
from distill.run.board import Board, store_of
from distill.run.grid import Grid, refuse_other_launchers
from distill.run.nodes import check_nodes
from distill.run.session import Session, run_worker
from distill.settings import to_yaml

logger = logging.getLogger("distill.train")  # __name__ is __main__ here


def main(arguments: Sequence[str]) -> int:
    """Run with these command-line arguments; return the exit status: 0 done, 1 failed, 2 bad usage or input."""
    return run_worker(TrainConfig, "[torchrun --nproc_per_node N | python] -m distill.train", arguments, train)


def train(config: TrainConfig, grid: Grid, session: Session) -> None:
    """The six steps above, as the worker that `grid` describes."""
    # Imported here: torch, transformers and zarr take seconds, which --help or a misspelt key should not.
    from distill.run.device import pick_device
    from distill.run.groups import process_group
    from distill.run.watch import Watch
    from distill.store.location import refuse_inside_store
    from distill.student import metrics, model
    from distill.student.batches import StepBatches, open_caches, split
    from distill.student.checkpoint import Checkpoints, lock_output, settings_of
    from distill.student.loss import DistillationLoss
    from distill.student.training import Training

    refuse_other_launchers()
    refuse_inside_store(Path(config.output), "output")
    loss = DistillationLoss(**asdict(config.loss))
    device = pick_device("device", config.device, grid.local_rank, grid.local_world_size)
    session.open(config.log_dir, grid.log_name)
    board = Board(store_of(grid))
    check_nodes(grid, board, config, config.output)
    # 1. open
    cache = open_caches(config)
    source = model.find(config.student, *(part.attributes["teacher"] for part in cache.parts))
    model.check(source, loss, cache)
    trained_on, held_out = split(cache, config)
    batches = StepBatches(trained_on, config, grid)
    output, total_steps = Path(config.output), batches.total_steps
    lock = lock_output(output) if grid.rank == 0 else None
    if lock is not None:
        board.note("output is locked", "")
    board.wait("output is locked")  # from now on only this run changes what all its workers see there
    checkpoints = Checkpoints(output, settings_of(config, cache, source, grid.world_size, total_steps), lock)
    if checkpoints.step == total_steps and model.is_saved(output):
        if grid.rank == 0:
            logger.info("%s is complete already: nothing to do", output)
            logger.info(metrics.summary(output))
        return
    grid = replace(grid, shard_size=grid.world_size)  # all workers wait for each other
    with (
        Watch(board, grid, config.timeout_seconds, session.abort) as watch,
        process_group(grid, device, config.timeout_seconds),
    ):
        # 2. build
        student = model.build(config.student, source, config.seed)
        board.meet("students are built", grid.world_size)  # however long that takes
        watch.follow(student)
        training = Training(config, student, loss, held_out, checkpoints, total_steps, device)
        session.how_to_go_on = "the same command continues from the newest checkpoint"
        if grid.rank == 0:
            (output / "config.yaml").write_text(to_yaml(config))
            logger.info(
                "distill %s, %d worker(s), %s: %s of %s parameters, %s training samples, %s held out, %s",
                __version__, grid.world_size, config.parallel, type(student).__name__,
                f"{sum(weight.numel() for weight in student.parameters()):,}", f"{len(trained_on):,}",
                f"{len(held_out):,}", f"from step {training.step} of {total_steps}",
            )  # fmt: skip
            for part, count in zip(trained_on.parts, trained_on.per_epoch, strict=True):
                if len(trained_on.parts) > 1:
                    logger.info("an epoch has %s of the %s samples of %s", f"{count:,}", f"{len(part):,}", part.path)
        # 3. read, 4. step, 5. measure, 6. keep
        training.learn(batches.read(training.step, device), session, watch)
        training.save_student(source.tokenizer)
        if grid.rank == 0:
            logger.info(metrics.summary(output))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
