"""Batches with rows of several stores: what is made of them is the sum of what is made of each row by itself."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distill import DistillationLoss, Learner, TeacherCache, collate
from distill.config.generate import TeacherConfig
from distill.errors import ConfigError
from distill.student.evaluate import measured, measured_on_policy
from distill.student.model import check
from distill.teacher.source import Source
from tests.support import build_model, make_tokenizer, reseal

TAILS = ("bucket", "renormalize", "ground_truth")
LOSSES = [DistillationLoss(tail=tail, alpha=alpha) for tail in TAILS for alpha in (1, 0.4)]
LOSSES += [DistillationLoss("on_policy", alpha=alpha) for alpha in (1, 0.4)]
OF_TOPK = [DistillationLoss(tail=tail, temperature=2) for tail in TAILS]
OF_TOPK += [DistillationLoss(name, temperature=t) for name in ("reverse_kl", "jensen_shannon") for t in (1, 2)]


def rows_of(*stores: Path) -> tuple[TeacherCache, Any, list[tuple[Any, list[float]]]]:
    """A mixture; a batch of some samples of each store; and each of them alone, with its store's temperatures."""
    caches = [TeacherCache(str(store))[2:7] for store in stores]
    mixture = TeacherCache.mix(caches)
    alone = [(collate([sample]), cache.temperatures) for cache in caches for sample in cache]
    batch = next(iter(mixture.shuffled(len(mixture))))
    assert len({part[0]["target_ids"].shape[2] for part in alone}) == 2
    return mixture, batch, alone


@pytest.mark.parametrize("vocab", [1000, 250])  # with 250 the student lacks ids that the teachers have
@pytest.mark.parametrize(("method", "loss"), [*(("both", x) for x in LOSSES), *(("topk", x) for x in LOSSES + OF_TOPK)])
def test_loss_and_gradient_are_the_sum_over_rows_of_their_own_stores(
    method: str, loss: DistillationLoss, vocab: int, small_store: Path, sampled_store: Path,
    other_teacher: Path,
) -> None:  # fmt: skip
    """In float64: each row as it is in a batch of its own store, of its own K and temperatures."""
    mixture, batch, alone = rows_of(small_store, sampled_store if method == "both" else other_teacher)
    torch.manual_seed(0)
    head = nn.Linear(8, vocab, dtype=torch.float64)
    table = torch.randn(300, 8, dtype=torch.float64) * 2
    batch["next_tokens"] = batch["next_tokens"].clamp(max=vocab - 1)

    def total(part: Any, temperatures: list[float], chunk_tokens: int) -> torch.Tensor:
        return loss.from_hidden(table[part["input_ids"]], head, part, temperatures, chunk_tokens)

    found = total(batch, mixture.temperatures, 7)
    found.backward()
    gradient, head.weight.grad = head.weight.grad, None
    expected: Any = 0
    for part, temperatures in alone:
        part["next_tokens"] = part["next_tokens"].clamp(max=vocab - 1)
        expected = expected + total(part, temperatures, 1024)
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)  # targets are float32
    torch.testing.assert_close(gradient, head.weight.grad, rtol=1e-5, atol=1e-6)
    assert found.isfinite()
    assert gradient is not None
    assert gradient.abs().max() > 0.1


@pytest.mark.parametrize("packed", [False, True])
def test_a_learner_packs_and_measures_rows_of_several_stores(
    packed: bool, small_store: Path, sampled_store: Path
) -> None:
    mixture, batch, alone = rows_of(small_store, sampled_store)
    model = build_model("llama").eval()
    learners = {tuple(t): Learner(model, DistillationLoss(), t, packed) for t in (mixture.temperatures, [1.0, 2.0])}
    total = learners[1.0,](batch)
    total.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    parts = [learners[tuple(temperatures)](part) for part, temperatures in alone]
    torch.stack(parts).sum().backward()
    torch.testing.assert_close(total, torch.stack(parts).sum(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient, model.lm_head.weight.grad, rtol=1e-3, atol=1e-4)

    def measures(temperatures: list[float]) -> Any:
        return lambda logits, rows: torch.cat([measured(logits, rows, temperatures), measured_on_policy(logits, rows)])

    with torch.no_grad():
        found = learners[1.0,](batch, measures(mixture.temperatures))
        each = [learners[tuple(t)](part, measures(t)) for part, t in alone]
    torch.testing.assert_close(found, torch.stack(each).sum(dim=0), rtol=1e-4, atol=1e-3)
    assert found[0] == batch["loss_mask"].sum()


def test_a_loss_that_one_store_cannot_serve_names_it(
    small_store: Path, sampled_store: Path, other_teacher: Path
) -> None:
    source = Source(Path(), TeacherConfig(), build_model("llama").config, make_tokenizer())
    caches = [TeacherCache(str(store)) for store in (small_store, sampled_store, other_teacher)]
    for divergence in ("reverse_kl", "jensen_shannon"):
        check(source, DistillationLoss(divergence, temperature=2), TeacherCache.mix(caches[::2]))
        with pytest.raises(ConfigError, match=rf"capture\.method=sample.*\({sampled_store}\)$"):
            check(source, DistillationLoss(divergence), TeacherCache.mix(caches))
    with pytest.raises(ConfigError, match=rf"with a store of capture\.method=sample.*\({sampled_store}\)$"):
        check(source, DistillationLoss(temperature=2), TeacherCache.mix(caches[1:]))
    with pytest.raises(ConfigError, match=rf"expected one of \[1\.0, 2\.0\].*\({small_store}\)$"):
        check(source, DistillationLoss(temperature=4), TeacherCache.mix(caches[::2]))
    with pytest.raises(ConfigError, match=rf"loss\.max_ratio: expected sampled_logprob in {small_store}, found none"):
        check(source, DistillationLoss("on_policy", max_ratio=2), TeacherCache.mix(caches))
    check(source, DistillationLoss(), TeacherCache.mix(caches))


def without_tail(store: Path, folder: Path) -> TeacherCache:
    """The samples of a store, as others may have captured them."""
    shutil.copytree(store, folder)
    reseal(folder, unknown=["logsumexp", "tail_logprob", "next_logprob"])
    return TeacherCache(str(folder))[3:9]


def test_what_a_batch_has_does_not_depend_on_its_samples(
    small_store: Path, other_teacher: Path, tmp_path: Path
) -> None:
    """With a store without a tail: the same arrays in every batch, and held-out figures that no batch size changes."""
    mixture = TeacherCache.mix([TeacherCache(str(small_store))[2:7], without_tail(other_teacher, tmp_path / "x.zarr")])
    unknown = {"logsumexp", "tail_logprob", "next_logprob"}
    assert not mixture.arrays & unknown
    seen: list[set[str]] = []

    def keep(sample: Any) -> bool:
        seen.append({*sample})
        return True

    mixture.select(keep)
    assert all(names == {"sample", "tokens", "loss_mask"} for names in seen)
    for parts in (mixture, *mixture.split(4), mixture[:2]):
        names = [{*batch} for size in (1, 4) for batch in parts.shuffled(size)]
        names += [{*sample} for sample in parts]
        assert not any(found & unknown for found in names)
    learner = Learner(build_model("llama").eval(), DistillationLoss(tail="renormalize"), mixture.temperatures)

    def figures(size: int) -> torch.Tensor:
        batches = [collate([mixture[i] for i in range(len(mixture))[at : at + size]]) for at in range(0, 11, size)]
        with torch.no_grad():
            return torch.stack(
                [learner(batch, lambda x, rows: measured(x, rows, mixture.temperatures)) for batch in batches]
            ).sum(dim=0)

    for size in (1, 3):
        torch.testing.assert_close(figures(size), figures(11), rtol=1e-4, atol=1e-3)


def test_drawn_rows_do_not_go_with_rows_without_a_tail(
    small_store: Path, sampled_store: Path, other_teacher: Path, tmp_path: Path
) -> None:
    """Their weights are parts of the tail: refused by name, and in a batch; what reads no tail takes both."""
    source = Source(Path(), TeacherConfig(), build_model("llama").config, make_tokenizer())
    other, sampled = without_tail(other_teacher, tmp_path / "x.zarr"), TeacherCache(str(sampled_store))[:4]
    mixture, loss = TeacherCache.mix([sampled, other]), DistillationLoss(tail="renormalize")
    with pytest.raises(ConfigError, match=rf"beside {sampled.path} of .*found none in {other.path} ") as refused:
        check(source, loss, mixture)
    assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"expected tail_logprob beside rows of capture\.method=sample"):
        Learner(build_model("llama"), loss, [1.0])(next(iter(mixture.shuffled(8))))
    check(source, DistillationLoss(alpha=0), mixture)
    check(source, loss, TeacherCache.mix([TeacherCache(str(small_store)), other]))
