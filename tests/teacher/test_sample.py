"""VarOpt sampling: what is kept and drawn, that it is unbiased, and that shards of the vocabulary draw the same."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from distill.errors import ConfigError
from distill.settings import load
from distill.teacher import sample as module
from distill.teacher.sample import uniforms
from tests.captured import sample, weights


def random(vocabulary: int, scale: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def only(logits: Sequence[float], vocabulary: int = 60) -> torch.Tensor:
    """A few ids are possible, the others are not."""
    row = torch.full((vocabulary,), -torch.inf)
    row[torch.arange(len(logits)) * 7] = torch.tensor(logits)
    return row


ROWS = {
    "random": (random(300, 2.0), 16),
    "peaked": (random(300, 6.0), 16),
    "two ids": (random(300, 2.0), 2),
    "flat": (torch.zeros(200), 16),
    "ties": (torch.cat([torch.full((10,), 3.0), torch.zeros(130)]), 16),
    "as many as there are": (random(40, 2.0), 40),
    "one likely": (torch.cat([torch.tensor([9.0]), random(99, 1.0)]), 8),
    "hardly anything else": (torch.cat([torch.tensor([0.0]), torch.full((50,), -20.3)]), 16),  # 7.6e-8 of the mass
    "most are impossible": (torch.cat([torch.full((200,), -torch.inf), random(100, 1.0)]), 8),
    "fewer possible ids than k": (only([2.0, 1.0, 1.0]), 24),
    "two halves": (only([1.0, 1.0]), 24),
    "bfloat16": (random(500, 2.0).bfloat16().float(), 24),
    "no multiple of a bin": (random(131, 1.0), 12),
}


def least_kept(p: torch.Tensor, n: int) -> int:
    """How many ids are kept where the threshold is the least, so that the variance is: no other id is as long as t."""
    ordered = p.sort(descending=True).values.tolist()
    return next(h for h in range(1, n) if h == n - 1 or ordered[h] <= sum(ordered[h:]) / (n - h) * (1 - 1e-4))


@pytest.mark.parametrize("name", ROWS)
def test_the_mean_weight_of_every_id_is_its_probability(name: str) -> None:
    """Chi-square of how often each id is drawn, and what is kept and how much is drawn, in float64."""
    logits, k = ROWS[name]
    trials, p = 20_000, logits.double().softmax(0)
    large = p * k > 1
    n = max(1, int(np.ceil(large.sum().item() + k * p[~large].sum().item() - 1e-6)))
    counts, found = torch.zeros(len(p), dtype=torch.float64), None
    for u in torch.from_numpy(uniforms(7, 1000, trials)).split(1000):
        found = sample(logits.repeat(len(u), 1), k, u)
        ids = found.target_ids
        assert ((ids >= 0).sum(dim=1) == n).all()
        assert (ids[:, n:] == -1).all()
        torch.testing.assert_close(weights(found).sum(dim=1), torch.ones(len(u)).double(), atol=1e-6, rtol=0)
        ordered = ids[:, :n].sort(dim=1).values
        assert (ordered[:, 1:] != ordered[:, :-1]).all(), "an id twice"
        drawn = found.target_logprobs.isnan() & (ids >= 0)
        assert (drawn == drawn[0]).all()
        assert (ids[:, :n][:, drawn[0, :n]].diff(dim=1) > 0).all()
        counts += torch.bincount(ids[drawn].long(), minlength=len(p))
    assert found is not None
    kept = found.target_ids[0, : int((~found.target_logprobs[0].isnan()).sum())].long()
    order = p.sort(descending=True, stable=True).indices
    assert kept.tolist() == order[: len(kept)].tolist(), "the most probable, ties by lowest id"
    torch.testing.assert_close(found.target_logprobs[0, : len(kept)].double(), p[kept].log(), atol=1e-6, rtol=0)
    rest = p.clone().index_fill(0, kept, 0.0)
    torch.testing.assert_close(found.tail_logprob[0, 0].double().exp(), rest.sum(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.logsumexp[0, 0].double(), logits.double().logsumexp(0), atol=1e-5, rtol=0)
    assert len(kept) == least_kept(p, n)
    num_drawn = n - len(kept)
    assert num_drawn >= 1
    expected = rest / rest.sum() * num_drawn * trials
    assert (counts[expected == 0] == 0).all()
    assert (expected <= trials * (1 + 1e-4)).all(), "no id is longer than the distance of two points"
    sure = expected >= trials * (1 - 1e-4)
    assert (counts[sure] >= trials * (1 - 1e-3)).all()
    some = (expected > 10) & ~sure
    deviations = (counts - expected)[some] / (expected * (1 - expected / trials)).sqrt()[some]
    assert (deviations.abs() < 5).all()
    spread = deviations.square().sum() - some.sum()  # ids that lie a distance apart are drawn together
    assert spread.abs() <= 5 * (2 * some.sum() * num_drawn).sqrt(), "chi-square"


def test_a_certain_row_keeps_one_id_and_bad_logits_are_told() -> None:
    logits = torch.full((4, 50), -40.0)
    logits[0, 9] = 0.0
    logits[1, 4], logits[2, 4] = torch.nan, torch.inf
    logits[3, 7] = 30.0
    found = sample(logits, 8, torch.tensor([0.3, 0.3, 0.3, 0.999999]).double())
    assert found.target_ids[[0, 3]].tolist() == [[9, *[-1] * 7], [7, *[-1] * 7]]
    assert found.target_logprobs[0, 0].abs() < 1e-6
    assert found.target_logprobs[0, 1:].isnan().all()
    assert found.tail_logprob[0, 0] < -30
    assert found.logsumexp.isfinite()[:, 0].tolist() == [True, False, False, True]


def test_draws_follow_from_seed_and_row_alone() -> None:
    whole = uniforms(3, 0, 1000)
    assert ((whole >= 0) & (whole < 1)).all()
    for first, count in ((0, 1), (17, 500), (999, 1)):
        np.testing.assert_array_equal(uniforms(3, first, count), whole[first : first + count])
    assert (uniforms(4, 0, 1000) != whole).all()
    far = uniforms(3, 10**12, 4)
    np.testing.assert_array_equal(far[2:], uniforms(3, 10**12 + 2, 2))
    logits, u = torch.randn(64, 700, generator=torch.Generator().manual_seed(1)) * 3, torch.from_numpy(whole[:64])
    together = sample(logits.clone(), 12, u)
    for rows in (slice(0, 1), slice(5, 40)):
        apart = sample(logits[rows].clone(), 12, u[rows])
        assert torch.equal(apart.target_ids, together.target_ids[rows])


@pytest.mark.parametrize(
    ("vocabulary", "sizes", "k", "impossible"),
    [
        (1000, [500, 500], 24, slice(0)),
        (130, [4, 60, 1, 65], 16, slice(0)),
        (40, [20, 20], 40, slice(0)),
        (300, [100, 100, 100], 16, slice(0, 100)),
        (300, [100, 100, 100], 16, slice(100, 200)),
        (300, [100, 100, 100], 16, slice(200, 300)),
    ],
)
def test_shards_of_the_vocabulary_draw_the_same(vocabulary: int, sizes: list[int], k: int, impossible: slice) -> None:
    """In float32 a point may cross the border of an id: with so few ids, in at most one row in a thousand.

    A shard may have no possible id.
    """
    torch.manual_seed(0)
    logits = torch.randn(4000, vocabulary) * torch.linspace(0.0, 5.0, 4000)[:, None]
    logits[:, impossible] = -torch.inf
    following = torch.randint(-1, vocabulary, (4000,))
    u = torch.from_numpy(uniforms(0, 0, 4000))
    u[:2] = torch.tensor([0.0, 1 - 2**-53])
    whole = sample(logits.clone(), k, u, following)
    firsts = np.cumsum([0, *sizes[:-1]])
    begun: list[Any] = [
        module._begin(part.clone(), k, following, int(first))
        for part, first in zip(logits.split(sizes, dim=1), firsts, strict=True)
    ]
    plan = module._decide([candidates for _, candidates in begun], k, u)
    parts = []
    for (powers, candidates), orders, first in zip(begun, plan.orders, firsts, strict=True):
        drawn = module._draw(powers, candidates.ids - int(first), orders, k)
        parts.append(torch.where(drawn < 0, -1, drawn + int(first)))
    found = plan.captured(parts)
    differs = (found.target_ids != whole.target_ids).any(dim=1)
    assert differs.float().mean() <= 1e-3
    for field in dataclasses.fields(whole):
        if field.name != "target_ids":
            ours, theirs = getattr(found, field.name)[~differs], getattr(whole, field.name)[~differs]
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5, equal_nan=True)


def test_settings_that_a_sample_cannot_have() -> None:
    from distill.config.generate import GenerateConfig

    for more, told in (
        ("capture.k=1", r"capture\.k: expected at least 2 with .* found 1 \(or use capture\.method=topk\)"),
        ("capture.temperatures=[1.0,2.0]", r"capture\.temperatures: expected \[1\.0\] .* use capture\.method=topk"),
    ):
        with pytest.raises(ConfigError, match=told):
            load(GenerateConfig, [more])
        load(GenerateConfig, ["capture.method=topk", more])
    with pytest.raises(ConfigError, match=r"capture\.method: expected"):
        load(GenerateConfig, ["capture.method=draws"])
