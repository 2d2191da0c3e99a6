"""Run the teacher over a dataset and keep what it says, in one store that all workers write.

    python -m distill.generate                                              # the embedded demo, one worker
    torchrun --nproc_per_node 8 -m distill.generate                         # the same on 8 workers, GPU or CPU
    torchrun --nproc_per_node 8 -m distill.generate configs/eight_gpus.yaml dataset.path=texts.jsonl
    python -m distill.generate --plan configs/eight_gpus.yaml               # what such a run would do, and stop

1. tokenize  the dataset into samples                               (worker 0)
2. plan      where each sample lies; create the store, its tokens   (worker 0)
3. deal      the blocks that are not committed yet, to the workers
4. forward   the teacher over a block, batch by batch, and capture what is kept of its logits
5. write     the block's arrays in the background, then its commit
6. finish    check the commits, mark the store complete, sum up     (worker 0)

The same command again does what is missing, whatever the number of workers.
"""

import contextlib
import json
import logging
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distill import __version__
from distill.config import GenerateConfig
from distill.errors import PeerError, StoreError
from distill.log import Session
from distill.nodes import check_nodes
from distill.parallel import Grid, refuse_other_launchers
from distill.settings import help_text, load, to_yaml

if TYPE_CHECKING:
    from distill.store import Store

logger = logging.getLogger("distill.generate")  # __name__ is __main__ here


def main(arguments: Sequence[str]) -> int:
    """Run with these command-line arguments; return the exit status: 0 done, 1 failed, 2 bad usage or input."""
    if {"--help", "-h"} & {*arguments}:
        print(help_text(GenerateConfig, "[torchrun --nproc_per_node N | python] -m distill.generate [--plan]"))
        return 0
    grid = Grid.from_environment()
    session = Session(grid.rank)
    settings = [argument for argument in arguments if argument != "--plan"]
    if len(settings) < len(arguments):
        return session.run(lambda: plan(load(GenerateConfig, settings), grid, session, settings))
    return session.run(lambda: generate(load(GenerateConfig, settings), grid, session))


def generate(config: GenerateConfig, grid: Grid, session: Session) -> None:
    """The whole run, as the worker that `grid` says."""
    # Imported here: torch, transformers and zarr take seconds, which --help or a misspelt key should not.
    from distill import prepare, teacher
    from distill.device import count_devices, first_device, free_bytes, pick_device
    from distill.report import summary
    from distill.store import Store
    from distill.watch import Watch
    from distill.worker import Totals, Worker

    refuse_other_launchers()
    device = pick_device("teacher.device", config.teacher.device, grid.local_rank, grid.local_world_size)
    session.open(config.log_dir, grid.log_name)
    board = grid.board()
    if grid.rank == 0:
        others = Path(config.log_dir) / grid.log_name.replace("_0", "_<rank>", 1).replace(
            socket.gethostname(), "<host>"
        )
        where = {1: "", 2: f"s; worker 1 logs to {str(others).replace('<rank>', '1')}"}.get(
            grid.world_size, f"s; workers 1 to {grid.world_size - 1} log to {others}"
        )
        logger.info("distill %s, %d worker%s", __version__, grid.world_size, where)
    check_nodes(grid, board, config, config.store.path)

    if grid.local_rank > 0:  # one worker of each node converts or downloads the teacher
        board.wait(f"teacher is on node {grid.node}")
    source = teacher.locate(config.teacher)
    if grid.local_rank == 0:
        board.note(f"teacher is on node {grid.node}", "yes")
    dtype = teacher.resolve_dtype(source, device)
    dtype_name = str(dtype).removeprefix("torch.")
    needs = teacher.Needs.of(source, dtype, config.batch.max_tokens, teacher.slice_bytes(device))
    board.note(f"free memory of {grid.rank}", str(free_bytes(device, grid.local_world_size)))

    if grid.rank == 0:
        prepare.check_settings(config, source)
        free = min(int(board.wait(f"free memory of {rank}")) for rank in range(grid.world_size))
        placement = teacher.decide(
            config.parallel, needs, free, grid, count_devices(config.teacher.device, device, grid.local_world_size)
        )
        fingerprint = prepare.fingerprint_of(config, source, dtype_name)
        store = prepare.find_store(config, fingerprint)
        board.note("store", "complete" if store and store.complete else "to do")
        if store and store.complete:
            logger.info("%s is complete already: nothing to do", config.store.path)
            logger.info(summary(store, Totals(), config))
            return
        logger.info("teacher: %s, %s, on %s", config.teacher.model, dtype_name, device)
        logger.info("parallel: %s; %s", placement.describe(grid), teacher.arithmetic(needs, free, placement))
        (Path(config.log_dir) / "config.yaml").write_text(to_yaml(config))
        if store is None:
            store = prepare.plan_store(config, source, fingerprint, dtype_name)
        # One look at the commits for all: whoever looked later would miss what was done since, and deal differently.
        board.note("missing blocks", json.dumps(store.missing_blocks()))
        board.note("placement", json.dumps(vars(placement)))
    else:
        store = None
        if board.wait("store") == "complete":
            return
        placement = teacher.Placement(**json.loads(board.wait("placement")))
    missing = json.loads(board.wait("missing blocks"))
    store = store or Store.open(config.store.path, config.store.options, writable=True)
    if store is None or not store.published:
        raise StoreError(f"store.path: worker 0 created {config.store.path}, worker {grid.rank} does not see it")

    grid = grid.sharded(placement.workers)
    if placement.mode == "device_map":
        device = first_device(device, grid.local_rank, placement.shard_size)
    session.role = grid.role
    if grid.role:
        logger.info("this worker is %s", grid.role, extra={"console": False})
    offloaded = Path(config.log_dir) / f"offload_{grid.rank}"
    with Watch(board, grid, config.timeout_seconds, session.abort) as watch:
        with grid.replica_group(device, config.timeout_seconds):
            model, share = teacher.load(source, device, dtype, placement, needs, config.parallel.max_memory, offloaded)
            board.meet(f"replica {grid.replica} has loaded", grid.shard_size)  # however long: no collective yet
            watch.follow(model)
            worker = Worker(
                config, store, teacher.Teacher(model, device, share), board, watch, missing, grid.deal(missing)
            )
            session.how_to_go_on = "what is committed stays, and the same command goes on from there"
            bar = session.bar(worker.total_tokens, worker.done_tokens, worker.progress)
            worker.work()
        watch.rest()
        shutil.rmtree(offloaded, ignore_errors=True)
        board.note(f"totals of {grid.rank}", json.dumps(vars(worker.totals)))
        if grid.rank == 0:
            totals = Totals.add_up([board.wait(f"totals of {rank}") for rank in range(grid.world_size)])
            board.note("all are done", "yes")
            bar.finish()
            finish(store)
            logger.info(summary(store, totals, config))
        else:  # stay, to watch worker 0; and while others work, a worker that is gone has failed
            with contextlib.suppress(PeerError):
                board.wait("all are done", poll_seconds=1.0)


def plan(config: GenerateConfig, grid: Grid, session: Session, arguments: Sequence[str]) -> None:
    """Print what a run with these `arguments` would do, and how large its store would be; no teacher is loaded.

    Without torchrun, for the workers that this machine would take: one a GPU, or one a core.
    """
    import numpy as np

    from distill import prepare, teacher
    from distill.device import count_devices, free_bytes, pick_device
    from distill.report import expected_bytes, human, table

    if grid.rank > 0:
        return
    device = pick_device("teacher.device", config.teacher.device, 0, 1)
    session.open(config.log_dir, grid.log_name)
    if not grid.launched:
        each = config.parallel.shard_size if config.parallel.mode == "device_map" else 1
        devices = count_devices(config.teacher.device, device, len(os.sched_getaffinity(0)))
        workers = max(1, devices // each) if isinstance(each, int) else 1
        grid = Grid(world_size=workers, local_world_size=workers)
    source = teacher.locate(config.teacher)
    dtype = teacher.resolve_dtype(source, device)
    needs = teacher.Needs.of(source, dtype, config.batch.max_tokens, teacher.slice_bytes(device))
    prepare.check_settings(config, source)
    free = free_bytes(device, grid.local_world_size)
    placement = teacher.decide(
        config.parallel, needs, free, grid, count_devices(config.teacher.device, device, grid.local_world_size)
    )
    grid = grid.sharded(placement.workers)
    _, _, layout = prepare.lay_out(config, source)
    tokens = int(layout.lengths.sum(dtype=np.int64))
    fewest, rest = divmod(layout.num_blocks, grid.num_replicas)
    share = f"{fewest} or {fewest + 1}" if rest else fewest
    size = expected_bytes(tokens, config.capture.k, source.vocab_size, len(config.capture.temperatures))
    dtype_name = str(dtype).removeprefix("torch.")
    lines = {
        "teacher": f"{config.teacher.model} ({needs.architecture}, {dtype_name}) on {device.type}",
        "memory": teacher.arithmetic(needs, free, placement),
        "parallel": placement.describe(grid),
        "samples": f"{len(layout.lengths):,}",
        "tokens": f"{tokens:,}",
        "blocks": f"{layout.num_blocks:,} of {layout.block_rows:,} rows, {share} a replica",
        "store": f"about {human(size)}, {size / tokens:.0f} bytes/token",
        "next": shlex.join(
            ["torchrun", f"--nproc_per_node={grid.local_world_size}", "-m", "distill.generate", *arguments]
        ),
    }
    print(table(lines))


def finish(store: "Store") -> None:
    """Every worker is done: check that every block is committed, and mark the store complete."""
    if left := store.missing_blocks():
        raise RuntimeError(f"blocks {left[:10]} are not committed although every worker is done")
    store.mark_complete()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
