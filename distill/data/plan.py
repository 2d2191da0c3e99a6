"""Where each sample lies in the store, and how a block is cut into batches. Pure arithmetic: no torch, no files.

R rows (one token position each), S samples, B blocks of `block_rows` rows. A sample has consecutive rows of one block;
block b starts at row b * `block_rows`; the rows that are left at the end of a block stay empty.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.errors import ConfigError
from distill.store.schema import INNER_ROWS

_FEWEST_AUTO_BLOCKS = 64
_USUAL_AUTO_BLOCK = 65536
_MANY_AUTO_BLOCKS = 16384
_LARGEST_AUTO_BLOCK = 1 << 20


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
        """[B] int64: rows in use: up to the end of the block's last sample, since there are no gaps before."""
        begins = np.arange(self.num_blocks) * self.block_rows
        last = np.append(np.searchsorted(self.starts, begins[1:]), len(self.starts)) - 1
        return np.asarray(self.starts[last] + self.lengths[last] - begins)


def batches(lengths: NDArray[np.int32], max_tokens: int, switch: int | None = None) -> list[NDArray[np.int64]]:
    """The samples of a block, which have these lengths, in batches of similar length, longest first: positions each.

    A batch padded to its longest sample has at most `max_tokens` tokens (a longer sample is a batch of its own).
    A sample joins a batch only if its padding is at most 1/16 of the longest sample, or 32 tokens: that costs less
    than another forward pass. A sample longer than `switch` joins samples of its own length only.
    """
    order = np.argsort(-lengths, kind="stable")
    falling = -lengths[order].astype(np.int64)  # ascending, for searchsorted
    found: list[NDArray[np.int64]] = []
    first = 0
    while first < len(order):
        longest = -int(falling[first])
        padding = 0 if switch is not None and longest > switch else max(32, longest // 16)
        most = first + max(1, max_tokens // longest)
        stop = min(most, int(falling.searchsorted(padding - longest, "right")))
        found.append(order[first:stop])
        first = stop
    return found


def permutation(num_samples: int, seed: int) -> NDArray[np.integer]:
    """[S] int32, or int64 for 2^31 samples and more: the order in which samples are laid out.

    It makes neighbours in a chunk random.
    """
    order: NDArray[np.integer] = np.arange(num_samples, dtype=np.int32 if num_samples < 1 << 31 else np.int64)
    np.random.Generator(np.random.PCG64(seed)).shuffle(order)
    return order


def auto_block_rows(lengths: NDArray[np.int32]) -> int:
    """The rows of a block, from the data alone: a power of two.

    As many as leave more than 32 blocks, up to 65,536; where that makes more than 16,384 blocks, as many as make no
    more, up to 2^20; and always as many as the longest sample needs.
    """
    longest, total = int(lengths.max()), int(lengths.sum(dtype=np.int64))
    small = min(total // _FEWEST_AUTO_BLOCKS, _USUAL_AUTO_BLOCK)
    large = min(-(-total // _MANY_AUTO_BLOCKS), _LARGEST_AUTO_BLOCK)
    return 1 << (max(longest, small, large) - 1).bit_length()


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
    ends = np.zeros(len(lengths) + 1, np.int64)  # where each sample begins if there are no gaps, and the last ends
    ends[1:] = lengths
    np.cumsum(ends, out=ends)  # in place: from int32, it would make another array
    sample = block = 0
    while sample < len(lengths):
        begin = int(ends[sample])
        following = sample + int(ends[sample:].searchsorted(begin + block_rows, "right")) - 1
        ends[sample:following] += block * block_rows - begin  # in place: the starts, with the gaps before their block
        sample, block = following, block + 1
    return Plan(block_rows, ends[:-1], lengths)
