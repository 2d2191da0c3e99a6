"""How an array is cut into chunks and compressed: docs/format.md, "Chunks and codecs"."""

from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec

from distill.errors import StoreError
from distill.store.schema import ArraySpec

_SAMPLE_CHUNK = 1 << 20


def create_array(group: zarr.Group, spec: ArraySpec, size: int, block_rows: int, inner_rows: int, codec: str) -> None:
    """Create the empty array `spec`, of length `size` along its first axis.

    block_rows, inner_rows: rows of a shard, and of an inner chunk. codec: portable or compact.
    Raises StoreError where the codec's package is missing.
    """
    trailing = tuple(length for _, length in spec.trailing)
    dtype = np.dtype(spec.dtype)
    serializer: Any = BytesCodec(endian="little" if dtype.itemsize > 1 else None)
    compressors: tuple[Any, ...] = (
        BloscCodec(typesize=dtype.itemsize, cname="zstd", clevel=1, shuffle="shuffle"),
        Crc32cCodec(),
    )
    if codec == "compact" and dtype != np.bool_ and spec.over == "row":
        try:
            import pcodec  # noqa: F401
            from zarr.codecs.numcodecs import PCodec
        except ImportError as error:
            raise StoreError("store.codec=compact needs pcodec: pip install 'distill[compact]'") from error
        serializer, compressors = PCodec(), (Crc32cCodec(),)
    in_blocks = spec.over == "row"
    group.create_array(
        spec.name,
        shape=(size, *trailing),
        chunks=(inner_rows, *trailing) if in_blocks else (min(size, _SAMPLE_CHUNK), *trailing),
        shards=(block_rows, *trailing) if in_blocks else None,
        dtype=dtype,
        fill_value=spec.fill,
        serializer=serializer,
        compressors=compressors,
        dimension_names=(spec.over, *(name for name, _ in spec.trailing)),
    )


def create_commits(group: zarr.Group, num_blocks: int) -> None:
    """Create ``commits`` [B] int64, with a chunk for each block, since each block has its own writer."""
    group.create_array(
        "commits",
        shape=(num_blocks,),
        chunks=(1,),
        dtype="int64",
        fill_value=-1,
        serializer=BytesCodec(endian="little"),
        compressors=(Crc32cCodec(),),
        dimension_names=("block",),
    )
