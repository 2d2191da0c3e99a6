"""Take back what is damaged in a store, so that distill.generate makes just that again."""

from collections.abc import Mapping, Sequence
from typing import Any

from zarr.core.sync import sync

from distill.errors import StoreError
from distill.store.location import locate
from distill.store.metadata import put
from distill.store.soundness import Problem
from distill.store.writable import WritableStore, lock_of


def restore_metadata(path: str, options: Mapping[str, Any], problems: Sequence[Problem]) -> None:
    """Write again each zarr.json that follows from the others.

    Raises StoreError where one of them does not, and where another run is writing.
    """
    if left := [str(problem) for problem in problems if problem.document is None]:
        raise StoreError(f"{path}: cannot be repaired: {'; '.join(left)}")
    location = locate(path, options, read_only=False)
    lock = lock_of(location)
    try:
        for problem in problems:
            if problem.document is not None:
                put(location, *problem.document)
    finally:
        lock.release()


def take_back(path: str, options: Mapping[str, Any], problems: Sequence[Problem]) -> None:
    """Remove the commits of damaged blocks and the damaged chunks of the plan; the store is not complete any more.

    Raises StoreError where another run is writing.
    """
    store = WritableStore.existing(path, options)
    store.lock()
    try:
        store.reopen()  # first: a store that says complete is complete
        for block in {problem.block for problem in problems if problem.block is not None}:
            store.take_back(block)
        for key in {key for problem in problems for key in problem.keys}:
            sync(store.location.delete(key))
    finally:
        store.unlock()
