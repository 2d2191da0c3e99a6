"""Take back what is damaged in a store, so that distill.generate makes just that again."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zarr.core.sync import sync

from distill.errors import StoreError
from distill.store.location import locate, marks
from distill.store.metadata import put
from distill.store.soundness import Problem
from distill.store.writable import WritableStore, lock_of


def restore_metadata(path: str, options: Mapping[str, Any], problems: Sequence[Problem]) -> None:
    """Write again each zarr.json that was damaged, and follows from what is left."""
    location = locate(path, options, read_only=False)
    for problem in problems:
        if problem.document is not None:
            put(location, *problem.document)


def take_back(path: str, options: Mapping[str, Any], problems: Sequence[Problem]) -> None:
    """Remove the commits of damaged blocks and the damaged chunks of the plan; the store is not complete any more."""
    store = WritableStore.existing(path, options)
    store.reopen()  # first: a store that says complete is complete
    for block in {problem.block for problem in problems if problem.block is not None}:
        store.take_back(block)
    for key in {key for problem in problems for key in problem.keys}:
        sync(store.location.delete(key))


@contextlib.contextmanager
def no_other_run(path: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Keep other runs out of the store at `path`. Raises StoreError where one is writing, or there is none."""
    location = locate(path, options, read_only=False)
    if marks(path, location) is None:
        raise StoreError(f"store.path: found no store at {path}")
    lock = lock_of(location)
    try:
        yield
    finally:
        lock.release()
