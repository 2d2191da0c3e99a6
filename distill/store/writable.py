"""A store, opened to be written: created once, then filled block by block.

Every worker opens the store, and each block is written by one worker only. It writes whole shards first, then their
checksums, makes sure that they are on disk, and then writes the block's entry in ``commits``.
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from zarr.core.sync import sync

from distill.errors import DistillError, StoreError, first_line
from distill.store.checksums import checksum, digest_of_checksums
from distill.store.lease import Lease
from distill.store.location import Lock, fsync, local_root, locate
from distill.store.metadata import array_digest, array_documents, group_document, put, sealed
from distill.store.requests import together
from distill.store.schema import CAPTURED, FORMAT, PLANNED, SAMPLE_TABLE, VERSION
from distill.store.store import Store


class WritableStore(Store):
    """An open store that may be written."""

    _mode = "r+"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._lock: Lock | Lease | None = None
        self._commits_document: dict[str, Any] = {}
        self._sample_checksums: dict[str, list[int]] = {}
        self._block_checksums: dict[tuple[int, str], NDArray[np.uint32]] = {}

    @classmethod
    def create(
        cls, path: str, options: Mapping[str, Any], attributes: Mapping[str, Any], planned: Collection[str], codec: str
    ) -> Self:
        """Create the group, its attributes and its arrays, and lock it. ``commits`` is left to `publish`.

        A store at `path` whose plan was interrupted is removed. attributes: must hold block_rows, num_blocks,
        num_samples, method, k and temperatures. planned: which arrays of PLANNED. codec: portable or compact.
        Raises StoreError where the path cannot be written, or another run is writing there.
        """
        documents = array_documents(attributes, {*planned, *CAPTURED}, codec)
        digests = {name: array_digest(document) for name, document in documents.items()}
        whole = {"format": FORMAT, "version": VERSION, **attributes, "complete": False, "arrays": digests}
        try:
            location = locate(path, options, read_only=False, known=True)  # it was looked at before
            if (root := local_root(location)) is not None:
                root.mkdir(parents=True, exist_ok=True)
            lock = lock_of(location)
            if sync(location.exists("commits/zarr.json")):
                raise StoreError(f"store.path: another run has begun {path} meanwhile; run the same command again")
            for name in documents:  # zarr.json stays: without commits nothing else is believed
                sync(location.delete_dir(name))
            put(location, "zarr.json", group_document(sealed(whole)))
            for name in documents.keys() - {"commits"}:
                put(location, f"{name}/zarr.json", documents[name])
        except DistillError:
            raise
        except Exception as error:
            raise StoreError(f"store.path: cannot write {path}: {first_line(error)}") from error
        store = cls(path, location, whole, {name: found for name, found in documents.items() if name != "commits"})
        store._lock, store._commits_document = lock, documents["commits"]
        store._begin_plan()
        return store

    def lock(self) -> None:
        """Keep other runs out, as long as this object lives. Raises StoreError where another run is writing."""
        self._lock = lock_of(self.location)

    def unlock(self) -> None:
        """Let other runs in again."""
        if self._lock is not None:
            self._lock.release()

    def _begin_plan(self) -> None:
        shape = self._arrays["plan_checksums"].shape
        self._plan_checksums = np.zeros(shape, np.uint32)
        self._sample_checksums = {}

    def write_all(self, name: str, values: NDArray[Any]) -> None:
        """Write a whole array over samples."""
        self._note_table(name, values)
        self._arrays[name][:] = values

    def write_rows(self, name: str, block: int, values: NDArray[Any]) -> None:
        """Write one block of an array over rows in one assignment: values [n, ...], n <= block_rows, then fill."""
        full = self._padded(name, values)
        array, start = self._arrays[name], block * self.block_rows
        if name in CAPTURED:  # of a run that was killed, or damaged: zarr would read it
            sync(self.location.delete(self.chunk_key(name, block)))
        array[start : start + self.block_rows] = full
        if name in PLANNED:
            self._note_plan(name, block, full)
        else:
            self._block_checksums[block, name] = self._inner_checksums(full)

    def publish(self) -> None:
        """The plan is written: seal it, make sure that it is on disk, then create ``commits``: the store exists."""
        self._arrays["plan_checksums"][:] = self._plan_checksums
        self.attributes = sealed(self.attributes | self._plan_digests())
        put(self.location, "zarr.json", group_document(self.attributes))
        self._sync_plan()
        document = self._commits_document | {"attributes": self.attributes}
        put(self.location, "commits/zarr.json", document)
        self._add_arrays({"commits": document})

    def commit(self, block: int, num_rows: int) -> None:
        """Make sure that the block's shards of all captured arrays are on disk, then say that the block is there."""
        parts = [self._block_checksums.pop((block, name)) for name in self.captured]
        self._arrays["checksums"][block] = np.concatenate(parts)
        self._flush(block, *self.captured, "checksums")
        self._arrays["commits"][block] = num_rows
        self._flush(block, "commits")

    def block_bytes(self, block: int, names: Iterable[str]) -> int:
        """Bytes on disk of one block of the named arrays."""
        return sum(together(self.location.getsize(self.chunk_key(name, block)) for name in names))

    def mark_complete(self) -> None:
        """Check that every block is committed, remove what killed workers left half written, and mark the store.

        Raises RuntimeError where a block is missing although every worker is done.
        """
        if left := self.missing_blocks():
            raise RuntimeError(f"{self.path}: blocks {left[:10]} are not committed although every worker is done")
        if (root := local_root(self.location)) is not None:
            for stale in root.rglob("*.partial"):
                stale.unlink()
        self._mark(complete=True)
        self.unlock()  # a lease is no part of a complete store

    def reopen(self) -> None:
        """Mark a complete store, of which something is missing or was taken back, as not complete."""
        if self.complete:
            self._mark(complete=False)

    # What is missing of a plan, after an incomplete copy or a repair, is written again from the dataset.

    @property
    def plan_is_whole(self) -> bool:
        """Whether every chunk is there that the plan wrote, whatever it contains."""
        keys = [key for name in (*SAMPLE_TABLE, "plan_checksums") for key in self.chunk_keys(name)]
        whole = all(self._blocks_there(name).all() for name in self.planned)
        return whole and all(together(self.location.exists(key) for key in keys))

    def rewrite_plan(
        self, table: Mapping[str, NDArray[Any]], blocks: Callable[[], Iterable[Mapping[str, NDArray[Any]]]]
    ) -> None:
        """Write what is missing of the plan.

        table: the arrays over samples. blocks: gives the planned arrays over rows of each block, in order.
        Raises StoreError where they are not what the plan was made of.
        """
        self._begin_plan()
        for name, values in table.items():
            self._note_table(name, values)
        for block, arrays in enumerate(blocks()):
            for name in arrays:
                self._note_plan(name, block, self._padded(name, arrays[name]))
        if differing := [name for name, found in self._plan_digests().items() if self.attributes[name] != found]:
            raise StoreError(
                f"{self.path}: a part of its plan is missing, and the dataset gives another plan now "
                f"({', '.join(differing)} differ): it cannot be written again"
            )
        for name, values in table.items():
            self.write_all(name, values)
        there = {name: self._blocks_there(name) for name in self.planned}
        for block, arrays in enumerate(blocks()):
            for name in arrays:
                if not there[name][block]:
                    self.write_rows(name, block, arrays[name])
        self._arrays["plan_checksums"][:] = self._plan_checksums
        self._sync_plan()

    def lacking_blocks(self) -> list[int]:
        """Blocks that are committed, and of which a chunk is missing, as after an incomplete copy."""
        whole = self.committed()
        for name in (*self.captured, "checksums"):
            whole &= self._blocks_there(name)
        return [int(block) for block in np.flatnonzero(self.committed() & ~whole)]

    def take_back(self, block: int) -> None:
        """Remove the commit of a block, so that it is made again."""
        sync(self.location.delete(self.chunk_key("commits", block)))

    def _flush(self, block: int, *names: str) -> None:
        """On a local disk: zarr renames a finished file into place, but the system writes it when it likes."""
        root = local_root(self.location)
        if root is None:
            return
        for name in names:
            file = root / self.chunk_key(name, block)
            if file.exists():  # a chunk of nothing but fill values is not
                fsync(file, *(folder for folder in file.parents if folder.is_relative_to(root / name)))

    def _mark(self, complete: bool) -> None:
        self.attributes["complete"] = complete
        put(self.location, "zarr.json", group_document(self.attributes))

    def _padded(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        array = self._arrays[name]
        full = np.full((self.block_rows, *array.shape[1:]), array.fill_value, array.dtype)
        full[: len(values)] = values
        return full

    def _inner_checksums(self, full: NDArray[Any]) -> NDArray[np.uint32]:
        each = self.inner_rows
        parts = (full[at : at + each] for at in range(0, self.block_rows, each))
        return np.array([checksum(part, self.seed) for part in parts], np.uint32)

    def _note_table(self, name: str, values: NDArray[Any]) -> None:
        array = self._arrays[name]
        parts = (values[at : at + array.chunks[0]] for at in range(0, len(values), array.chunks[0]))
        self._sample_checksums[name] = [checksum(part.astype(array.dtype)) for part in parts]

    def _note_plan(self, name: str, block: int, full: NDArray[Any]) -> None:
        found = self._inner_checksums(full)
        place = self.planned.index(name) * len(found)
        self._plan_checksums[block, place : place + len(found)] = found

    def _plan_digests(self) -> dict[str, Any]:
        digest = digest_of_checksums(self._plan_checksums)
        return {"tokens_digest": digest, "sample_checksums": self._sample_checksums}

    def _sync_plan(self) -> None:
        if (root := local_root(self.location)) is not None:
            for name in (*SAMPLE_TABLE, *self.planned, "plan_checksums"):
                for folder, _, files in os.walk(root / name):
                    fsync(*(Path(folder) / file for file in files), Path(folder))


def lock_of(location: Any) -> Lock | Lease:
    """What keeps other runs out, as long as it lives."""
    root = local_root(location)
    return Lock(root, "store.path", StoreError) if root is not None else Lease(location)
