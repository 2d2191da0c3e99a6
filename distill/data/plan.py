"""Where each sample lies in the store, and how a block is cut into batches. Pure arithmetic: no torch, no files.

R rows (one token position each), S samples, B blocks of `block_rows` rows. A sample has consecutive rows of one block;
block b starts at row b * `block_rows`; the rows that are left at the end of a block stay empty.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.errors import ConfigError
from distill.store.schema import INNER_ROWS

_LARGEST_AUTO_BLOCK = 65536
_FEWEST_AUTO_BLOCKS = 64


@dataclass(frozen=True)
class Plan:
    """The layout of the samples.

    starts:   [S] int64, first row of each sample, ascending
    lengths:  [S] int32, rows (tokens) of each sample
    """

    block_rows: int
    starts: NDArray[np.int64]
    lengths: NDArray[np.int32]

    @property
    def num_blocks(self) -> int:
        """B: blocks of the store."""
        return int(self.starts[-1]) // self.block_rows + 1

    @property
    def num_rows(self) -> int:
        """R: rows of the store, the empty ones included."""
        return self.num_blocks * self.block_rows

    def samples_of(self, block: int) -> range:
        """The samples that lie in `block`."""
        first, last = np.searchsorted(self.starts, [block * self.block_rows, (block + 1) * self.block_rows])
        return range(int(first), int(last))

    def tokens_per_block(self) -> NDArray[np.int64]:
        """[B] int64: rows in use."""
        return np.bincount(
            self.starts // self.block_rows, weights=self.lengths, minlength=self.num_blocks
        ).astype(np.int64)  # fmt: skip

    def batches(self, block: int, max_tokens: int, switch: int | None = None) -> list[list[int]]:
        """The samples of `block` in batches of similar length, longest first.

        A batch padded to its longest sample has at most `max_tokens` tokens (a longer sample is a batch of its own).
        A sample joins a batch only if its padding is at most 1/16 of the longest sample, or 32 tokens: that costs less
        than another forward pass. A sample longer than `switch` joins samples of its own length only.
        """
        batches: list[list[int]] = []
        longest = 0
        for sample in sorted(self.samples_of(block), key=lambda sample: -self.lengths[sample]):
            padding = longest - int(self.lengths[sample])
            full = not batches or (len(batches[-1]) + 1) * longest > max_tokens
            alone = switch is not None and longest > switch and padding > 0
            if full or alone or padding > max(32, longest // 16):
                batches.append([])
                longest = int(self.lengths[sample])
            batches[-1].append(sample)
        return batches


def permutation(num_samples: int, seed: int) -> NDArray[np.int64]:
    """[S] int64: the order in which samples are laid out, so that neighbours in a chunk are random."""
    return np.random.Generator(np.random.PCG64(seed)).permutation(num_samples)


def auto_block_rows(lengths: NDArray[np.int32]) -> int:
    """The rows of a block, from the data alone: a power of two, at most 65536, so that there are more than 32 blocks.

    Larger where the longest sample needs it; then there may be fewer blocks.
    """
    longest, total = int(lengths.max()), int(lengths.sum(dtype=np.int64))
    wanted = max(longest, min(total // _FEWEST_AUTO_BLOCKS, _LARGEST_AUTO_BLOCK))
    return 1 << (wanted - 1).bit_length()


def lay_out(lengths: NDArray[np.int32], block_rows: int) -> Plan:
    """Place samples of these lengths ([S] int32, at least 1 each), in this order, into blocks of `block_rows` rows.

    Raises ConfigError where a block cannot hold the longest sample, or is not a whole number of inner chunks.
    """
    longest = int(lengths.max())
    if block_rows < longest:
        raise ConfigError(
            f"store.block_rows: expected at least the longest sample, {longest} tokens, found {block_rows}"
        )
    if block_rows > INNER_ROWS and block_rows % INNER_ROWS:
        raise ConfigError(
            f"store.block_rows: expected at most {INNER_ROWS} or a multiple of it (the inner chunk), found {block_rows}"
        )
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])  # [S + 1], without gaps
    starts = np.empty(len(lengths), np.int64)
    sample = block = 0
    while sample < len(lengths):
        following = int(np.searchsorted(ends, ends[sample] + block_rows, side="right")) - 1
        starts[sample:following] = ends[sample:following] - ends[sample] + block * block_rows
        sample, block = following, block + 1
    return Plan(block_rows, starts, lengths)
