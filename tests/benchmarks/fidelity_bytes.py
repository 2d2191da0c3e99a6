"""Bytes a token of each method, from writing its rows.

Top-k and VarOpt are written with a store, codec compact, one block of one inner chunk; ARRAYS count.
Draws with replacement have no store. They are laid out as the literature has them, the different ids of a row in order
and how often each came; each of these arrays, and the tokens, with the codec of the store that is smallest for it.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import Blosc
from numcodecs.pcodec import PCodec
from numpy.typing import NDArray

from distill.store.writable import WritableStore
from tests.benchmarks.fidelity_models import Windows, encode, hidden_states, load, windows
from tests.benchmarks.fidelity_rows import METHODS, Arrays, Method, Settings, expected_ids, rows_of

ARRAYS = ("tokens", "target_ids", "target_logprobs", "logsumexp", "tail_logprob")
"""Without next_logprob, which is the same for all methods."""


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Of each method: bytes a token and ids a token."""
    teacher = load(settings)
    text = windows(encode(settings), settings).tokens[: settings.rows // settings.length]
    some = Windows(text)
    tokens = some.inputs.flatten().numpy().astype(np.int32)
    hidden = hidden_states(teacher, some.inputs, 4)
    found: dict[str, Any] = {"text": {"bytes": smallest(tokens) / len(tokens), "ids": 0.0}}
    found["full"] = {"bytes": 2.0 * teacher.config.vocab_size, "ids": float(teacher.config.vocab_size)}
    for method in {each.kept: each for each in METHODS if each.kind not in ("full", "text")}.values():
        parts = []
        for first in range(0, len(hidden), 1024):
            logits = teacher.lm_head(hidden[first : first + 1024]).detach()
            parts.append(rows_of(logits, method, some.next_ids[first : first + 1024], 0, first))
        rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if method.kind == "draws":
            size = sum(smallest(values) for values in (tokens, *draw_arrays(rows["target_ids"])))
        else:
            size = store_bytes(tokens, rows, method, settings.length)
        found[method.kept] = {"bytes": size / len(tokens), "ids": expected_ids(rows)}
        print(f"{method.kept}: {size / len(tokens):.1f} bytes a token, {expected_ids(rows):.1f} ids", flush=True)
    yield {"figures": found}


def store_bytes(tokens: NDArray[np.int32], rows: Arrays, method: Method, length: int) -> int:
    """Bytes of the arrays over rows in a store of these rows"""
    num_samples = len(tokens) // length
    attributes = {
        "method": "topk" if method.kind == "topk" else "sample",
        "k": method.k,
        "temperatures": [1.0],
        "vocab_size": 1 << 17,
        "fingerprint": "made up",
        "block_rows": len(tokens),
        "num_blocks": 1,
        "num_samples": num_samples,
        "num_tokens": len(tokens),
    }
    with tempfile.TemporaryDirectory() as scratch:
        store = WritableStore.create(
            str(Path(scratch) / "rows.zarr"), {}, attributes, planned=["tokens"], codec="compact"
        )
        store.write_all("sample_start", np.arange(num_samples) * length)
        store.write_all("sample_length", np.full(num_samples, length))
        store.write_all("sample_index", np.arange(num_samples))
        store.write_rows("tokens", 0, tokens)
        store.publish()
        for name in ARRAYS[1:]:
            store.write_rows(name, 0, rows[name])
        store.write_rows("next_logprob", 0, np.full(len(tokens), np.nan, np.float16))
        store.commit(0, len(tokens))
        store.mark_complete()
        return store.block_bytes(0, ARRAYS)


def draw_arrays(ids: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.uint16], NDArray[np.uint16]]:
    """Draws [N, K], ascending in a row: the different ids of each row, how often each came, how many a row has."""
    first = np.ones(ids.shape, bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    counts = np.diff(np.append(np.flatnonzero(first), ids.size))
    return ids[first], counts.astype(np.uint16), first.sum(axis=1).astype(np.uint16)


def smallest(values: NDArray[Any]) -> int:
    """Bytes of one array, compressed with what the store has: whatever is smallest."""
    size = values.dtype.itemsize
    blosc = [Blosc("zstd", 6, shuffle, typesize=size) for shuffle in (Blosc.NOSHUFFLE, Blosc.SHUFFLE)]
    return min(len(codec.encode(np.ascontiguousarray(values))) for codec in (PCodec(level=12), *blosc))
