"""A store, opened to be read. docs/format.md specifies what is in it.

A store is a Zarr v3 group. Arrays over rows are cut into blocks: one shard of each array per block. A block without an
entry in ``commits`` is not there, whatever chunks of it exist.

R rows, S samples, B blocks.
"""

import warnings
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import zarr
from numpy.typing import NDArray

from distill.errors import StorageError, StoreError, first_line
from distill.store.location import is_group, locate
from distill.store.schema import FORMAT, VERSION

# zarr warns of pcodec each time an array is opened; docs/format.md says it once.
warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3")


class Store:
    """An open store. Each process opens its own."""

    _mode: Any = "r"

    def __init__(self, group: zarr.Group, path: str) -> None:
        self._group, self.path = group, path
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self.attributes: dict[str, Any] = dict(group.attrs)
        self.block_rows = int(self.attributes["block_rows"])

    @classmethod
    def open(cls, path: str, options: Mapping[str, Any], known: bool = False) -> Self | None:
        """The store at `path`, a folder or a URL; None where there is nothing.

        options: of the object store's client. known: it was opened before; it is waited for as long as in a run.

        Raises StoreError where there is something else, or a format version that this program does not know.
        """
        location = locate(path, options, read_only=cls._mode == "r", known=known)
        if not is_group(path, location):
            return None
        zarr.config.set({"async.concurrency": 1, "threading.max_workers": 1})  # the workers are the parallelism
        try:
            group = zarr.open_group(location, mode=cls._mode)
        except (StoreError, StorageError):
            raise
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

    @classmethod
    def existing(cls, path: str, options: Mapping[str, Any], known: bool = False) -> Self:
        """The store at `path`. Raises StoreError as `open` does, and where there is none, or no complete plan."""
        store = cls.open(path, options, known)
        if store is None or not store.published:
            raise StoreError(f"store.path: found no store at {path}")
        return store

    @property
    def published(self) -> bool:
        """Whether the plan was written to its end. Otherwise nothing in the store is valid yet."""
        return "commits" in self._group

    @property
    def complete(self) -> bool:
        """Whether every block was committed, and that was checked."""
        return bool(self.attributes["complete"])

    @property
    def inner_rows(self) -> int:
        """Rows of an inner chunk: the smallest piece that can be decompressed."""
        return int(self._array("tokens").chunks[0])

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Entries [start, stop) of an array, over rows, samples or blocks. Raises StoreError where it is damaged."""
        try:
            return np.asarray(self._array(name)[start:stop])
        except StorageError:
            raise
        except Exception as error:  # codecs raise RuntimeError, ValueError and their own
            raise StoreError(f"{self.path}: damaged data in {name}, rows {start} to {stop}: {error}") from error

    def read_all(self, name: str) -> NDArray[Any]:
        """A whole array: sample_start, sample_length, commits, ..."""
        return self.read_rows(name, 0, self._array(name).shape[0])

    def missing_blocks(self) -> list[int]:
        """The blocks that are not committed."""
        return [int(block) for block in np.flatnonzero(self.read_all("commits") < 0)]

    def array_names(self) -> list[str]:
        """The names of the arrays that are there."""
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
