"""How arrays are compressed: stores of before, and what each encoding is worth."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.codecs.numcodecs import PCodec

from distill.store.schema import CAPTURED, ArraySpec
from distill.store.store import Store
from distill.store.writable import WritableStore
from distill.teacher.capture import as_float16, round_logprobs
from tests.captured import sample, topk
from tests.store.test_store import create, fill, values

METHODS = ("topk", "sample")
CODECS = ("portable", "compact")


def of_before(spec: ArraySpec, method: str, codec: str) -> dict[str, Any]:
    """The codecs that stores had at first, whatever the method: one for all arrays."""
    size = np.dtype(spec.dtype).itemsize
    found = {"filters": (), "serializer": BytesCodec(endian="little" if size > 1 else None)}
    blosc = BloscCodec(typesize=size, cname="zstd", clevel=1, shuffle="shuffle")
    compact = codec == "compact" and spec.over == "row" and spec.dtype != "bool"
    found |= {"compressors": (blosc, Crc32cCodec()) if spec.over != "block" and not compact else (Crc32cCodec(),)}
    return found | ({"serializer": PCodec()} if compact else {})


@pytest.mark.parametrize("codec", CODECS)
def test_a_store_of_before_is_read_and_completed(codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its zarr.json says how, whatever is written today."""
    monkeypatch.setattr("distill.store.codecs._pipeline", of_before)
    monkeypatch.setattr("distill.store.writable.CAPTURED", CAPTURED[:-1])  # without next_logprob
    store = create(tmp_path / "x.zarr", codec)
    fill(store, 0)
    monkeypatch.undo()
    store.unlock()
    today = create(tmp_path / "today.zarr", codec)
    assert today.attributes["arrays"]["target_ids"] != store.attributes["arrays"]["target_ids"]
    again = WritableStore.existing(str(tmp_path / "x.zarr"), {})
    again.lock()
    assert again.missing_blocks() == [1, 2]
    for block in (1, 2):
        fill(again, block)
    again.mark_complete()
    assert "next_logprob" not in again.array_names()
    complete = Store.existing(str(tmp_path / "x.zarr"), {})
    for block in range(3):
        rows = block * 32, block * 32 + 20
        np.testing.assert_array_equal(complete.read_rows("tokens", *rows), np.arange(20) + block)
        np.testing.assert_array_equal(complete.read_rows("target_logprobs", *rows), values() - block)
        np.testing.assert_array_equal(complete.read_rows("target_ids", *rows)[:, 0], np.arange(0, 100, 5) + block)


def rows_of(method: str, num_rows: int) -> dict[str, Any]:
    """Rows of made-up distributions over 5,000 ids, most of them open and some of them certain, as they are stored."""
    torch.manual_seed(0)
    usual = -1.1 * torch.arange(1, 5001).log()[torch.randperm(5000)]  # how often words come
    logits = (usual + 2 * torch.randn(num_rows, 5000)) * (0.5 + 2 * torch.rand(num_rows, 1))
    following = logits.softmax(dim=1).multinomial(1)[:, 0]
    u = torch.rand(num_rows, dtype=torch.float64)
    found = topk(logits, 24, [1.0], following) if method == "topk" else sample(logits, 24, u, following)
    return {
        "target_ids": found.target_ids.numpy(),
        "target_logprobs": round_logprobs(found.target_logprobs.numpy()),
        "logsumexp": found.logsumexp.numpy(),
        "tail_logprob": round_logprobs(found.tail_logprob.numpy()),
        "next_logprob": as_float16(found.next_logprob.numpy()),
    }


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("method", METHODS)
def test_rows_come_back_and_are_smaller_than_before(
    method: str, codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rows = 1024
    rows, sizes = rows_of(method, num_rows), {}
    attributes = {"method": method, "k": 24, "temperatures": [1.0], "block_rows": num_rows, "num_blocks": 1}
    attributes |= {"num_samples": 1, "fingerprint": "made up"}
    for when in ("today", "before"):
        if when == "before":
            monkeypatch.setattr("distill.store.codecs._pipeline", of_before)
        store = WritableStore.create(str(tmp_path / when), {}, attributes, planned=["tokens"], codec=codec)
        for name in CAPTURED:
            store.write_rows(name, 0, rows[name])
            np.testing.assert_array_equal(store._arrays[name][:], rows[name])
        sizes[when] = {name: store.block_bytes(0, [name]) for name in CAPTURED}
    for name in CAPTURED:
        assert sizes["today"][name] <= 1.01 * sizes["before"][name], (name, sizes)
    assert sum(sizes["today"].values()) < 0.97 * sum(sizes["before"].values()), sizes
