"""Let a student write: prompts to rollouts, as token ids with the log-probabilities that they were drawn with.

    python -m distill.rollout student.model=outputs/student prompts.path=prompts.jsonl        # one worker
    torchrun --nproc_per_node 8 -m distill.rollout student.model=outputs/student prompts.path=prompts.jsonl

1. find      the student
2. plan      worker 0: the prompts as token ids, cut into parts; the manifest of the output
3. deal      the parts that are not there yet, to the workers
4. write     transformers' generation, batch by batch                     distill/rollouts/sampling.py
5. keep      a part as one Parquet file, when it is whole                 distill/rollouts/parts.py
6. finish    worker 0: sum up

The same command again does what is missing, with any number of workers. The same seed gives the same rollouts.
`distill.generate dataset.path=<output>` then asks a teacher about every token of them.
"""

import json
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from distill import __version__
from distill.config.rollout import RolloutConfig
from distill.run.board import Board, first_of_node, from_all, store_of
from distill.run.grid import Grid, refuse_other_launchers
from distill.run.nodes import check_nodes
from distill.run.session import Session, run_worker

if TYPE_CHECKING:
    from distill.rollouts.parts import Parts
    from distill.run.progress import Bar
    from distill.teacher.worker import Totals

logger = logging.getLogger("distill.rollout")  # __name__ is __main__ here


def main(arguments: Sequence[str]) -> int:
    """Run with these command-line arguments; return the exit status: 0 done, 1 failed, 2 bad usage or input."""
    return run_worker(RolloutConfig, "[torchrun --nproc_per_node N | python] -m distill.rollout", arguments, rollout)


def rollout(config: RolloutConfig, grid: Grid, session: Session) -> None:
    """The six steps above, as the worker that `grid` describes."""
    # Imported here: torch and transformers take seconds, which --help or a misspelt key should not.
    from distill.rollouts import prepare
    from distill.rollouts.sampling import Sampler
    from distill.rollouts.worker import Worker
    from distill.run.device import pick_device
    from distill.run.watch import Watch

    refuse_other_launchers()
    device = pick_device("device", config.device, grid.local_rank, grid.local_world_size)
    session.open(config.log_dir, grid.log_name)
    board = Board(store_of(grid))
    if grid.rank == 0:
        logger.info("distill %s, %d worker(s), on %s", __version__, grid.world_size, device.type)
    check_nodes(grid, board, config, config.output)
    # 1. find
    with first_of_node(grid, board):  # it may download the student
        source = prepare.find(config)
    # 2. plan
    job = prepare.plan_job(config, grid, board, source, device)
    if job is None:  # complete already
        return
    session.how_to_go_on = "the parts that are finished stay, and the same command continues from there"
    # 3. deal
    mine = grid.deal(job.missing)
    with Watch(board, grid, config.timeout_seconds, session.abort) as watch:
        worker = Worker(config, job, source.tokenizer, board, watch)
        total, done = job.rollouts(config)
        bar = session.bar(total, done, "rollouts", "rollout", worker.progress)
        # 4. write, 5. keep
        if mine:
            model = prepare.load(config, source, device)
            watch.follow(model)
            watch.beat()
            worker.work(Sampler(model, source, config.sampling, job.stops, config.batch.sequences), mine)
        watch.rest()
        # 6. finish
        finish(config, grid, board, job.parts, worker.totals, bar)


def finish(config: RolloutConfig, grid: Grid, board: Board, parts: "Parts", totals: "Totals", bar: "Bar") -> None:
    """Worker 0 waits for all workers and sums up; the others wait for worker 0."""
    from distill.rollouts.summary import summary

    if found := from_all(grid, board, json.dumps(vars(totals))):
        bar.show()
        bar.close()
        logger.info(summary(parts, config, totals.add_up(found)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
