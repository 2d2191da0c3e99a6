"""Format version 1 as data: which arrays a store has. docs/format.md says what they mean."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

FORMAT = "distill-cache"
VERSION = 1

INNER_ROWS = 8192
"""Rows of an inner chunk: the smallest piece that a reader can decompress, and that has a checksum of its own."""

SAMPLE_TABLE = ("sample_start", "sample_length", "sample_index")
"""The arrays over samples, which the plan writes."""

PLANNED = ("tokens", "loss_mask", "sampled_logprob")
"""The arrays over rows that the plan writes; all but tokens only where the dataset says so."""

CAPTURED = ("target_ids", "target_logprobs", "logsumexp", "tail_logprob", "next_logprob")
"""The arrays over rows that workers write, block by block. Stores of before have no next_logprob."""


@dataclass(frozen=True)
class ArraySpec:
    """One array: what its first axis counts, and its trailing axes, dtype and fill value."""

    name: str
    over: Literal["row", "sample", "block"]
    trailing: tuple[tuple[str, int], ...]
    dtype: str
    fill: Any


def array_specs(attributes: Mapping[str, Any], over_rows: Collection[str]) -> list[ArraySpec]:
    """All arrays of a store with these attributes: k, temperatures and block_rows count.

    over_rows: the names of those over rows, of PLANNED and CAPTURED
    """
    k, temperature = ("k", attributes["k"]), ("temperature", len(attributes["temperatures"]))
    inner_chunks = attributes["block_rows"] // inner_rows(attributes)
    num_planned, num_captured = (sum(name in over_rows for name in names) for names in (PLANNED, CAPTURED))
    specs = [
        ArraySpec("sample_start", "sample", (), "int64", -1),
        ArraySpec("sample_length", "sample", (), "int32", -1),
        ArraySpec("sample_index", "sample", (), "int64", -1),
        ArraySpec("tokens", "row", (), "int32", -1),
        ArraySpec("loss_mask", "row", (), "bool", False),
        ArraySpec("sampled_logprob", "row", (), "float16", np.nan),
        ArraySpec("target_ids", "row", (k,), "int32", -1),
        ArraySpec("target_logprobs", "row", (k,), "float16", np.nan),
        ArraySpec("logsumexp", "row", (temperature,), "float32", np.nan),
        ArraySpec("tail_logprob", "row", (temperature,), "float16", np.nan),
        ArraySpec("next_logprob", "row", (), "float16", np.nan),
        ArraySpec("plan_checksums", "block", (("checksum", num_planned * inner_chunks),), "uint32", 0),
        ArraySpec("checksums", "block", (("checksum", num_captured * inner_chunks),), "uint32", 0),
        ArraySpec("commits", "block", (), "int64", -1),
    ]
    return [spec for spec in specs if spec.over != "row" or spec.name in over_rows]


def inner_rows(attributes: Mapping[str, Any]) -> int:
    """Rows of an inner chunk of a store with these attributes."""
    return min(INNER_ROWS, int(attributes["block_rows"]))
