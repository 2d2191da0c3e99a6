"""Format version 1 as data: which arrays a store has. docs/format.md says what they mean."""

import numpy as np

from distill.store import ArraySpec

CAPTURED = ("topk_ids", "topk_logprobs", "logsumexp", "tail_logprob")
"""The arrays that workers write, block by block."""


def array_specs(k: int, num_temperatures: int, loss_mask: bool) -> list[ArraySpec]:
    """All arrays but ``commits``, which the store makes itself, last of all."""
    temperature = ("temperature", num_temperatures)
    specs = [
        ArraySpec("sample_start", "sample", (), "int64", 0),
        ArraySpec("sample_length", "sample", (), "int32", 0),
        ArraySpec("sample_index", "sample", (), "int64", 0),
        ArraySpec("tokens", "row", (), "int32", -1),
        ArraySpec("topk_ids", "row", (("k", k),), "int32", -1),
        ArraySpec("topk_logprobs", "row", (("k", k),), "float16", np.nan),
        ArraySpec("logsumexp", "row", (temperature,), "float32", np.nan),
        ArraySpec("tail_logprob", "row", (temperature,), "float16", np.nan),
    ]
    if loss_mask:
        specs.append(ArraySpec("loss_mask", "row", (), "bool", False))
    return specs
