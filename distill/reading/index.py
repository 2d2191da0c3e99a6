"""Which samples of a store to read, and where they are. S samples of the store, P pieces.

A store of 10^8 samples has an index of 1.2 GB. So there is one for all processes of a machine (see `shared`), part of
it costs 4 bytes a sample, and nothing else here is as long as the samples are many.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.reading.shared import SharedArray
from distill.store.store import Store

PIECE_ROWS = 65536
"""The most rows in which the samples of a piece begin. A block of as many rows, or fewer, is one piece."""

_PART = 1 << 20


@dataclass(frozen=True, eq=False)
class Index:
    """Samples of a store, in its order or in the opposite one. A position counts them; a number counts the store's.

    _starts, _lengths: [S] int64 and int32, the first row and the length of every sample of the store
    _numbers:          the numbers of the samples meant here; None: all
    """

    _starts: SharedArray[np.int64]
    _lengths: SharedArray[np.int32]
    _numbers: SharedArray[Any] | None = None

    @classmethod
    def of(cls, store: Store) -> "Index":
        """All samples of a store. Raises StoreError where it is damaged."""
        starts, lengths = store.read_chunks("sample_start"), store.read_chunks("sample_length")
        return cls(SharedArray(starts, np.int64), SharedArray(lengths, np.int32))

    def __len__(self) -> int:
        return len(self._lengths if self._numbers is None else self._numbers)

    def __getitem__(self, which: slice) -> "Index":
        chosen = range(*which.indices(len(self)))
        parts = (chosen[at : at + _PART] for at in range(0, len(chosen), _PART))
        return self._of(self._at(np.arange(part.start, part.stop, part.step)) for part in parts)

    def where(self, wanted: NDArray[np.bool_]) -> "Index":
        """The samples at whose positions `wanted` is true."""
        parts = range(0, len(self), _PART)
        return self._of(self._at(np.flatnonzero(wanted[at : at + _PART]) + at) for at in parts)

    def at(self, ranges: NDArray[np.int64]) -> "Index":
        """The samples at the positions of some ranges, [P, 2]."""
        return self._of(self._at(np.arange(start, stop)) for start, stop in ranges)

    def ascending(self) -> "Index":
        """The same samples in the order of the store."""
        return self[::-1] if len(self) and self.number(0) > self.number(len(self) - 1) else self

    def number(self, position: int) -> int:
        """The number in the store of the sample at `position`."""
        return int(self._at(position))

    def rows(self, position: int) -> tuple[int, int]:
        """The first row of the sample at `position`, and the row after its last one."""
        number = self._at(position)
        start = int(self._starts.values[number])
        return start, start + int(self._lengths.values[number])

    def spans(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """The first rows and the lengths of the samples at the positions [start, stop)."""
        numbers: Any = slice(start, stop) if self._numbers is None else self._numbers.values[start:stop]
        return self._starts.values[numbers], self._lengths.values[numbers]

    def lengths(self) -> Iterator[NDArray[np.int32]]:
        """The lengths of all samples, part after part."""
        return (self.spans(at, min(at + _PART, len(self)))[1] for at in range(0, len(self), _PART))

    def sources(self, store: Store) -> NDArray[np.int64]:
        """[S] int64: the example of the dataset that each sample is from. Raises StoreError where it is damaged."""
        found = store.read_all("sample_index")
        return found if self._numbers is None else found[self._numbers.values]

    def pieces(self, block_rows: int) -> NDArray[np.int64]:
        """[P, 2]: the samples of each piece, as the range of their positions. The index must be ascending.

        A piece is what begins in the same 65,536 rows of a block: what a reader reads at once. None is empty.
        """
        of_block = np.arange(0, block_rows, PIECE_ROWS)
        num_blocks = int(self._starts.values[-1]) // block_rows + 1
        edges = (np.arange(num_blocks)[:, None] * block_rows + of_block).ravel()
        at = self._starts.values.searchsorted(edges)
        if self._numbers is not None:  # of one type: else all numbers would be converted
            at = self._numbers.values.searchsorted(at.astype(self._numbers.values.dtype))
        ends = np.append(at[1:], len(self))
        return np.stack([at, ends], axis=1)[ends > at]

    def _at(self, positions: Any) -> Any:
        """The numbers of the samples at these positions."""
        return positions if self._numbers is None else self._numbers.values[positions]

    def _of(self, numbers: Iterator[NDArray[Any]]) -> "Index":
        dtype = np.int32 if len(self._lengths) < 1 << 31 else np.int64
        return Index(self._starts, self._lengths, SharedArray(numbers, dtype))
