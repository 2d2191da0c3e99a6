"""Draws: from the distribution that they say, by the numbers that they are given."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from distill.rollouts.draws import Draws, draw, log_distribution, uniforms


def by_hand(logits: NDArray[np.float64], temperature: float, top_p: float) -> NDArray[np.float64]:
    """What is sampled from, in float64, without torch: [V]."""
    p = np.exp(logits / temperature - (logits / temperature).max())
    p /= p.sum()
    kept, mass = np.zeros(len(p), bool), 0.0
    for i in sorted(range(len(p)), key=lambda i: (-p[i], i)):
        if mass < top_p:
            kept[i] = True
        mass += p[i]
    found: NDArray[np.float64] = np.where(kept, p, 0.0) / p[kept].sum()
    return found


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6), (1.7, 0.8)])
def test_draws_are_of_the_distribution(temperature: float, top_p: float) -> None:
    logits = np.random.default_rng(3).normal(size=40)
    expected = by_hand(logits, temperature, top_p)
    logprobs = log_distribution(torch.from_numpy(logits).float()[None], temperature, top_p)
    assert np.allclose(logprobs.exp().numpy()[0], expected, atol=1e-6)
    count = 40_000
    u = torch.from_numpy(uniforms(0, 0, 0, count))
    drawn = np.bincount(draw(logprobs.expand(count, -1), u).numpy(), minlength=40)
    assert not drawn[expected == 0].any(), "an id without probability was drawn"
    there = expected > 0
    chi_square = float(((drawn - count * expected)[there] ** 2 / (count * expected[there])).sum())
    degrees = int(there.sum()) - 1
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees), (chi_square, degrees)
    assert (top_p == 1) == bool(there.all())


def test_the_ends_of_the_line() -> None:
    logprobs = torch.tensor([[-torch.inf, 0.5, -torch.inf, 0.5, -torch.inf]]).log_softmax(dim=1).expand(4, -1)
    u = torch.tensor([0.0, 0.5 - 1e-9, 0.5 + 1e-9, 1 - 2**-53], dtype=torch.float64)
    assert draw(logprobs, u).tolist() == [1, 1, 3, 3]


def test_ties_of_top_p_are_broken_by_the_lowest_id() -> None:
    found = log_distribution(torch.zeros(1, 8), 1.0, 0.45)
    assert found.exp().tolist()[0] == pytest.approx([0.25] * 4 + [0] * 4)


def test_the_numbers_depend_on_seed_prompt_sample_and_position_alone() -> None:
    found = {(s, p, n): tuple(uniforms(s, p, n, 8)) for s in (0, 1, 2**40) for p in (0, 1, 2**33) for n in (0, 1)}
    assert len({u for row in found.values() for u in row}) == 8 * len(found)
    assert (uniforms(5, 6, 7, 100)[:8] == uniforms(5, 6, 7, 8)).all()
    first = uniforms(1, 2, 3, 2).tolist()  # the same for ever: rollouts follow from them
    assert first == [0.08951714423608426, 0.22866869020296077]


def test_a_processor_leaves_one_id_and_tells_what_ended() -> None:
    heard: list[tuple[int, int]] = []
    u = torch.tensor([[0.1, 0.9], [0.9, 0.1]], dtype=torch.float64)
    impossible = torch.tensor([True, False, False])
    draws = Draws(u, impossible, 1.0, 1.0, torch.tensor([2]), lambda *counts: heard.append(counts))
    logits = torch.tensor([[9.0, 0.0, 0.0]]).expand(2, -1)  # the first would have nearly all, and is none
    ids = [draws(torch.zeros(2, 1), logits).argmax(dim=1).tolist() for _ in range(2)]
    assert ids == [[1, 2], [2, 1]]
    assert draws.logprobs.exp().flatten().tolist() == pytest.approx([0.5] * 4)
    assert heard == [(2, 1), (1, 1)]
