"""Run the teacher over a dataset and keep what it says, in one store that all workers write.

    python -m distill.generate                                              # the embedded demo, one worker
    torchrun --nproc_per_node 8 -m distill.generate                         # the same on 8 workers, GPU or CPU
    torchrun --nproc_per_node 8 -m distill.generate configs/eight_gpus.yaml dataset.path=texts.jsonl

1. tokenize  the dataset into samples                               (worker 0)
2. plan      where each sample lies; create the store, its tokens   (worker 0)
3. deal      the blocks that are not committed yet, to the workers
4. forward   the teacher over a block, batch by batch, and capture what is kept of its logits
5. write     the block's arrays in the background, then its commit
6. finish    check the commits, mark the store complete, sum up     (worker 0)

The same command again does what is missing, whatever the number of workers.
"""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distill import __version__
from distill.config import GenerateConfig
from distill.errors import StoreError
from distill.log import Session
from distill.parallel import Grid, refuse_other_launchers
from distill.settings import help_text, load, to_yaml

if TYPE_CHECKING:
    from distill.store import Store

logger = logging.getLogger("distill.generate")  # __name__ is __main__ here


def main(arguments: Sequence[str]) -> int:
    """Run with these command-line arguments; return the exit status: 0 done, 1 failed, 2 bad usage or input."""
    if {"--help", "-h"} & {*arguments}:
        print(help_text(GenerateConfig, "[torchrun --nproc_per_node N | python] -m distill.generate"))
        return 0
    grid = Grid.from_environment()
    session = Session(grid.rank)
    return session.run(lambda: generate(load(GenerateConfig, arguments), grid, session))


def generate(config: GenerateConfig, grid: Grid, session: Session) -> None:
    """The whole run, as the worker that `grid` says."""
    # Imported here: torch, transformers and zarr take seconds, which --help or a misspelt key should not.
    from distill import prepare
    from distill.device import pick_device
    from distill.report import summary
    from distill.store import Store
    from distill.teacher import Teacher, locate, resolve_dtype
    from distill.worker import Totals, Worker

    refuse_other_launchers()
    device = pick_device("teacher.device", config.teacher.device, grid.local_rank, grid.local_world_size)
    session.open(config.log_dir)
    board = grid.board()
    if grid.rank == 0:
        where = {1: "", 2: f"s; worker 1 logs to {config.log_dir}/worker_1.log"}.get(
            grid.world_size, f"s; workers 1 to {grid.world_size - 1} log to {config.log_dir}/worker_<rank>.log"
        )
        logger.info("distill %s, %d worker%s", __version__, grid.world_size, where)

    if grid.local_rank > 0:  # one worker of each node converts or downloads the teacher
        board.wait(f"teacher is on node {grid.node}")
    source = locate(config.teacher)
    if grid.local_rank == 0:
        board.note(f"teacher is on node {grid.node}", "yes")
    dtype = resolve_dtype(source, device)
    dtype_name = str(dtype).removeprefix("torch.")

    if grid.rank == 0:
        prepare.check_settings(config, source)
        fingerprint = prepare.fingerprint_of(config, source, dtype_name)
        store = prepare.find_store(config, fingerprint)
        board.note("store", "complete" if store and store.complete else "to do")
        if store and store.complete:
            logger.info("%s is complete already: nothing to do", config.store.path)
            logger.info(summary(store, Totals(), config))
            return
        logger.info("teacher: %s, %s, on %s", config.teacher.model, dtype_name, device)
        (Path(config.log_dir) / "config.yaml").write_text(to_yaml(config))
        if store is None:
            store = prepare.plan_store(config, source, fingerprint, dtype_name)
        # One look at the commits for all: whoever looked later would miss what was done since, and deal differently.
        board.note("missing blocks", json.dumps(store.missing_blocks()))
    else:
        store = None
        if board.wait("store") == "complete":
            return
    teacher = Teacher.load(source, device, dtype)
    missing = json.loads(board.wait("missing blocks"))
    store = store or Store.open(config.store.path, config.store.options, writable=True)
    if store is None or not store.published:
        raise StoreError(f"store.path: worker 0 created {config.store.path}, worker {grid.rank} does not see it")
    worker = Worker(config, store, teacher, board, missing, grid.deal(missing))
    session.how_to_go_on = "what is committed stays, and the same command goes on from there"
    bar = session.bar(worker.total_tokens, worker.done_tokens, worker.progress)
    worker.work()
    board.note(f"totals of {grid.rank}", json.dumps(vars(worker.totals)))

    if grid.rank == 0:
        totals = Totals.add_up([board.wait(f"totals of {rank}") for rank in range(grid.world_size)])
        bar.finish()
        finish(store)
        logger.info(summary(store, totals, config))


def finish(store: "Store") -> None:
    """Every worker is done: check that every block is committed, and mark the store complete."""
    if left := store.missing_blocks():
        raise RuntimeError(f"blocks {left[:10]} are not committed although every worker is done")
    store.mark_complete()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
