"""The folder of the rollouts: its manifest, the prompts, and a Parquet file for each finished part.

rollouts.json      what the rollouts follow from, and how many parts there are; there from the beginning on
prompts/*.npy      the prompts as token ids
part_000000.parquet, ...   a row for each rollout, prompt after prompt; there when it is whole

Each file is whole or not there: distill/run/parts.py.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray

from distill.data.dataset import MANIFEST, PART
from distill.errors import ConfigError
from distill.rollouts.prompts import Prompts
from distill.run.parts import PartsFolder, PartsKind

_PROMPTS = "prompts"
_KIND = PartsKind("distill-rollouts", 1, MANIFEST, PART, "rollouts", ["prompts"], folder=_PROMPTS)
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


class Parts(PartsFolder):
    """The folder of one run."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError for a folder with other content, and for another format."""
        super().__init__(folder, _KIND)

    def keep(self, prompts: Prompts, part_prompts: int, **facts: Any) -> None:
        """Keep the prompts, then write the manifest, with these facts beside the numbers of parts and prompts."""
        (self.folder / _PROMPTS).mkdir(exist_ok=True)
        for name in _ARRAYS:
            self.write(self.folder / _PROMPTS / f"{name}.npy", partial(_save, array=getattr(prompts, name)))
        self.begin(-(-len(prompts) // part_prompts), prompts=len(prompts), **facts)

    def prompts(self) -> Prompts:
        """The prompts that `keep` kept. Raises ConfigError where they cannot be read."""
        try:
            found = [np.load(self.folder / _PROMPTS / f"{name}.npy", mmap_mode="r") for name in _ARRAYS]
        except (OSError, ValueError) as error:
            raise ConfigError(f"output: cannot read the prompts in {self.folder / _PROMPTS}: {error}") from error
        return Prompts(*found)

    def write_part(self, part: int, rows: Sequence[Row]) -> None:
        """Write a part. The same rows make the same bytes. Raises StorageError where the disk is full, or fails."""
        columns = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), _SCHEMA.types, strict=True)]
        table = pa.Table.from_arrays(columns, schema=_SCHEMA)
        self.write(
            self.file(part),
            lambda file: pa.parquet.write_table(table, file, compression="zstd", compression_level=3, version="2.6"),
        )


def _save(file: IO[bytes], array: NDArray[Any]) -> None:
    np.save(file, array)
