"""A store, opened to be read. docs/format.md specifies what is in it.

A store is a Zarr v3 group. Arrays over rows are cut into blocks: one shard of each array per block. A block without an
entry in ``commits`` is not there, whatever chunks of it exist.

Whatever is read is compared with its checksum: a chunk that is damaged, missing or another's is an error, never data.

R rows, S samples, B blocks.
"""

import os
import threading
import warnings
import zlib
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.array import AsyncArray
from zarr.core.metadata import ArrayV3Metadata
from zarr.storage import StorePath

from distill.errors import DistillError, StorageError, StoreError, first_line
from distill.store.checksums import checksum, digest_of_checksums
from distill.store.location import local_root, locate, marks, on_web
from distill.store.metadata import Document, damage, read_metadata
from distill.store.requests import keys_below, together
from distill.store.schema import CAPTURED, PLANNED, SAMPLE_TABLE, inner_rows

# zarr warns of pcodec each time an array is opened; docs/format.md says it once.
warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3")

_KEPT_BYTES = 1 << 24
_REMOTE_REQUESTS = 16  # at a time
_MEASURED_FILES = 1000


class Store:
    """An open store. Each process opens its own; any number of threads may read it."""

    _mode: Any = "r"

    def __init__(self, path: str, location: Any, attributes: Mapping[str, Any], documents: Mapping[str, Document]):
        self.path, self.location = path, location
        self.attributes: dict[str, Any] = dict(attributes)
        self.block_rows = int(attributes["block_rows"])
        self.num_blocks, self.num_samples = int(attributes["num_blocks"]), int(attributes["num_samples"])
        self.inner_rows = inner_rows(attributes)
        """Rows of an inner chunk: the smallest piece that can be decompressed and checked."""
        self.seed = zlib.crc32(str(attributes["fingerprint"]).encode())
        """What checksums of rows begin with, so that rows of another run do not match them."""
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._add_arrays(documents)
        self._kept: OrderedDict[tuple[str, int], NDArray[Any]] = OrderedDict()
        self._kept_bytes, self._guard = 0, threading.Lock()
        self._first_starts: dict[int, int] = {}  # of chunks of sample_start

    @classmethod
    def open(cls, path: str, options: Mapping[str, Any], known: bool = False) -> Self | None:
        """The store at `path`, a folder or a URL; None where there is nothing.

        options: of the object store's client. known: it was opened before; it is waited for as long as in a run.

        Raises StoreError where there is something else, a format version that this program does not know, or metadata
        that does not match its digest.
        """
        location = locate(path, options, read_only=cls._mode == "r", known=known)
        if (found := marks(path, location)) is None:
            return None
        # Locally the workers are the parallelism; a server answers many requests as fast as one.
        requests = _REMOTE_REQUESTS if "://" in path else 1
        zarr.config.set({"async.concurrency": requests, "threading.max_workers": 1})
        attributes, documents = read_metadata(path, location, *found)
        try:
            return cls(path, location, attributes, documents)
        except DistillError:
            raise
        except Exception as error:  # what the attributes say makes no sense, although they match their digest
            raise damage(path, f"its metadata is not that of a store: {first_line(error)}") from error

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
        return "commits" in self._arrays

    @property
    def complete(self) -> bool:
        """Whether every block was committed, and that was checked."""
        return bool(self.attributes["complete"])

    @property
    def planned(self) -> list[str]:
        """The names of the arrays over rows that the plan has written."""
        return [name for name in PLANNED if name in self._arrays]

    @property
    def captured(self) -> list[str]:
        """The names of the arrays over rows that workers write."""
        return [name for name in CAPTURED if name in self._arrays]

    @property
    def command(self) -> str:
        """The command that writes it: given again, it goes on."""
        return "distill.ingest" if "captured" in self.attributes else "distill.generate"

    @property
    def unknown(self) -> frozenset[str]:
        """The names of the arrays that do not say in every row what the teacher said: whoever captured it did not."""
        return frozenset(self.attributes.get("unknown", ()))

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Entries [start, stop) of an array, over rows, samples or blocks, as in `read_arrays`."""
        if name in SAMPLE_TABLE:
            return self._read_samples(name, start, stop)
        if name in PLANNED + CAPTURED:
            return self.read_arrays([name], start, stop)[name]
        return self._fetch([(name, start, stop)])[0]

    def read_arrays(self, names: Sequence[str], start: int, stop: int) -> dict[str, NDArray[Any]]:
        """Rows [start, stop) of several arrays over rows, asked for together: [stop - start, ...] each.

        Raises StoreError where they are damaged: a checksum is wrong.
        """
        size, first, last = self.inner_rows, start // self.inner_rows, -(-stop // self.inner_rows)
        per_block = self.block_rows // size
        checksums = self._checksums(names, range(first // per_block, (last - 1) // per_block + 1))
        # zarr asks for the inner chunks of a part of a shard one by one: over a link they are asked for together
        cuts = range(first, last) if "://" in self.path and last - first < per_block else [first]
        pieces = [(at * size, (at + 1 if len(cuts) > 1 else last) * size) for at in cuts]
        parts = iter(self._fetch([(name, *piece) for name in names for piece in pieces]))
        found = [_joined([next(parts) for _ in pieces]) for _ in names]
        for name, values in zip(names, found, strict=True):
            for i in range(last - first):
                block, place = divmod(first + i, per_block)
                if checksum(values[i * size : (i + 1) * size], self.seed) != checksums[name, block][place]:
                    self._check_given(self.chunk_key(name, block))
                    raise damage(self.path, f"{name} of block {block} does not match its checksums")
        low, high = start - first * size, stop - first * size
        return {name: values[low:high] for name, values in zip(names, found, strict=True)}

    def _check_given(self, key: str) -> None:
        """Raise StorageError where a web server has refused this file, which is there: it has another checksum."""
        server = on_web(self.location)
        if server is not None and key in server.refused:
            raise StorageError(f"store: cannot read {key} in {self.path}: access denied (403 Forbidden)")

    def read_all(self, name: str) -> NDArray[Any]:
        """A whole array: sample_start, sample_length, commits, ..."""
        array = self._arrays[name]
        if name not in SAMPLE_TABLE:
            return self.read_rows(name, 0, array.shape[0])
        found, each = np.empty(array.shape, array.dtype), array.chunks[0]
        for i, part in enumerate(self.read_chunks(name)):  # one at a time: the table may be large
            found[i * each : i * each + len(part)] = part
        return found

    def committed(self) -> NDArray[np.bool_]:
        """[B]: whether each block is committed, from a listing of the chunks of ``commits``, whatever they contain.

        On a web server, which lists nothing, a complete store is taken at its word. Raises StoreError of an unfinished
        one there.
        """
        if on_web(self.location) is None:
            return self._blocks_there("commits")
        if not self.complete:
            raise StoreError(
                f"store.path: {self.path} is unfinished, and a web server does not list what is there: only a complete "
                "store is read by its web address"
            )
        return np.ones(self.num_blocks, bool)

    def read_chunks(self, name: str) -> Iterator[NDArray[Any]]:
        """A whole array over samples, one chunk after the other."""
        for i in range(len(self.chunk_keys(name))):
            yield self._chunks(name, range(i, i + 1), keep=False)[i]

    def missing_blocks(self) -> list[int]:
        """The blocks that are not committed."""
        return [int(block) for block in np.flatnonzero(~self.committed())]

    def samples_of(self, block: int) -> range:
        """The samples in a block. Few chunks of sample_start are read, however many samples there are."""
        return range(*(self._first_sample(row) for row in (block * self.block_rows, (block + 1) * self.block_rows)))

    def _first_sample(self, row: int) -> int:
        """The first sample that starts at `row` or later."""
        size = self.chunk_length("sample_start")

        def first_start(chunk: int) -> int:
            if chunk not in self._first_starts:
                self._first_starts[chunk] = int(self.read_rows("sample_start", chunk * size, chunk * size + 1)[0])
            return self._first_starts[chunk]

        chunks = range(-(-self.num_samples // size))
        chunk = max(0, bisect_left(chunks, row, key=first_start) - 1)  # the last one that begins before `row`
        starts = self.read_rows("sample_start", chunk * size, min((chunk + 1) * size, self.num_samples))
        return chunk * size + int(np.searchsorted(starts, row))

    def tokens_per_block(self) -> NDArray[np.int64]:
        """[B] int64: rows in use, from the sample table, chunk by chunk."""
        tokens = np.zeros(self.num_blocks, np.int64)
        for starts, lengths in zip(self.read_chunks("sample_start"), self.read_chunks("sample_length"), strict=True):
            blocks = starts // self.block_rows
            first = int(blocks[0])
            part = np.bincount(blocks - first, weights=lengths).astype(np.int64)
            tokens[first : first + len(part)] += part
        return tokens

    def array_names(self) -> list[str]:
        """The names of the arrays."""
        return sorted(self._arrays)

    def describe(self, name: str) -> tuple[tuple[int, ...], str, int | None]:
        """Shape, dtype and bytes on disk of an array. None: a web server would have to be asked for too many files."""
        array = self._arrays[name]
        return (
            array.shape,
            str(array.dtype),
            array.nbytes_stored() if on_web(self.location) is None else self._measured(name),
        )

    def _measured(self, name: str) -> int | None:
        """Bytes of the files of an array, one by one; None where the store has too many."""
        if sum(len(self.chunk_keys(each)) for each in self._arrays) > _MEASURED_FILES:
            return None

        async def size(key: str) -> int:
            try:
                return int(await self.location.getsize(key))
            except FileNotFoundError:  # a chunk of fill values
                return 0

        keys, total = [f"{name}/zarr.json", *self.chunk_keys(name)], 0
        for at in range(0, len(keys), _REMOTE_REQUESTS):
            total += sum(together(size(key) for key in keys[at : at + _REMOTE_REQUESTS]))
        return total

    def _add_arrays(self, documents: Mapping[str, Document]) -> None:
        for name, document in documents.items():
            metadata = ArrayV3Metadata.from_dict(document)
            self._arrays[name] = zarr.Array(AsyncArray(metadata, StorePath(self.location, name)))

    def tokens_digest(self) -> str:
        """The hash of ``plan_checksums``, as the attribute of that name has it."""
        return digest_of_checksums(self.read_all("plan_checksums"))

    def chunk_length(self, name: str) -> int:
        """Entries of a chunk of an array (of a shard, where it has them), along its first axis."""
        array = self._arrays[name]
        return int((array.shards or array.chunks)[0])

    def chunk_key(self, name: str, number: int) -> str:
        """The key of a chunk (of a shard, where it has them) of an array: trailing axes are never cut."""
        return f"{name}/c/{number}" + "/0" * (len(self._arrays[name].shape) - 1)

    def chunk_keys(self, name: str) -> list[str]:
        """The keys of all chunks of an array, in order."""
        count = -(-self._arrays[name].shape[0] // self.chunk_length(name))
        return [self.chunk_key(name, number) for number in range(count)]

    def _blocks_there(self, name: str) -> NDArray[np.bool_]:
        """[B]: whether there is a chunk for each block of an array, from a listing."""
        try:
            keys = (key.partition("/") for key in keys_below(self.location, f"{name}/c"))
            blocks = [int(number) for number, _, rest in keys if number.isdecimal() and rest in ("", "0")]
            blocks = [block for block in blocks if block < self.num_blocks]
            if name == "commits" and (root := local_root(self.location)) is not None and blocks:
                with os.scandir(root / "commits/c") as entries:  # a power cut may leave an empty file
                    empty = {entry.name for entry in entries if entry.stat().st_size == 0}
                blocks = [block for block in blocks if str(block) not in empty]
        except DistillError:
            raise
        except Exception as error:  # the file system's, or an object store client's own
            raise StoreError(f"{self.path}: cannot list {name}: {first_line(error)}") from error
        there = np.zeros(self.num_blocks, bool)
        there[blocks] = True
        return there

    def _fetch(self, wanted: Sequence[tuple[str, int, int]]) -> list[NDArray[Any]]:
        """Entries [start, stop) of arrays (name, start, stop), asked for together, and only checked by their codecs."""
        return together(self._entries(*one) for one in wanted)

    async def _entries(self, name: str, start: int, stop: int) -> NDArray[Any]:
        try:
            return np.asarray(await self._arrays[name].async_array.getitem(slice(start, stop)))
        except (DistillError, MemoryError):
            raise
        except Exception as error:  # codecs raise RuntimeError, ValueError and their own
            kind = "block" if self._arrays[name].shards or name in ("commits", "checksums") else "chunk"
            where = f"{kind} {start // self.chunk_length(name)}"
            raise damage(self.path, f"{name}, {where}: {first_line(error)}") from error

    def _checksums(self, names: Sequence[str], blocks: range) -> dict[tuple[str, int], NDArray[np.uint32]]:
        """The checksums of the inner chunks of each array in each block: [inner chunks of a block]."""
        kinds = {"plan_checksums": self.planned, "checksums": self.captured}
        per_block = self.block_rows // self.inner_rows
        found: dict[tuple[str, int], NDArray[np.uint32]] = {}
        for kind, members in kinds.items():
            if {*names} & {*members}:
                each = self._arrays[kind].chunks[0]
                chunks = self._chunks(kind, range(blocks.start // each, (blocks.stop - 1) // each + 1))
                for block in blocks:
                    row = chunks[block // each][block % each].reshape(len(members), per_block)
                    found |= {(name, block): part for name, part in zip(members, row, strict=True)}
        return found

    def _read_samples(self, name: str, start: int, stop: int) -> NDArray[Any]:
        each = self._arrays[name].chunks[0]
        chunks = self._chunks(name, range(start // each, -(-max(stop, start + 1) // each)))
        return _joined([chunk[max(0, start - i * each) : stop - i * each] for i, chunk in chunks.items()])

    def _chunks(self, name: str, numbers: range, keep: bool = True) -> dict[int, NDArray[Any]]:
        """Chunks of an array that has no shards, by their number. keep: the last few are kept."""
        array = self._arrays[name]
        with self._guard:
            found = {i: self._kept[name, i] for i in numbers if (name, i) in self._kept}
        missing, each = [i for i in numbers if i not in found], array.chunks[0]
        if not missing:
            return found
        parts = self._fetch([(name, i * each, min((i + 1) * each, array.shape[0])) for i in missing])
        for i, part in zip(missing, parts, strict=True):
            if name in SAMPLE_TABLE and checksum(part) != self.attributes["sample_checksums"][name][i]:
                raise damage(self.path, f"{name}, chunk {i} does not match its checksum")
            found[i] = part
        if keep and len(numbers) <= 2:  # else it is read from end to end
            with self._guard:
                new = {(name, i): found[i] for i in missing if (name, i) not in self._kept}  # else of another thread
                self._kept |= new
                self._kept_bytes += sum(part.nbytes for part in new.values())
                while self._kept_bytes > _KEPT_BYTES and len(self._kept) > 2:
                    self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        return {i: found[i] for i in numbers}


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
