import tracemalloc

import numpy as np
import pytest

from distill.data.plan import auto_block_rows, batches, lay_out, permutation
from distill.errors import ConfigError


def lengths_of(seed, count=500, longest=900):
    return np.random.default_rng(seed).integers(1, longest, count).astype(np.int32)


@pytest.mark.parametrize("seed", range(5))
def test_every_sample_lies_inside_one_block_and_none_overlap(seed):
    lengths = lengths_of(seed)
    plan = lay_out(lengths, 1024)
    used = np.zeros(plan.num_rows, int)
    for start, length in zip(plan.starts, plan.lengths, strict=True):
        assert start // 1024 == (start + length - 1) // 1024
        used[start : start + length] += 1
    assert used.max() == 1
    assert used.sum() == lengths.sum() == plan.tokens_per_block().sum()
    assert [i for block in range(plan.num_blocks) for i in plan.samples_of(block)] == list(range(len(lengths)))
    assert all(len(plan.samples_of(block)) for block in range(plan.num_blocks))


def test_blocks_are_filled_before_the_next_begins():
    plan = lay_out(np.array([4, 4, 3, 8, 1], np.int32), 8)
    assert plan.starts.tolist() == [0, 4, 8, 16, 24]


def one_by_one(lengths, max_tokens, switch=None):
    """The batches as they were first written: the bytes of stores depend on them."""
    batches: list[list[int]] = []
    longest = 0
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        padding = longest - int(lengths[sample])
        full = not batches or (len(batches[-1]) + 1) * longest > max_tokens
        alone = switch is not None and longest > switch and padding > 0
        if full or alone or padding > max(32, longest // 16):
            batches.append([])
            longest = int(lengths[sample])
        batches[-1].append(sample)
    return batches


def as_lists(found):
    return [batch.tolist() for batch in found]


@pytest.mark.parametrize("seed", range(40))
def test_batches_never_change(seed):
    random = np.random.default_rng(seed)
    lengths = lengths_of(seed, int(random.integers(1, 400)), int(random.choice([3, 40, 900, 5000])))
    for max_tokens in (1, 700, int(random.integers(1, 20000)), 16384):
        for switch in (None, 1, int(random.integers(1, 900))):
            assert as_lists(batches(lengths, max_tokens, switch)) == one_by_one(lengths, max_tokens, switch)


@pytest.mark.parametrize("max_tokens", [1, 700, 4096])
def test_batches_hold_each_sample_once_and_keep_to_the_limit(max_tokens):
    lengths = lengths_of(1)
    found = batches(lengths, max_tokens)
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        longest = max(lengths[i] for i in batch)
        assert len(batch) * longest <= max_tokens or len(batch) == 1
        assert longest - min(lengths[i] for i in batch) <= max(32, longest // 16)


def test_samples_beyond_a_switch_are_batched_by_their_length_only():
    lengths = np.array([100, 90, 95, 100, 89, 60, 59, 96, 90], np.int32)
    assert as_lists(batches(lengths, 4096, 100)) == [[0, 3, 7, 2, 1, 8, 4], [5, 6]]
    assert as_lists(batches(lengths, 4096)) == [[0, 3, 7, 2, 1, 8, 4], [5, 6]]
    assert as_lists(batches(lengths, 4096, 94)) == [[0, 3], [7], [2], [1, 8, 4, 5, 6]]
    assert as_lists(batches(lengths, 4096, 60)) == [[0, 3], [7], [2], [1, 8], [4], [5, 6]]


def test_auto_block_rows_come_from_the_data():
    assert auto_block_rows(np.array([5], np.int32)) == 8
    assert auto_block_rows(np.full(1000, 100, np.int32)) == 2048  # 100,000 tokens in about 64 blocks
    assert auto_block_rows(np.full(100_000, 1000, np.int32)) == 65536
    assert auto_block_rows(np.array([100_000], np.int32)) == 131072


def test_blocks_grow_with_the_data():
    """65,536 rows up to 2^30 tokens, twice as many for each doubling, 2^20 from 2^33 on."""

    def rows_for(tokens):
        return auto_block_rows(np.broadcast_to(np.int32(1024), -(-tokens // 1024)))

    for power in range(22, 31):
        assert rows_for(2**power) == 65536
    for power, rows in ((30, 2**17), (31, 2**18), (32, 2**19), (33, 2**20), (34, 2**20)):
        assert rows_for(2**power + 1) == rows
        if power < 34:
            assert rows_for(2**power) == rows // 2
    blocks = -(-(10**11) // (rows_for(10**11) - 1024))  # of each block, nearly a sample's rows may stay empty
    arrays = 8  # over rows, of which some stores have fewer
    sample_chunks = 3 * -(-(10**8) // 2**20)
    assert blocks * (arrays + 2) + sample_chunks < 10**6  # with a commit and checksums


def test_a_plan_is_the_same_made_in_place():
    """lay_out, and what follows from it, beside a loop over the samples."""
    lengths = lengths_of(7, 3000)
    plan = lay_out(lengths, 8192)
    row, starts = 0, []
    for length in lengths:
        if row // 8192 != (row + int(length) - 1) // 8192:
            row = -(-row // 8192) * 8192
        starts.append(row)
        row += int(length)
    assert plan.starts.tolist() == starts
    tokens = np.zeros(plan.num_blocks, int)
    np.add.at(tokens, plan.starts // 8192, lengths)
    assert plan.tokens_per_block().tolist() == tokens.tolist()


def test_a_plan_takes_little_more_than_its_starts():
    lengths = np.full(1_000_000, 40, np.int32)
    tracemalloc.start()
    plan = lay_out(lengths, 65536)
    plan.tokens_per_block()
    auto_block_rows(lengths)
    assert tracemalloc.get_traced_memory()[1] < 8.5e6
    tracemalloc.reset_peak()
    permutation(1_000_000, 0)
    assert tracemalloc.get_traced_memory()[1] < 8e6 + 6e6
    tracemalloc.stop()


def test_permutation_is_seeded():
    assert sorted(permutation(100, 3)) == list(range(100))
    assert (permutation(100, 3) == permutation(100, 3)).all()
    assert (permutation(100, 3) != permutation(100, 4)).any()
    assert (permutation(1000, 3) == np.random.Generator(np.random.PCG64(3)).permutation(1000)).all()  # for all time


def test_block_sizes_that_cannot_be():
    with pytest.raises(ConfigError, match="at least the longest sample, 9 tokens, found 8"):
        lay_out(np.array([9], np.int32), 8)
    with pytest.raises(ConfigError, match="at most 8192 or a multiple of it"):
        lay_out(np.array([9], np.int32), 8193)
