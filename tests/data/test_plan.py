import numpy as np
import pytest

from distill.data.plan import auto_block_rows, lay_out, permutation
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


@pytest.mark.parametrize("max_tokens", [1, 700, 4096])
def test_batches_hold_each_sample_once_and_keep_to_the_limit(max_tokens):
    plan = lay_out(lengths_of(1), 8192)
    for block in range(plan.num_blocks):
        batches = plan.batches(block, max_tokens)
        assert sorted(i for batch in batches for i in batch) == list(plan.samples_of(block))
        for batch in batches:
            longest = max(plan.lengths[i] for i in batch)
            assert len(batch) * longest <= max_tokens or len(batch) == 1
            assert longest - min(plan.lengths[i] for i in batch) <= max(32, longest // 16)


def test_samples_beyond_a_switch_are_batched_by_their_length_only():
    plan = lay_out(np.array([100, 90, 95, 100, 89, 60, 59, 96, 90], np.int32), 1024)
    assert plan.batches(0, 4096, 100) == plan.batches(0, 4096) == [[0, 3, 7, 2, 1, 8, 4], [5, 6]]
    assert plan.batches(0, 4096, 94) == [[0, 3], [7], [2], [1, 8, 4, 5, 6]]
    assert plan.batches(0, 4096, 60) == [[0, 3], [7], [2], [1, 8], [4], [5, 6]]


def test_auto_block_rows_come_from_the_data():
    assert auto_block_rows(np.array([5], np.int32)) == 8
    assert auto_block_rows(np.full(1000, 100, np.int32)) == 2048  # 100,000 tokens in about 64 blocks
    assert auto_block_rows(np.full(100_000, 1000, np.int32)) == 65536
    assert auto_block_rows(np.array([100_000], np.int32)) == 131072


def test_permutation_is_seeded():
    assert sorted(permutation(100, 3)) == list(range(100))
    assert (permutation(100, 3) == permutation(100, 3)).all()
    assert (permutation(100, 3) != permutation(100, 4)).any()


def test_block_sizes_that_cannot_be():
    with pytest.raises(ConfigError, match="at least the longest sample, 9 tokens, found 8"):
        lay_out(np.array([9], np.int32), 8)
    with pytest.raises(ConfigError, match="at most 8192 or a multiple of it"):
        lay_out(np.array([9], np.int32), 8193)
