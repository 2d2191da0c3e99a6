"""Format version 1 as data: which arrays a store has. docs/format.md says what they mean."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

FORMAT = "distill-cache"
VERSION = 1

CAPTURED = ("target_ids", "target_logprobs", "logsumexp", "tail_logprob")
"""The arrays that workers write, block by block."""


@dataclass(frozen=True)
class ArraySpec:
    """One array: what its first axis counts, and its trailing axes, dtype and fill value."""

    name: str
    over: Literal["row", "sample"]
    trailing: tuple[tuple[str, int], ...]
    dtype: str
    fill: Any


def array_specs(k: int, num_temperatures: int, loss_mask: bool) -> list[ArraySpec]:
    """All arrays except ``commits``, which is created last, when the plan is written."""
    temperature = ("temperature", num_temperatures)
    specs = [
        ArraySpec("sample_start", "sample", (), "int64", 0),
        ArraySpec("sample_length", "sample", (), "int32", 0),
        ArraySpec("sample_index", "sample", (), "int64", 0),
        ArraySpec("tokens", "row", (), "int32", -1),
        ArraySpec("target_ids", "row", (("k", k),), "int32", -1),
        ArraySpec("target_logprobs", "row", (("k", k),), "float16", np.nan),
        ArraySpec("logsumexp", "row", (temperature,), "float32", np.nan),
        ArraySpec("tail_logprob", "row", (temperature,), "float16", np.nan),
    ]
    if loss_mask:
        specs.append(ArraySpec("loss_mask", "row", (), "bool", False))
    return specs
