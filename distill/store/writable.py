"""A store, opened to be written: created once, then filled block by block.

Every worker opens the store, and each block is written by one worker only. It writes whole shards first, makes sure
that they are on disk, and then writes the block's entry in ``commits``.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.sync import sync

from distill.errors import StorageError, StoreError, first_line
from distill.store.codecs import create_array, create_commits
from distill.store.lease import Lease
from distill.store.location import Lock, fsync, local_root, locate
from distill.store.schema import FORMAT, VERSION, ArraySpec
from distill.store.store import Store


class WritableStore(Store):
    """An open store that may be written."""

    _mode = "r+"
    _lock: Lock | Lease | None = None

    @classmethod
    def create(
        cls,
        path: str,
        options: Mapping[str, Any],
        attributes: Mapping[str, Any],
        specs: Iterable[ArraySpec],
        sizes: Mapping[str, int],
        inner_rows: int,
        codec: str,
    ) -> Self:
        """Create the group, its attributes and its arrays, and lock it. ``commits`` is left to `publish`.

        A store at `path` whose plan was interrupted is removed. attributes: must hold block_rows.
        sizes: R and S as row and sample. inner_rows: of an inner chunk.
        Raises StoreError where the path cannot be written, or another run is writing there.
        """
        try:
            location = locate(path, options, read_only=False, known=True)  # it was looked at before
            if (root := local_root(location)) is not None:
                root.mkdir(parents=True, exist_ok=True)
            lock = _lock(location)
            if sync(location.exists("commits/zarr.json")):
                raise StoreError(f"store.path: another run has begun {path} meanwhile; run the same command again")
            for spec in specs:
                sync(location.delete_dir(spec.name))
            sync(location.delete("zarr.json"))
            group = zarr.create_group(location, attributes={"format": FORMAT, "version": VERSION, **attributes})
            for spec in specs:
                create_array(group, spec, sizes[spec.over], int(attributes["block_rows"]), inner_rows, codec)
        except (StoreError, StorageError):
            raise
        except Exception as error:
            raise StoreError(f"store.path: cannot write {path}: {first_line(error)}") from error
        store = cls(group, path)
        store._lock = lock
        return store

    def lock(self) -> None:
        """Keep other runs out, as long as this object lives. Raises StoreError where another run is writing."""
        self._lock = _lock(self._group.store)

    def write_all(self, name: str, values: NDArray[Any]) -> None:
        """Write a whole array over samples."""
        self._array(name)[:] = values

    def write_rows(self, name: str, block: int, values: NDArray[Any]) -> None:
        """Write one block of an array over rows in one assignment: values [n, ...], n <= block_rows, then fill."""
        array = self._array(name)
        full = np.full((self.block_rows, *array.shape[1:]), array.fill_value, array.dtype)
        full[: len(values)] = values
        start = block * self.block_rows
        array[start : start + self.block_rows] = full

    def publish(self, num_blocks: int) -> None:
        """The plan is written: make sure that it is on disk, then create ``commits``. From now on the store exists."""
        if (root := self._local_root) is not None:
            for name in self.array_names():
                for folder, _, files in os.walk(root / name):
                    fsync(*(Path(folder) / file for file in files), Path(folder))
        create_commits(self._group, num_blocks)

    def commit(self, block: int, num_rows: int, names: Iterable[str]) -> None:
        """Make sure that the block's shards of the named arrays are on disk, then say that the block is there."""
        if (root := self._local_root) is not None:
            for name in names:  # zarr renames a finished file into place, but the system writes it when it likes
                file = root / name / self._chunk_key(name, block)
                fsync(file, *(folder for folder in file.parents if folder.is_relative_to(root / name)))
        self._array("commits")[block] = num_rows

    def block_bytes(self, block: int, names: Iterable[str]) -> int:
        """Bytes on disk of one block of the named arrays."""
        keys = [f"{name}/{self._chunk_key(name, block)}" for name in names]
        return sum(sync(self._group.store.getsize(key)) for key in keys)

    def mark_complete(self) -> None:
        """Check that every block is committed, remove what killed workers left half written, and mark the store.

        Raises RuntimeError where a block is missing although every worker is done.
        """
        if left := self.missing_blocks():
            raise RuntimeError(f"{self.path}: blocks {left[:10]} are not committed although every worker is done")
        if (root := self._local_root) is not None:
            for stale in root.rglob("*.partial"):
                stale.unlink()
        self.attributes["complete"] = True
        self._group.attrs.put(self.attributes)
        if self._lock is not None:
            self._lock.release()  # a lease is no part of a complete store

    def _chunk_key(self, name: str, block: int) -> str:
        return "/".join(["c", str(block), *("0" for _ in self._array(name).shape[1:])])

    @property
    def _local_root(self) -> Path | None:
        """The store's folder; None for an object store."""
        return local_root(self._group.store)


def _lock(location: Any) -> Lock | Lease:
    """What keeps other runs out, as long as it lives."""
    root = local_root(location)
    return Lock(root, "store.path", StoreError) if root is not None else Lease(location)
