"""The store on disk: the only user of zarr. docs/format.md specifies what is written here.

A store is a Zarr v3 group. Arrays over rows are cut into blocks, one shard of each array per block, and a block is
written by one worker only: whole shards first, made durable, then its entry in ``commits``. A block without that
entry is not there, whatever chunks lie around.

R rows, S samples, B blocks.
"""

import os
import warnings
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

from distill.errors import StoreError

FORMAT = "distill-cache"
VERSION = 1
_SAMPLE_CHUNK = 1 << 20
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
        """The store at `path`; None where there is nothing, or only the beginnings of one.

        Raises StoreError where there is something else, or a format version that this program does not know.
        """
        if "://" not in path and not _is_group(Path(path)):
            return None
        zarr.config.set({"async.concurrency": 1, "threading.max_workers": 1})  # the workers are the parallelism
        try:
            group = zarr.open_group(_location(path, options, read_only=not writable), mode="r+" if writable else "r")
        except FileNotFoundError:
            return None
        except Exception as error:  # zarr's, the file system's, or an object store client's own
            raise StoreError(f"store.path: cannot open {path}: {str(error).splitlines()[0]}") from error
        found = group.attrs.get("format"), group.attrs.get("version")
        if found[0] != FORMAT:
            raise StoreError(
                f"store.path: expected a {FORMAT} at {path}, found another Zarr group (format {found[0]!r})"
            )
        if found[1] != VERSION:
            raise StoreError(f"store.path: expected format version {VERSION} at {path}, found {found[1]!r}")
        if "commits" not in group:  # made last: a plan that was interrupted
            return None
        return cls(group, path)

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
        """Create the group, its attributes and its arrays; ``commits`` is left to `publish`.

        attributes: must hold block_rows. sizes: R, S and B as row, sample and block. inner_rows: of an inner chunk.
        Raises StoreError where the path cannot be written.
        """
        try:
            group = zarr.create_group(
                _location(path, options, read_only=False),
                overwrite=True,
                attributes={"format": FORMAT, "version": VERSION, **attributes},
            )
            for spec in specs:
                _create_array(group, spec, sizes[spec.over], int(attributes["block_rows"]), inner_rows, codec)
        except OSError as error:
            raise StoreError(f"store.path: cannot write {path}: {error.strerror or error}") from error
        return cls(group, path)

    def publish(self, num_blocks: int) -> None:
        """The plan is written: create ``commits`` [B] int64, one chunk per block. From here on the store exists."""
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
        for name in names:
            self._fsync(name, block)
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
        if isinstance(self._group.store, LocalStore):
            for stale in Path(self._group.store.root).rglob("*.partial"):
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

    def _fsync(self, name: str, block: int) -> None:
        """zarr renames a finished file into place, and leaves it to the system when it reaches the disk."""
        store = self._group.store
        if not isinstance(store, LocalStore):
            return
        file = Path(store.root) / name / self._chunk_key(name, block)
        for path in (file, file.parent):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def check_writable(path: str) -> None:
    """Raise StoreError where a local `path` could not be created or written; creates nothing."""
    if "://" in path:
        return
    at = Path(path).absolute()
    while not at.exists():
        at = at.parent
    if not at.is_dir() or not os.access(at, os.W_OK | os.X_OK):
        raise StoreError(f"store.path: cannot write {path}: {at} is not a folder that may be written")


def _is_group(path: Path) -> bool:
    """Whether there is a Zarr group; False for nothing. Raises StoreError for a file, or a folder of something else."""
    if (path / "zarr.json").is_file():
        return True
    content = [entry for entry in path.iterdir() if not entry.name.endswith(".partial")] if path.is_dir() else []
    if path.is_file() or content:
        kind = "a file" if path.is_file() else "a folder with other content"
        raise StoreError(f"store.path: expected a {FORMAT}, an empty folder or nothing at {path}, found {kind}")
    return False


def _location(path: str, options: Mapping[str, Any], read_only: bool) -> Any:
    """What zarr takes for a local folder, or for the URL of an object store."""
    if "://" not in path:
        return LocalStore(path, read_only=read_only)
    try:
        import obstore
        from zarr.storage import ObjectStore
    except ImportError as error:
        raise StoreError(f"store.path: {path} needs obstore: pip install 'distill[s3]'") from error
    try:
        return ObjectStore(obstore.store.from_url(path, **options), read_only=read_only)
    except Exception as error:
        raise StoreError(f"store.path: cannot use {path}: {error}") from error


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
