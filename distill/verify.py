"""Check that a store is whole, and that every row of it is what the teacher said and the plan wrote.

    python -m distill.verify outputs/demo.zarr [CONFIG.yaml ...] [store.options.KEY=VALUE ...]
    python -m distill.verify outputs/demo.zarr --repair     # take back what is damaged; generate then makes it again
    python -m distill.verify outputs/demo.zarr --teacher [teacher.model=FOLDER] [teacher.device=cpu]

Every checksum of every chunk is computed again, and every rule of docs/format.md is checked. Exit status: 0 the store
is complete and sound, 1 it is not, 2 bad usage or no store.

--repair   restore damaged metadata from the copy that a store has of it, remove the commits of damaged blocks, and
           damaged chunks of the plan. The same distill.generate command as before then makes just these again
--teacher  of a sound store: run its teacher again on some batches, and compare. teacher.model: where it is now, if not
           where it was
"""

import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
from tqdm import tqdm

from distill.config.generate import GenerateConfig, is_web
from distill.errors import ConfigError, DistillError, UserError
from distill.run.log import adapt_to_machine
from distill.settings import expand, load, split
from distill.store.repair import no_other_run, restore_metadata, take_back
from distill.store.soundness import BlockCheck, Problem, block_problems, metadata_problems, plan_problems
from distill.store.store import Store
from distill.store.writable import WritableStore

_USAGE = "usage: python -m distill.verify STORE [--repair | --teacher] [CONFIG.yaml ...] [store.options.KEY=VALUE ...]"
_FLAGS = ("--repair", "--teacher")
_OF_TEACHERS = ("teacher.model", "teacher.device", "teacher.trust_remote_code")
_SHOWN = 50
_ROWS_WORTH_A_PROCESS = 1 << 20


def main(arguments: Sequence[str]) -> int:
    """Verify the store that is named; return the exit status."""
    adapt_to_machine()
    if {"--help", "-h"} & {*arguments}:
        print(f"{_USAGE}\n\n{__doc__}")
        return 0
    try:
        settings, others = split(arguments, "store.options", *_OF_TEACHERS)
        if strange := [argument for argument in others if argument.startswith("-") and argument not in _FLAGS]:
            raise ConfigError(f"unknown option {strange[0]}; {_USAGE}")
        paths = [expand(argument, "STORE") for argument in others if argument not in _FLAGS]
        if len(paths) != 1:
            raise ConfigError(f"expected one store, found {len(paths)} ({' '.join(paths)}); {_USAGE}")
        if {*_FLAGS} <= {*others}:
            raise ConfigError(f"expected one of {' and '.join(_FLAGS)}, found both; {_USAGE}")
        config = load(GenerateConfig, settings)
        repair = "--repair" in arguments
        with no_other_run(paths[0], config.store.options) if repair else contextlib.nullcontext():
            status = verify(paths[0], config.store.options, repair)
        return ask_teacher(paths[0], config) if "--teacher" in arguments and status == 0 else status
    except DistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except BrokenProcessPool:
        print("error: one of the processes that verify was killed; was there enough memory?", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def ask_teacher(path: str, config: GenerateConfig) -> int:
    """Print how far a store is from what its teacher says; return the exit status, 0 or 1."""
    from distill.teacher.audit import audit, report  # takes seconds

    moved = None if config.teacher.model == GenerateConfig().teacher.model else config.teacher.model
    with tqdm(desc="teacher", unit="tok", unit_scale=True, delay=1.0) as bar:
        store, teacher = Store.existing(path, config.store.options), config.teacher
        found = audit(store, moved, teacher.device, teacher.trust_remote_code, progress=bar.update)
    print(report(found))
    return 0 if found.ok else 1


def verify(path: str, options: Mapping[str, Any], repair: bool) -> int:
    """Print what is wrong with a store; return the exit status, 0 or 1."""
    problems = metadata_problems(path, options)
    if problems and (not repair or any(problem.hopeless for problem in problems)):
        what_now = "this cannot be repaired" if repair else "its data was not checked, since its metadata is damaged"
        return _report(path, problems, what_now)
    if problems:
        restore_metadata(path, options, problems)
        print(f"{path}: restored {', '.join(problem.where for problem in problems)}")
    store = Store.open(path, options)
    if store is None or not store.published:
        print(f"{path}: nothing is there yet: its plan was interrupted; give the command that makes it again")
        return 1
    problems = plan_problems(store)
    table_is_sound = not any(problem.where.startswith("sample") for problem in problems)
    sums_are_sound = not any(problem.where.startswith("plan_checksums") for problem in problems)
    committed = store.committed()
    check = BlockCheck(committed, store.tokens_per_block() if table_is_sound else None, sums_are_sound)
    rows = store.num_blocks * store.block_rows
    processes = min(len(os.sched_getaffinity(0)), max(1, rows // _ROWS_WORTH_A_PROCESS))
    interval = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(total=store.num_blocks, desc="verifying", unit="block", mininterval=interval, delay=1.0) as bar:
        for _, found in block_problems(store, options, check, processes):
            problems += found
            bar.update()
    missing = np.flatnonzero(~committed)
    if store.complete:
        problems += [Problem(f"block {block}:", "its commit is missing", block=int(block)) for block in missing]
    state = f"{committed.sum():,} of {store.num_blocks:,} blocks are committed"
    if problems and repair:
        if any(not problem.hopeless for problem in problems):
            take_back(path, options, problems)
            blocks, chunks = len({p.block for p in problems} - {None}), sum(len(p.keys) for p in problems)
            print(f"{path}: took back {blocks} blocks and {chunks} chunks of the plan; run {store.command} again")
        hopeless = [problem for problem in problems if problem.hopeless]
        return _report(path, hopeless, "this cannot be repaired") if hopeless else 1
    if problems:
        mend = f"--repair takes back what is damaged, {store.command} makes it again"
        if is_web(path, options):
            mend = "it can be repaired where it is kept"
        return _report(path, problems, f"{state}; {mend}")
    if repair and not len(missing) and not store.complete:  # its zarr.json was restored
        WritableStore.existing(path, options).mark_complete()
    elif not store.complete:
        print(f"{path}: sound, but unfinished: {state}; run {store.command} again to its end")
        return 1
    tokens = store.attributes["num_tokens"]
    print(f"{path}: complete and sound: {state}, {tokens:,} tokens; every checksum and every rule holds")
    return 0


def _report(path: str, problems: Sequence[Problem], end: str) -> int:
    print(f"{path}: damaged")
    for problem in sorted(problems, key=lambda problem: (problem.block is not None, problem.block or 0))[:_SHOWN]:
        print(f"  {problem}".rstrip())
    if len(problems) > _SHOWN:
        print(f"  and {len(problems) - _SHOWN} more")
    print(end)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
