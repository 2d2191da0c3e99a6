"""How an array is cut into chunks and compressed: docs/format.md, "Chunks and codecs"."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec

from distill.errors import StoreError
from distill.store.schema import ArraySpec, inner_rows

CODECS = ("sharding_indexed", "bytes", "blosc", "crc32c", "numcodecs.pcodec")
"""All that a store may have. No other codec is run, whatever a store says."""

_SAMPLE_CHUNK = 1 << 20
_CHECKSUM_CHUNK = 1 << 16


def create_array(group: zarr.Group, spec: ArraySpec, attributes: Mapping[str, Any], codec: str) -> None:
    """Create the empty array `spec` of a store with these attributes: block_rows, num_blocks and num_samples count.

    codec: portable or compact. Raises StoreError where the codec's package is missing.
    """
    block_rows, num_blocks = int(attributes["block_rows"]), int(attributes["num_blocks"])
    size = {"row": num_blocks * block_rows, "sample": int(attributes["num_samples"]), "block": num_blocks}[spec.over]
    trailing = tuple(length for _, length in spec.trailing)
    dtype = np.dtype(spec.dtype)
    serializer: Any = BytesCodec(endian="little" if dtype.itemsize > 1 else None)
    compressors: tuple[Any, ...] = (
        BloscCodec(typesize=dtype.itemsize, cname="zstd", clevel=1, shuffle="shuffle"),
        Crc32cCodec(),
    )
    if spec.over == "block":  # random numbers, or one in a chunk: nothing to compress
        compressors = (Crc32cCodec(),)
    if codec == "compact" and dtype != np.bool_ and spec.over == "row":
        try:
            import pcodec  # noqa: F401
            from zarr.codecs.numcodecs import PCodec
        except ImportError as error:
            raise StoreError("store.codec=compact needs pcodec: pip install 'distill[compact]'") from error
        serializer, compressors = PCodec(), (Crc32cCodec(),)
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
        dtype=dtype,
        fill_value=spec.fill,
        serializer=serializer,
        compressors=compressors,
        dimension_names=(spec.over, *(name for name, _ in spec.trailing)),
    )
