"""Make a store of what others captured: log-probabilities of a teacher's most probable tokens, in columns.

    python -m distill.ingest captured.jsonl outputs/mine.zarr teacher.model=Qwen/Qwen2.5-7B-Instruct
    torchrun --nproc_per_node 8 -m distill.ingest outputs/export outputs/mine.zarr teacher.model=./my-model

1. find      the teacher's tokenizer and configuration; its weights are not needed
2. plan      worker 0: read and check every row, place each sample, create the store with its tokens
3. deal      the blocks that are not committed yet, to the workers
4. write     each worker its own blocks                  distill/exchange/captured.py, ingesting.py
5. finish    worker 0: check the commits, mark the store complete, sum up

The same command again does what is missing, with any number of workers. docs/interchange.md says which columns.
"""

import json
import logging
import sys
from collections.abc import Sequence

from distill import __version__
from distill.config.exchange import IngestConfig
from distill.run.board import Board, first_of_node, from_all, store_of
from distill.run.grid import Grid, refuse_other_launchers
from distill.run.nodes import check_nodes
from distill.run.session import Session, run_worker

logger = logging.getLogger("distill.ingest")  # __name__ is __main__ here


def main(arguments: Sequence[str]) -> int:
    """Run with these command-line arguments; return the exit status: 0 done, 1 failed, 2 bad usage or input."""
    usage = "[torchrun --nproc_per_node N | python] -m distill.ingest ROWS STORE teacher.model=TOKENIZER"
    return run_worker(IngestConfig, usage, arguments, ingest, ("dataset.path", "store.path"))


def ingest(config: IngestConfig, grid: Grid, session: Session) -> None:
    """The five steps above, as the worker that `grid` describes."""
    # Imported here: torch, transformers and zarr take seconds, which --help or a misspelt key should not.
    from distill.exchange import ingesting
    from distill.run.watch import Watch

    refuse_other_launchers()
    session.open(config.log_dir, grid.log_name)
    board = Board(store_of(grid))
    if grid.rank == 0:
        logger.info("distill %s, %d worker(s)", __version__, grid.world_size)
    check_nodes(grid, board, config, config.store.path)
    # 1. find
    with first_of_node(grid, board):  # it may download the tokenizer
        source = ingesting.find(config)
    # 2. plan
    job = ingesting.plan_job(config, grid, board, source)
    if job is None:  # complete already
        return
    session.how_to_go_on = "what is committed stays, and the same command continues from there"
    # 3. deal
    mine = grid.deal(job.missing)
    with Watch(board, grid, config.timeout_seconds, session.abort) as watch:
        worker = ingesting.Worker(job, board, watch)
        bar = session.bar(*job.tokens(), "ingest", "tok", worker.progress)
        # 4. write
        worker.work(mine)
        watch.rest()
        # 5. finish
        if found := from_all(grid, board, json.dumps(vars(worker.totals))):
            bar.show()
            bar.close()
            job.store.mark_complete()
            logger.info(ingesting.summary(job.store, config, worker.totals.add_up(found)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
