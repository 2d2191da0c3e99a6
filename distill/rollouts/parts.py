"""The folder of the rollouts: its manifest, the prompts, and a Parquet file for each finished part.

rollouts.json      what the rollouts follow from, and how many parts there are; there from the beginning on
prompts/*.npy      the prompts as token ids
part_000000.parquet, ...   a row for each rollout, prompt after prompt; there when it is whole

A file gets its name when it is whole and on disk. So a part that is there is never written again.
"""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray

from distill.data.dataset import MANIFEST, PART
from distill.errors import ConfigError, StorageError, disk_failure
from distill.rollouts.prompts import Prompts
from distill.run.nodes import PROBE
from distill.store.fingerprint import differences
from distill.store.location import fsync

_FORMAT, _VERSION = "distill-rollouts", 1
_PROMPTS = "prompts"
_ARRAYS = ("tokens", "ends", "numbers")
_SCHEMA = pa.schema(
    [
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("completion_text", pa.string()),
        ("prompt_number", pa.int64()),
        ("sample_number", pa.int32()),
        ("finished", pa.bool_()),
    ]
)


class Row(NamedTuple):
    """One rollout, with the columns of a part."""

    prompt_ids: Any
    completion_ids: Any
    logprobs: Any
    completion_text: str
    prompt_number: int
    sample_number: int
    finished: bool


class Parts:
    """The folder of one run. manifest: what rollouts.json says; None where nothing was begun."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError for a folder with other content, and for another format."""
        self.folder, self.manifest = folder, None
        try:
            self.manifest = json.loads((folder / MANIFEST).read_text())
        except FileNotFoundError:
            names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
            if any(name != _PROMPTS and not name.endswith(".partial") and not name.startswith(PROBE) for name in names):
                raise ConfigError(
                    f"output: expected a new or empty folder, or one of an earlier run, found other files in {folder}"
                ) from None
            return
        except (OSError, ValueError) as error:
            raise ConfigError(f"output: cannot read {folder / MANIFEST}: {error}") from error
        made: Any = self.manifest if isinstance(self.manifest, dict) else {}
        found = made.get("format"), made.get("version")
        if found != (_FORMAT, _VERSION):
            raise ConfigError(
                f"output: expected {_FORMAT}, version {_VERSION}, in {folder / MANIFEST}, found {found[0]}, {found[1]}"
            )
        if lacking := {"parts", "prompts", "config"} - made.keys():
            raise ConfigError(f"output: expected {min(lacking)!r} in {folder / MANIFEST}, found none")

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise ConfigError where the rollouts that are there follow from other settings, naming each."""
        assert self.manifest is not None
        if differing := differences(self.manifest["config"], settings, "the folder"):
            raise ConfigError(
                f"output: {self.folder} has another run's rollouts; choose another folder, or delete it:\n  "
                + "\n  ".join(differing)
            )

    def begin(self, prompts: Prompts, part_prompts: int, **facts: Any) -> None:
        """Keep the prompts, then write the manifest, with these facts beside the numbers of parts and prompts."""
        (self.folder / _PROMPTS).mkdir(exist_ok=True)
        for name in _ARRAYS:
            self._write(self.folder / _PROMPTS / f"{name}.npy", partial(_save, array=getattr(prompts, name)))
        self.manifest = {
            "format": _FORMAT, "version": _VERSION, "parts": -(-len(prompts) // part_prompts), "prompts": len(prompts),
            **facts,
        }  # fmt: skip
        text = json.dumps(self.manifest, indent=1) + "\n"
        self._write(self.folder / MANIFEST, lambda file: file.write(text.encode()))

    def prompts(self) -> Prompts:
        """The prompts that `begin` kept. Raises ConfigError where they cannot be read."""
        try:
            found = [np.load(self.folder / _PROMPTS / f"{name}.npy", mmap_mode="r") for name in _ARRAYS]
        except (OSError, ValueError) as error:
            raise ConfigError(f"output: cannot read the prompts in {self.folder / _PROMPTS}: {error}") from error
        return Prompts(*found)

    def missing(self) -> list[int]:
        """The parts that are not there."""
        assert self.manifest is not None
        return [part for part in range(self.manifest["parts"]) if not self.file(part).exists()]

    def clean(self) -> None:
        """Delete what runs that were killed have left of unfinished files."""
        for stale in [*self.folder.glob("*.partial"), *self.folder.glob(f"{_PROMPTS}/*.partial")]:
            stale.unlink()

    def file(self, part: int) -> Path:
        """The file of a part."""
        return self.folder / PART.format(f"{part:06d}")

    def write(self, part: int, rows: Sequence[Row]) -> None:
        """Write a part. The same rows make the same bytes. Raises StorageError where the disk is full, or fails."""
        columns = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), _SCHEMA.types, strict=True)]
        table = pa.Table.from_arrays(columns, schema=_SCHEMA)
        self._write(
            self.file(part),
            lambda file: pa.parquet.write_table(table, file, compression="zstd", compression_level=3, version="2.6"),
        )

    def _write(self, path: Path, write: Callable[[IO[bytes]], object]) -> None:
        unfinished = path.with_name(f"{path.name}.partial")
        try:
            with unfinished.open("wb") as file:
                write(file)
            fsync(unfinished)
        except Exception as error:
            with contextlib.suppress(OSError):  # what is there of it would fill a full disk
                unfinished.unlink()
            if not (failure := disk_failure(error)):
                raise
            raise StorageError(f"output: cannot write {path}: {failure}") from error
        unfinished.rename(path)
        fsync(path.parent)


def _save(file: IO[bytes], array: NDArray[Any]) -> None:
    np.save(file, array)
