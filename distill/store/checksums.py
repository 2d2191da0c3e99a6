"""The checksum of an array, and the hash of many."""

import hashlib
import sys
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray


def digest_of_checksums(checksums: NDArray[np.uint32]) -> str:
    """The hash of an array of checksums, little endian."""
    return hashlib.sha256(checksums.astype("<u4").tobytes()).hexdigest()[:16]


def checksum(values: NDArray[Any], seed: int = 0) -> int:
    """The CRC-32 (as in zlib, gzip and PNG) of an array's bytes, in C order and little endian, going on from `seed`."""
    little = values if sys.byteorder == "little" else values.astype(values.dtype.newbyteorder("<"))
    return zlib.crc32(np.ascontiguousarray(little).view(np.uint8).reshape(-1).data, seed)
