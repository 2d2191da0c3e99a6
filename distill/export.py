"""Write a store as Parquet files, with the columns that other trainers read: a row for each sample.

    python -m distill.export outputs/demo.zarr outputs/export
    torchrun --nproc_per_node 8 -m distill.export outputs/mine.zarr outputs/export part_tokens=1000000

1. open      the store, a folder or a URL; it must be complete
2. plan      worker 0: the manifest of the output; which parts are there
3. deal      the parts that are not there yet, to the workers
4. write     rows of the store as columns, a part as one file      distill/exchange/columns.py, exporting.py
5. finish    worker 0: sum up

The same command again writes what is missing, with any number of workers. docs/interchange.md says who reads the files.
"""

import json
import logging
import sys
from collections.abc import Sequence

from distill import __version__
from distill.config.exchange import ExportConfig
from distill.run.board import Board, from_all, store_of
from distill.run.grid import Grid, refuse_other_launchers
from distill.run.nodes import check_nodes
from distill.run.session import Session, run_worker

logger = logging.getLogger("distill.export")  # __name__ is __main__ here


def main(arguments: Sequence[str]) -> int:
    """Run with these command-line arguments; return the exit status: 0 done, 1 failed, 2 bad usage or input."""
    usage = "[torchrun --nproc_per_node N | python] -m distill.export STORE OUTPUT"
    return run_worker(ExportConfig, usage, arguments, export, ("store.path", "output"))


def export(config: ExportConfig, grid: Grid, session: Session) -> None:
    """The five steps above, as the worker that `grid` describes."""
    # Imported here: torch and zarr take seconds, which --help or a misspelt key should not.
    from distill.exchange import exporting
    from distill.run.watch import Watch

    refuse_other_launchers()
    session.open(config.log_dir, grid.log_name)
    board = Board(store_of(grid))
    if grid.rank == 0:
        logger.info("distill %s, %d worker(s)", __version__, grid.world_size)
    check_nodes(grid, board, config, config.output)
    # 1. open, 2. plan
    job = exporting.plan_job(config, grid, board)
    if job is None:  # complete already
        return
    session.how_to_go_on = "the parts that are finished stay, and the same command continues from there"
    # 3. deal
    mine = grid.deal(job.missing)
    with Watch(board, grid, config.timeout_seconds, session.abort) as watch:
        worker = exporting.Worker(config, job, board, watch)
        bar = session.bar(*job.tokens(), "export", "tok", worker.progress)
        # 4. write
        worker.work(mine)
        watch.rest()
        # 5. finish
        if found := from_all(grid, board, json.dumps(vars(worker.totals))):
            bar.show()
            bar.close()
            logger.info(exporting.summary(job.folder, config, worker.totals.add_up(found)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
