"""The store on disk: the only user of zarr. docs/format.md specifies what is written here.

A store is a Zarr v3 group. Arrays over rows are cut into blocks, one shard of each array per block, and a block is
written by one worker only: whole shards first, made durable, then its entry in ``commits``. A block without that
entry is not there, whatever chunks lie around.

R rows, S samples, B blocks.
"""

import fcntl
import logging
import os
import time
import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.core.sync import sync
from zarr.storage import LocalStore

from distill.errors import StoreError, first_line

logger = logging.getLogger(__name__)

FORMAT = "distill-cache"
VERSION = 1
_SAMPLE_CHUNK = 1 << 20
_PATIENCE_SECONDS = 3.0  # workers of a run that was just killed may be ending
# Raised for pcodec each time an array is opened; docs/format.md says it once.
warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3")


@dataclass(frozen=True)
class ArraySpec:
    """One array: over rows in blocks, over samples, or over blocks; with its trailing axes, dtype and fill value."""

    name: str
    over: Literal["row", "sample", "block"]
    trailing: tuple[tuple[str, int], ...]
    dtype: str
    fill: Any


class Store:
    """An open store. Every worker may hold one; blocks have one writer each."""

    def __init__(self, group: zarr.Group, path: str) -> None:
        self._group, self.path = group, path
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self.attributes: dict[str, Any] = dict(group.attrs)
        self.block_rows = int(self.attributes["block_rows"])

    # -- opening and creating ------------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: str, options: Mapping[str, Any], writable: bool = False) -> "Store | None":
        """The store at `path`; None where there is nothing.

        Raises StoreError where there is something else, or a format version that this program does not know.
        """
        location = _location(path, options, read_only=not writable)
        if not _is_group(path, location):
            return None
        zarr.config.set({"async.concurrency": 1, "threading.max_workers": 1})  # the workers are the parallelism
        try:
            group = zarr.open_group(location, mode="r+" if writable else "r")
        except Exception as error:  # zarr's, the file system's, or an object store client's own
            raise StoreError(f"store.path: cannot open {path}: {first_line(error)}") from error
        found = group.attrs.get("format"), group.attrs.get("version")
        if found[0] != FORMAT:
            raise StoreError(
                f"store.path: expected a {FORMAT} at {path}, found another Zarr group (format {found[0]!r})"
            )
        if found[1] != VERSION:
            raise StoreError(f"store.path: expected format version {VERSION} at {path}, found {found[1]!r}")
        return cls(group, path)

    @property
    def inner_rows(self) -> int:
        """Rows of an inner chunk, the least that is decompressed."""
        return int(self._array("tokens").chunks[0])

    @property
    def published(self) -> bool:
        """Whether the plan was written to its end; else there is nothing in the store yet."""
        return "commits" in self._group

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
    ) -> "Store":
        """Create the group, locked, its attributes and its arrays; ``commits`` is left to `publish`.

        What is at `path`, a store whose plan was interrupted, is removed. attributes: must hold block_rows.
        sizes: R, S and B as row, sample and block. inner_rows: of an inner chunk.
        Raises StoreError where the path cannot be written, or another run is writing there.
        """
        try:
            location = _location(path, options, read_only=False)
            if isinstance(location, LocalStore):
                location.root.mkdir(parents=True, exist_ok=True)
            lock = _Lock(location)
            if sync(location.exists("commits/zarr.json")):
                raise StoreError(f"store.path: another run has begun {path} meanwhile; run the same command again")
            for spec in specs:
                sync(location.delete_dir(spec.name))
            sync(location.delete("zarr.json"))
            group = zarr.create_group(location, attributes={"format": FORMAT, "version": VERSION, **attributes})
            for spec in specs:
                _create_array(group, spec, sizes[spec.over], int(attributes["block_rows"]), inner_rows, codec)
        except StoreError:
            raise
        except Exception as error:
            raise StoreError(f"store.path: cannot write {path}: {first_line(error)}") from error
        store = cls(group, path)
        store._lock = lock
        return store

    def publish(self, num_blocks: int) -> None:
        """The plan is written and durable: create ``commits`` [B] int64, a chunk per block. Now the store exists."""
        if (root := self._local_root) is not None:
            for name in self.array_names():
                for folder, _, files in os.walk(root / name):
                    _fsync(*(Path(folder) / file for file in files), Path(folder))
        self._group.create_array(
            "commits",
            shape=(num_blocks,),
            chunks=(1,),
            dtype="int64",
            fill_value=-1,
            serializer=BytesCodec(endian="little"),
            compressors=(Crc32cCodec(),),
            dimension_names=("block",),
        )

    def lock(self) -> None:
        """Keep other runs out, as long as this object lives. Raises StoreError where one is at it."""
        self._lock = _Lock(self._group.store)

    # -- blocks --------------------------------------------------------------------------------------------------

    def write_rows(self, name: str, block: int, values: NDArray[Any]) -> None:
        """Write one block of an array over rows in one assignment: values [n, ...], n <= block_rows, then fill."""
        array = self._array(name)
        full = np.full((self.block_rows, *array.shape[1:]), array.fill_value, array.dtype)
        full[: len(values)] = values
        start = block * self.block_rows
        array[start : start + self.block_rows] = full

    def commit(self, block: int, num_rows: int, names: Iterable[str]) -> None:
        """Make the block's shards of the named arrays durable, then say that it is there."""
        if (root := self._local_root) is not None:
            for name in names:  # zarr renames a finished file into place, and lets the system write it when it likes
                file = root / name / self._chunk_key(name, block)
                _fsync(file, *(folder for folder in file.parents if folder.is_relative_to(root / name)))
        self._array("commits")[block] = num_rows

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) of an array over rows, or entries of one over samples. Raises StoreError where damaged."""
        try:
            return np.asarray(self._array(name)[start:stop])
        except Exception as error:  # codecs raise RuntimeError, ValueError and their own
            raise StoreError(f"{self.path}: damaged data in {name}, rows {start} to {stop}: {error}") from error

    def write_all(self, name: str, values: NDArray[Any]) -> None:
        """Write a whole array over samples."""
        self._array(name)[:] = values

    def read_all(self, name: str) -> NDArray[Any]:
        """A whole array: sample_start, sample_length, commits, ..."""
        return self.read_rows(name, 0, self._array(name).shape[0])

    def missing_blocks(self) -> list[int]:
        """The blocks without a commit."""
        return [int(block) for block in np.flatnonzero(self.read_all("commits") < 0)]

    def block_bytes(self, block: int, names: Iterable[str]) -> int:
        """Bytes on disk of one block of the named arrays."""
        keys = [f"{name}/{self._chunk_key(name, block)}" for name in names]
        return sum(sync(self._group.store.getsize(key)) for key in keys)

    # -- the whole -----------------------------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Whether every block was committed and checked."""
        return bool(self.attributes["complete"])

    def mark_complete(self) -> None:
        """Remove what killed workers left half written, and say that the store is complete."""
        if (root := self._local_root) is not None:
            for stale in root.rglob("*.partial"):
                stale.unlink()
        self.attributes["complete"] = True
        self._group.attrs.put(self.attributes)

    def array_names(self) -> list[str]:
        """Names of the arrays that are there."""
        return sorted(self._group.array_keys())

    def describe(self, name: str) -> tuple[tuple[int, ...], str, int]:
        """Shape, dtype and bytes on disk of an array."""
        array = self._array(name)
        return array.shape, str(array.dtype), array.nbytes_stored()

    def _array(self, name: str) -> "zarr.Array[Any]":
        if name not in self._arrays:
            found = self._group[name]
            assert isinstance(found, zarr.Array)
            self._arrays[name] = found
        return self._arrays[name]

    def _chunk_key(self, name: str, block: int) -> str:
        return "/".join(["c", str(block), *("0" for _ in self._array(name).shape[1:])])

    @property
    def _local_root(self) -> Path | None:
        """The store's folder; None for an object store."""
        store = self._group.store
        return Path(store.root) if isinstance(store, LocalStore) else None


def check_writable(path: str) -> None:
    """Raise StoreError where a local `path` could not be created or written; creates nothing."""
    if "://" in path:
        return
    at = Path(path).expanduser().absolute()
    try:
        while not at.exists():
            at = at.parent
        writable = at.is_dir() and os.access(at, os.W_OK | os.X_OK)
    except OSError:  # a folder on the way that may not be entered
        writable = False
    if not writable:
        raise StoreError(f"store.path: cannot write {path}: {at} is not a folder that may be written")


def _is_group(path: str, location: Any) -> bool:
    """Whether there is a Zarr group; False for nothing. Raises StoreError for a file, or a folder of something else."""
    try:
        if "://" in path:
            there = sync(location.exists("zarr.json"))
            kind = "" if there or sync(location.is_empty("")) else "other content"
        else:
            root = Path(path).expanduser()
            there = (root / "zarr.json").is_file()
            inside = root.iterdir() if root.is_dir() and not there else []
            foreign = any(not entry.name.endswith(".partial") for entry in inside)
            kind = "a file" if root.is_file() else "a folder with other content" if foreign else ""
    except Exception as error:  # no permission, or an object store client's own
        raise StoreError(f"store.path: cannot read {path}: {first_line(error)}") from error
    if kind:
        raise StoreError(f"store.path: expected a {FORMAT}, an empty folder or nothing at {path}, found {kind}")
    return bool(there)


def _location(path: str, options: Mapping[str, Any], read_only: bool) -> Any:
    """What zarr takes for a local folder, or for the URL of an object store."""
    if "://" not in path:
        return LocalStore(Path(path).expanduser(), read_only=read_only)
    try:
        import obstore
        from zarr.storage import ObjectStore
    except ImportError as error:
        raise StoreError(f"store.path: {path} needs obstore: pip install 'distill[s3]'") from error
    try:
        return ObjectStore(obstore.store.from_url(path, **options), read_only=read_only)
    except Exception as error:
        raise StoreError(f"store.path: cannot use {path}: {first_line(error)}") from error


class _Lock:
    """A lock on a local store's folder; object stores, and file systems without such locks, stay unlocked."""

    def __init__(self, location: Any) -> None:
        if not isinstance(location, LocalStore):
            return
        self._descriptor = os.open(location.root, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        try:
            while not self._taken():
                if time.monotonic() > deadline:
                    raise StoreError(f"store.path: another run is writing {location.root}; wait for it, or stop it")
                time.sleep(0.1)
        except OSError as error:
            logger.info("store: %s cannot be locked (%s): let no other run write it", location.root, error.strerror)

    def _taken(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _fsync(*paths: Path) -> None:
    """Wait until files and folders are on disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _create_array(group: zarr.Group, spec: ArraySpec, size: int, block_rows: int, inner_rows: int, codec: str) -> None:
    trailing = tuple(length for _, length in spec.trailing)
    dtype = np.dtype(spec.dtype)
    serializer: Any = BytesCodec(endian="little" if dtype.itemsize > 1 else None)
    compressors: tuple[Any, ...] = (
        BloscCodec(typesize=dtype.itemsize, cname="zstd", clevel=1, shuffle="shuffle"),
        Crc32cCodec(),
    )
    if codec == "compact" and dtype != np.bool_ and spec.over == "row":
        try:
            import pcodec  # noqa: F401
            from zarr.codecs.numcodecs import PCodec
        except ImportError as error:
            raise StoreError("store.codec=compact needs pcodec: pip install 'distill[compact]'") from error
        serializer, compressors = PCodec(), (Crc32cCodec(),)
    in_blocks = spec.over == "row"
    group.create_array(
        spec.name,
        shape=(size, *trailing),
        chunks=(inner_rows, *trailing) if in_blocks else (min(size, _SAMPLE_CHUNK), *trailing),
        shards=(block_rows, *trailing) if in_blocks else None,
        dtype=dtype,
        fill_value=spec.fill,
        serializer=serializer,
        compressors=compressors,
        dimension_names=(spec.over, *(name for name, _ in spec.trailing)),
    )
