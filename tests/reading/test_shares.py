"""The arithmetic of mixtures, beside what lists and sorting say."""

import math
from fractions import Fraction
from itertools import islice
from typing import Any

import numpy as np
import pytest

from distill.reading.shares import apportioned, first_turns, of_epoch, samples_per_epoch, take_turns


def decimals(*weights: str) -> list[Fraction]:
    exact = [Fraction(weight) for weight in weights]
    return [weight / sum(exact) for weight in exact]


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ([700, 300], ["0.7", "0.3"], [700, 300]),  # floats would make it 999
        ([700, 299], ["0.7", "0.3"], [697, 299]),
        ([100, 200], ["1", "1"], [100, 100]),
        ([100, 200, 300], ["0.1", "0.2", "0.7"], [43, 86, 299]),  # 428: 42.8, 85.6, 299.6
        ([5, 5, 5], ["0.2", "0.3", "0.5"], [2, 3, 5]),
        ([100, 1], ["0.999", "0.001"], [100, 0]),
        ([10, 0], ["0.5", "0.5"], [0, 0]),
    ],
)
def test_an_epoch_has_as_many_as_there_can_be(sizes: list[int], weights: list[str], expected: list[int]) -> None:
    assert samples_per_epoch(sizes, decimals(*weights)) == expected
    assert samples_per_epoch(sizes, None) == sizes


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_exact_and_no_larger_epoch_would_do(seed: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(50):
        sizes = random.integers(0, 2000, random.integers(1, 6)).tolist()
        shares = decimals(*(f"{weight:.3f}" for weight in random.uniform(0.001, 1, len(sizes))))
        counts = samples_per_epoch(sizes, shares)
        total = sum(counts)
        assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
        assert all(abs(count - total * share) < 1 for count, share in zip(counts, shares, strict=True))
        assert any((total + 1) * share > size for size, share in zip(sizes, shares, strict=True))
        remainders = [total * share - math.floor(total * share) for share in shares]
        up = [r for r, c, s in zip(remainders, counts, shares, strict=True) if c > math.floor(total * s)]
        down = [r for r, c, s in zip(remainders, counts, shares, strict=True) if c == math.floor(total * s)]
        assert max(down, default=Fraction(0)) <= min(up, default=Fraction(1))
        assert sum(apportioned(64, shares)) == 64


@pytest.mark.parametrize("seed", range(10))
def test_turns_are_in_the_order_of_their_times(seed: int) -> None:
    """Beside a sort of all times, from every turn on; equal counts among them."""
    random = np.random.default_rng(seed)
    counts = random.integers(0, [1, 2, 3, 40, 300][seed % 5] + 1, int(random.integers(1, 7))).tolist()
    counts += counts[:1]
    phases = [Fraction(2 * i + 1, 2 * len(counts)) for i in range(len(counts))]
    times = [((m + phases[i]) / count, i) for i, count in enumerate(counts) for m in range(count)]
    expected = [i for _, i in sorted(times)]
    assert list(take_turns(counts, 0)) == expected
    for turn in range(len(expected) + 1):
        assert first_turns(counts, turn) == [expected[:turn].count(i) for i in range(len(counts))]
        assert list(islice(take_turns(counts, turn), 3)) == expected[turn : turn + 3]


@pytest.mark.parametrize("counts", [[7, 3], [1, 999], [500, 500], [60, 25, 10, 5], [1, 1, 1, 1, 996], [30] * 8])
def test_any_turns_in_a_row_have_the_shares(counts: list[int]) -> None:
    """Of two stores to within one sample; of more to within two."""
    total, allowed = sum(counts), 1 if len(counts) == 2 else 2
    order = np.array(list(take_turns(counts, 0)))
    for i, count in enumerate(counts):
        before = np.append(0, np.cumsum(order == i))
        for length in (1, 2, 8, 64, 333):
            found = before[length:] - before[:-length]
            assert (np.abs(found - length * count / total) <= allowed + 1e-9).all()


def test_turns_of_a_huge_epoch_are_found_at_once() -> None:
    counts = [7 * 10**11 + 1, 3 * 10**11, 5]
    for turn in (0, 1, 10**12 // 3, sum(counts) - 1, sum(counts)):
        found = first_turns(counts, turn)
        assert sum(found) == turn
        assert all(abs(n - turn * count / sum(counts)) <= 2 for n, count in zip(found, counts, strict=True))


@pytest.mark.parametrize("seed", range(10))
def test_epochs_take_other_samples_until_all_had_their_turn(seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 30, int(random.integers(1, 12)))
    gaps = np.cumsum(random.integers(0, 3, len(sizes)))  # a selection: positions have no gaps, but be sure
    starts = np.cumsum(sizes) - sizes + gaps
    pieces: Any = np.stack([starts, starts + sizes], axis=1)
    total = int(sizes.sum())
    everything = np.concatenate([np.arange(*piece) for piece in pieces])
    for count in sorted({1, total // 3 or 1, total // 2 or 1, total - 1 or 1, total}):
        times = dict.fromkeys(everything.tolist(), 0)
        orders = set()
        for epoch in range(2 * total // count + 5):
            spans = of_epoch(pieces, count, epoch, (seed, 1))
            found = [position for span in spans for position in range(*span)]
            assert len(found) == len(set(found)) == count
            assert found == sorted(found)
            assert all(any(a <= start and stop <= b for a, b in pieces) for start, stop in spans)
            assert len(spans) <= len(pieces) + 1
            for position in found:
                times[position] += 1
            assert max(times.values()) - min(times.values()) <= 1  # none again before all have come
            orders.add(tuple(found))
        assert len(orders) > 1 or total in (count, 1)
    assert of_epoch(pieces, total, 3, (seed, 1)) is pieces


def test_which_come_when_follows_from_the_seed() -> None:
    pieces: Any = np.arange(0, 100, 5)[:, None] + np.array([0, 5])
    first = of_epoch(pieces, 40, 0, (0, 1)).tolist()
    assert first == of_epoch(pieces, 40, 0, (0, 1)).tolist()
    assert first != of_epoch(pieces, 40, 0, (1, 1)).tolist()
    assert of_epoch(pieces, 40, 1, (0, 1)).tolist() != first
