"""What each k would keep: against dense distributions, from rows of both methods, and of a large store by pieces."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distill.teacher.capture import Captured
from distill.teacher.choice import Choice
from distill.teacher.sample import uniforms
from tests.captured import sample, topk

N, V, K = 400, 300, 32


def rows(found: Captured) -> tuple[Any, Any, Any, Any]:
    kept = found.target_ids.numpy(), found.target_logprobs.numpy()
    return *kept, found.tail_logprob[:, 0].numpy(), found.next_logprob.numpy()


def numbers(text: str) -> list[float]:
    return [float(part.rpartition(" ")[2]) for part in text.removesuffix(" nats").split(", ")]


def test_the_figures_are_those_of_dense_distributions() -> None:
    torch.manual_seed(0)
    logits = torch.randn(N, V) * torch.linspace(0.5, 5, N)[:, None]
    p = logits.double().softmax(dim=1)
    mass = p.sort(dim=1, descending=True).values.cumsum(dim=1).mean(dim=0)
    entropy = float(-torch.special.xlogy(p, p).sum(dim=1).mean())
    u = torch.from_numpy(uniforms(0, 0, N))
    sizes = {k: (sample(logits.clone(), k, u).target_ids >= 0).sum(dim=1).double().mean() for k in (8, 16, 20, 32)}

    best = Choice(K, more=20)
    for part in logits.split(150):  # as they come
        following = torch.where(torch.arange(len(part)) % 10 > 0, 7, -1)
        best.add(*rows(topk(part.clone(), K, [1.0], following)))
    lines = best.lines(49152, "portable")
    assert lines["mass of the top"].startswith("1: 0.")
    assert numbers(lines["mass of the top"]) == pytest.approx(mass[[0, 1, 3, 7, 15, 31]].tolist(), abs=0.006)
    assert entropy - 0.3 < numbers(lines["entropy"].removeprefix("at least "))[0] <= entropy
    nll = -p[:, 7].log()[torch.arange(N) % 150 % 10 > 0].mean()
    assert numbers(lines["teacher perplexity"])[0] == pytest.approx(float(nll.exp()), abs=0.006)
    for k, size in sizes.items():
        assert best.expected_ids("sample", k) == pytest.approx(float(size), abs=1e-9)
        assert f"{k}: {size:.1f} ids, " in lines["sampled with k"]
    assert best.expected_ids("topk", 24) == 24

    drawn = Choice(K, "sample")
    drawn.add(*rows(sample(logits.clone(), K, u)))
    told = drawn.lines(49152, "portable")
    assert "teacher perplexity" not in told  # no token followed
    assert told["ids"] == f"{sizes[32]:.1f} on average"
    for k in (8, 16, 32):
        assert drawn.expected_ids("sample", k) == pytest.approx(float(sizes[k]), abs=1e-9)
    assert told["mass of the top"].startswith(f"at least 1: {mass[0]:.2f}, 2: 0.")
    bounds = zip(numbers(told["mass of the top"]), mass[[0, 1, 3, 7, 15, 31]].tolist(), strict=True)
    assert all(least <= whole + 0.006 for least, whole in bounds)
    assert entropy - 1 < numbers(told["entropy"].removeprefix("at least "))[0] <= entropy


def test_nothing_is_said_of_nothing() -> None:
    assert Choice(8).lines(100, "portable") == {}
    one = Choice(1)
    one.add(np.array([[3]]), np.array([[-0.5]]), np.array([np.log(1 - np.exp(-0.5))]), np.array([np.nan]))
    assert one.lines(100, "portable")["mass of the top"] == "1: 0.61"
    assert "sampled with k" not in one.lines(100, "portable")


@pytest.mark.parametrize(("blocks", "per_block"), [(1, 1), (3, 2), (640, 1), (9541, 128)])
def test_a_large_store_is_read_in_pieces(blocks: int, per_block: int) -> None:
    """Every fifth block is not committed, and in every row of block b the two ids have a mass of b / blocks."""
    committed = np.arange(blocks) % 5 != 4
    read: list[tuple[int, int]] = []

    def read_arrays(names: Any, start: int, stop: int) -> Any:
        assert stop - start == 4
        read.append((start // 4 // per_block, start // 4 % per_block))
        mass = read[-1][0] / blocks
        with np.errstate(divide="ignore"):
            tail = np.log(np.array([1 - mass] * 3 + [np.nan]))  # the last row is empty
            logprobs = np.repeat(np.log([[mass * 0.75, mass * 0.25]]), 4, axis=0)
        found = {"target_logprobs": logprobs, "tail_logprob": np.stack([np.zeros(4), tail], axis=1)}
        return found | {"target_ids": np.tile([3, 4], (4, 1))}

    names = ["target_ids", "target_logprobs", "tail_logprob"]  # of a store of before
    attributes = {"temperatures": [2.0, 1.0], "k": 2, "method": "topk"}
    store: Any = SimpleNamespace(
        attributes=attributes, unknown=frozenset(), inner_rows=4, block_rows=4 * per_block, committed=lambda: committed,
        read_arrays=read_arrays, array_names=lambda: names,
    )  # fmt: skip
    found = Choice.of(store)
    there = np.flatnonzero(committed)
    assert len({*read}) == len(read) <= min(64, len(there) * per_block)
    assert len(read) >= min(32, len(there) * per_block)
    assert {block for block, _ in read} <= {*there.tolist()}
    assert found.rows == 3 * len(read)
    mean = np.mean([block for block, _ in read]) / blocks
    assert numbers(found.lines(100, "portable")["mass of the top"])[1] == pytest.approx(mean, abs=0.006)
    assert mean == pytest.approx(np.mean(there / blocks), abs=0.05)
