"""How an array is cut into chunks and compressed: docs/format.md, "Chunks and codecs"."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, TransposeCodec

from distill.errors import StoreError
from distill.store.schema import ArraySpec, inner_rows

CODECS = ("sharding_indexed", "transpose", "bytes", "blosc", "crc32c", "numcodecs.pcodec")
"""All that a store may have. No other codec is run, whatever a store says."""

_SAMPLE_CHUNK = 1 << 20
_CHECKSUM_CHUNK = 1 << 16
_BLOSC_LEVEL = 6
"""zstd's level 11: with 9, the highest, top-64 is 3% smaller and takes ten times as long to write."""


@dataclass(frozen=True)
class _Blosc:
    """zstd, with bytes of equal significance side by side or not. by_column: [K, rows] instead of [rows, K]."""

    shuffle: Literal["shuffle", "noshuffle"] = "shuffle"
    by_column: bool = False


@dataclass(frozen=True)
class _Pcodec:
    """pcodec. delta_order: how many times neighbours are subtracted."""

    level: int
    delta_order: int = 0


_PLAIN, _SHUFFLED, _BY_COLUMN = _Blosc("noshuffle"), _Blosc(), _Blosc(by_column=True)
_ENCODINGS: dict[str, dict[tuple[str, str], _Blosc | _Pcodec]] = {
    # whole words and lines come again
    "tokens": dict.fromkeys(itertools.product(("topk", "sample"), ("portable", "compact")), _PLAIN),
    "target_ids": {
        ("topk", "portable"): _SHUFFLED,
        ("topk", "compact"): _Pcodec(level=12),
        ("sample", "portable"): _PLAIN,  # runs of -1
        ("sample", "compact"): _Pcodec(level=12),
    },
    "target_logprobs": {
        ("topk", "portable"): _SHUFFLED,
        ("topk", "compact"): _Pcodec(level=12, delta_order=1),  # they descend
        ("sample", "portable"): _BY_COLUMN,  # most columns are nearly all NaN
        ("sample", "compact"): _BY_COLUMN,
    },
    **{
        name: {("topk", "compact"): _Pcodec(level=8), ("sample", "compact"): _Pcodec(level=8)}
        for name in ("logsumexp", "tail_logprob", "next_logprob", "sampled_logprob")
    },
}
"""Of each array over rows, for (capture.method, store.codec), what is smallest for its time; any other is _SHUFFLED.

`python -m tests.benchmarks.encoding` measures them. A store is read by its own zarr.json, whatever is here.
"""


def create_array(group: zarr.Group, spec: ArraySpec, attributes: Mapping[str, Any], codec: str) -> None:
    """Create the empty array `spec` of a store with these attributes: block_rows, num_blocks, num_samples and method.

    codec: portable or compact. Raises StoreError where the codec's package is missing.
    """
    block_rows, num_blocks = int(attributes["block_rows"]), int(attributes["num_blocks"])
    size = {"row": num_blocks * block_rows, "sample": int(attributes["num_samples"]), "block": num_blocks}[spec.over]
    trailing = tuple(length for _, length in spec.trailing)
    chunk = {
        "row": inner_rows(attributes),
        "sample": min(size, _SAMPLE_CHUNK),
        # each block has its own writer, except for what the plan writes
        "block": min(size, max(1, _CHECKSUM_CHUNK // trailing[0])) if spec.name == "plan_checksums" else 1,
    }[spec.over]
    group.create_array(
        spec.name,
        shape=(size, *trailing),
        chunks=(chunk, *trailing),
        shards=(block_rows, *trailing) if spec.over == "row" else None,
        dtype=np.dtype(spec.dtype),
        fill_value=spec.fill,
        dimension_names=(spec.over, *(name for name, _ in spec.trailing)),
        **_pipeline(spec, str(attributes["method"]), codec),
    )


def _pipeline(spec: ArraySpec, method: str, codec: str) -> dict[str, Any]:
    """The filters, the serializer and the compressors of an array."""
    itemsize = np.dtype(spec.dtype).itemsize
    pipeline: dict[str, Any] = {
        "filters": (),
        "serializer": BytesCodec(endian="little" if itemsize > 1 else None),
        "compressors": (Crc32cCodec(),),
    }
    if spec.over == "block":  # random numbers, or one in a chunk: nothing to compress
        return pipeline
    match _ENCODINGS.get(spec.name, {}).get((method, codec), _SHUFFLED):
        case _Blosc(shuffle, by_column):
            blosc = BloscCodec(typesize=itemsize, cname="zstd", clevel=_BLOSC_LEVEL, shuffle=shuffle)
            filters = (TransposeCodec(order=(1, 0)),) if by_column else ()
            return pipeline | {"filters": filters, "compressors": (blosc, Crc32cCodec())}
        case _Pcodec(level, delta_order):
            return pipeline | {"serializer": _pcodec(level, delta_order)}


def _pcodec(level: int, delta_order: int) -> Any:
    try:
        import pcodec  # noqa: F401
        from zarr.codecs.numcodecs import PCodec
    except ImportError as error:
        raise StoreError("store.codec=compact needs pcodec: pip install 'distill[compact]'") from error
    return PCodec(level=level, delta_spec="try_consecutive", delta_encoding_order=delta_order)
