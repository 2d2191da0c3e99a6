"""Run the teacher over a dataset and keep what it says, in one store that all workers write.

    python -m distill.generate                                              # the embedded demo, one worker
    torchrun --nproc_per_node 8 -m distill.generate                         # the same on 8 workers, GPU or CPU
    torchrun --nproc_per_node 8 -m distill.generate configs/eight_gpus.yaml dataset.max_samples=100000
    python -m distill.generate --plan configs/eight_gpus.yaml               # what such a run would do, and stop
    python -m distill.generate --measure configs/eight_gpus.yaml            # the same, and what each k would keep

1. find      the teacher, and how large it is
2. plan      worker 0: tokenize the dataset, place each sample, create the store with its tokens
3. deal      the blocks that are not committed yet, to the replicas of the teacher
4. forward   the teacher over a block, batch by batch, and capture what is kept of its logits
5. write     the block's arrays in the background, then its commit
6. finish    worker 0: check the commits, mark the store complete, sum up

The same command again does what is missing, with any number of workers.
"""

import contextlib
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from distill import __version__
from distill.config.generate import GenerateConfig
from distill.run.board import Board, first_of_node, from_all, store_of
from distill.run.grid import Grid, refuse_other_launchers
from distill.run.nodes import check_nodes
from distill.run.session import Session, run_worker

if TYPE_CHECKING:
    from distill.run.progress import Bar
    from distill.store.writable import WritableStore
    from distill.teacher.worker import Totals

logger = logging.getLogger("distill.generate")  # __name__ is __main__ here


def main(arguments: Sequence[str]) -> int:
    """Run with these command-line arguments; return the exit status: 0 done, 1 failed, 2 bad usage or input."""
    usage = "[torchrun --nproc_per_node N | python] -m distill.generate [--plan | --measure]"
    settings = [argument for argument in arguments if argument not in ("--plan", "--measure")]
    plan = partial(show_plan, arguments=settings, measure="--measure" in arguments)
    body = generate if len(settings) == len(arguments) else plan
    return run_worker(GenerateConfig, usage, settings, body)


def generate(config: GenerateConfig, grid: Grid, session: Session) -> None:
    """The six steps above, as the worker that `grid` describes."""
    # Imported here: torch, transformers and zarr take seconds, which --help or a misspelt key should not.
    from distill.run.device import first_device, free_bytes, pick_device
    from distill.run.groups import process_group
    from distill.run.watch import Watch
    from distill.teacher import prepare
    from distill.teacher.loading import load
    from distill.teacher.model import Teacher
    from distill.teacher.worker import Worker

    refuse_other_launchers()
    config.store.check_written()
    device = pick_device("teacher.device", config.teacher.device, grid.local_rank, grid.local_world_size)
    session.open(config.log_dir, grid.log_name)
    board = Board(store_of(grid))
    announce(config, grid)
    check_nodes(grid, board, config, config.store.path)
    # 1. find
    with first_of_node(grid, board):  # it converts or downloads the teacher
        source, needs = prepare.find(config, device)
    board.note(f"free memory of {grid.rank}", str(free_bytes(device, grid.local_world_size)))
    # 2. plan
    job = prepare.plan_job(config, grid, board, source, needs, device)
    if job is None:  # complete already
        return
    session.how_to_go_on = "what is committed stays, and the same command continues from there"
    # 3. deal
    grid = grid.sharded(job.placement.workers)
    session.role = grid.role
    if grid.role:
        logger.info("this worker is %s", grid.role, extra={"console": False})
    if job.placement.mode == "device_map":
        device = first_device(device, grid.local_rank, job.placement.shard_size)
    mine = grid.deal(job.missing)
    group = process_group(grid, device, config.timeout_seconds) if grid.shard_size > 1 else contextlib.nullcontext()
    offloaded = Path(config.log_dir) / f"offload_{grid.rank}"
    with Watch(board, grid, config.timeout_seconds, session.abort) as watch:
        with group:
            model, share = load(source, device, job.placement, needs, config.parallel.max_memory, offloaded)
            board.meet(f"replica {grid.replica} has loaded", grid.shard_size)  # however long: no collective yet
            watch.follow(model)
            watch.beat()
            teacher = Teacher(model, device, share, job.longest, config.batch.max_tokens)
            worker = Worker(config, job.store, teacher, board, watch, len(job.missing), mine)
            total = job.store.attributes["num_tokens"]
            bar = session.bar(total, job.done_tokens, "teacher", "tok", worker.progress)
            # 4. forward, 5. write
            worker.work()
        watch.rest()
        shutil.rmtree(offloaded, ignore_errors=True)
        # 6. finish
        finish(config, grid, board, job.store, worker.totals, bar)


def finish(
    config: GenerateConfig, grid: Grid, board: Board, store: "WritableStore", totals: "Totals", bar: "Bar"
) -> None:
    """Worker 0 waits for all workers, marks the store complete, and sums up; the others wait for worker 0."""
    from distill.teacher.summary import summary

    if parts := from_all(grid, board, json.dumps(vars(totals))):
        bar.show()
        bar.close()
        store.mark_complete()
        logger.info(summary(store, config, totals.add_up(parts)))


def announce(config: GenerateConfig, grid: Grid) -> None:
    """Worker 0 says how many workers there are, and where they log."""
    if grid.rank == 0:
        others = Path(config.log_dir) / f"worker_<rank>{'.<host>' if grid.num_nodes > 1 else ''}.log"
        where = {1: "", 2: f"s; worker 1 logs to {str(others).replace('<rank>', '1')}"}.get(
            grid.world_size, f"s; workers 1 to {grid.world_size - 1} log to {others}"
        )
        logger.info("distill %s, %d worker%s", __version__, grid.world_size, where)


def show_plan(config: GenerateConfig, grid: Grid, session: Session, arguments: Sequence[str], measure: bool) -> None:
    """Print what a run with these `arguments` would do, and how large its store would be.

    measure: run the teacher over a few batches, to say what each capture.k would keep of it; else it is not loaded.
    """
    config.store.check_written()
    if grid.rank == 0:
        from distill.teacher.preview import preview

        session.open(config.log_dir, grid.log_name)
        print(preview(config, grid, arguments, measure))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
