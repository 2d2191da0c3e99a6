"""Building a student, checking it against a cache, and what it is measured by."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from distill import DistillationLoss, Learner, TeacherCache, collate
from distill.config.train import StudentConfig
from distill.errors import ConfigError
from distill.student.evaluate import BINS, measured, summarize
from distill.student.model import build, check, find, shortened
from tests.support import build_model, generate, make_tokenizer


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_layers_are_kept_evenly(name: str) -> None:
    depth = {"n_layer": 6} if name == "gpt2" else {"num_hidden_layers": 6}
    model = build_model(name, **depth)
    same = shortened(model, range(6))
    ids = torch.arange(10)[None]
    torch.testing.assert_close(same(ids).logits, model(ids).logits)
    short = shortened(model, [0, 2, 5])
    assert short.config.num_hidden_layers == 3
    by_name = dict(model.named_parameters())
    for old, new in ((0, 0), (2, 1), (5, 2)):
        for weight, copied in ((n, w) for n, w in short.named_parameters() if f".{new}." in n):
            assert copied.equal(by_name[weight.replace(f".{new}.", f".{old}.", 1)])
    if getattr(model.config, "layer_types", None):
        assert short.config.layer_types == [model.config.layer_types[i] for i in (0, 2, 5)]


def test_what_a_student_starts_from(model_folder: Any, tmp_path: Path) -> None:
    folder = str(model_folder("llama"))
    source = find(StudentConfig(), {"model": folder, "revision": None})
    kept = build(StudentConfig(layers=2), source, seed=0)
    assert kept.config.num_hidden_layers == 2
    random = [build(StudentConfig(init="random", layers=2), source, seed=seed) for seed in (0, 0, 1)]
    first = [model.get_input_embeddings().weight for model in random]
    assert first[0].equal(first[1])
    assert not first[0].equal(first[2])
    assert not first[0].equal(kept.get_input_embeddings().weight)
    with pytest.raises(ConfigError, match=r"student\.layers: expected at most 3, the model's layers, found 9"):
        build(StudentConfig(layers=9), source, seed=0)
    with pytest.raises(ConfigError, match=r"student\.model=\./nowhere: expected .* found no folder \./nowhere"):
        find(StudentConfig(model="./nowhere"), {"model": folder, "revision": None})


def test_students_that_cannot_learn_from_a_cache(small_store: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = TeacherCache(str(small_store))
    tokenizer = make_tokenizer()

    def source(vocab: int = 1000, context: int | None = 1024) -> Any:
        return SimpleNamespace(vocab_size=vocab, context_length=context, tokenizer=tokenizer)

    check(source(), DistillationLoss(temperature=2.0), cache)
    check(source(vocab=262), DistillationLoss(), cache)  # the teacher's softmax of 1,000 is padded
    with pytest.raises(ConfigError, match=r"at least 262 ids, .* found 200 \(the teacher's 1,000 may be padded"):
        check(source(vocab=200), DistillationLoss(), cache)
    with pytest.raises(ConfigError, match=r"context of at least 96 tokens, .* found 64"):
        check(source(context=64), DistillationLoss(), cache)
    with pytest.raises(ConfigError, match=r"loss\.temperature: expected one of \[1\.0, 2\.0\]"):
        check(source(), DistillationLoss(temperature=3.0), cache)
    assert "no loss mask" not in caplog.text
    check(source(), DistillationLoss("on_policy"), cache)
    assert "small.zarr has no loss mask: with on_policy every token of it counts as one that the" in caplog.text
    with pytest.raises(ConfigError, match=r"loss\.max_ratio: expected sampled_logprob in .*small\.zarr, found none"):
        check(source(), DistillationLoss("on_policy", max_ratio=2.0), cache)
    with (
        mock.patch.object(TeacherCache, "arrays", cache.arrays - {"next_logprob"}),
        pytest.raises(
            ConfigError, match=r"expected next_logprob in .*small\.zarr with on_policy, found none: it is of"
        ),
    ):
        check(source(), DistillationLoss("on_policy"), cache)


def test_figures_of_an_evaluation() -> None:
    torch.manual_seed(0)
    logits = torch.randn(400, 5) * 2
    following = torch.randint(0, 5, (400,))
    p = torch.randn(400, 5).softmax(dim=1)
    top = p.topk(2, dim=1)
    rows = {"next_tokens": following, "target_ids": top.indices, "target_logprobs": top.values.log()}
    rows |= {"logsumexp": torch.zeros(400, 1), "tail_logprob": (1 - top.values.sum(dim=1, keepdim=True)).log()}
    found = summarize(measured(logits[:150], {k: v[:150] for k, v in rows.items()}, [1.0])
                      + measured(logits[150:], {k: v[150:] for k, v in rows.items()}, [1.0]))  # fmt: skip
    q = logits.softmax(dim=1)
    confidence, guess = (part.numpy() for part in q.max(dim=1))
    correct = guess == following.numpy()
    calibration = 0.0
    for low in np.arange(BINS) / BINS:
        inside = (confidence >= low) & (confidence < low + 1 / BINS)
        if inside.any():
            calibration += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    assert found["tokens"] == 400
    assert found["cross_entropy"] == pytest.approx(nn.functional.cross_entropy(logits, following).item(), rel=1e-5)
    assert found["top1_agreement"] == pytest.approx((guess == top.indices[:, 0].numpy()).mean())
    assert found["calibration_error"] == pytest.approx(calibration, abs=1e-5)
    kept, rest = q.gather(1, top.indices), 1 - q.gather(1, top.indices).sum(dim=1)
    kl = (top.values * (top.values / kept).log()).sum(dim=1) + (1 - top.values.sum(dim=1)) * (
        (1 - top.values.sum(dim=1)) / rest
    ).log()
    assert found["kl"] == pytest.approx(kl.mean().item(), rel=1e-4)


def test_a_student_that_is_the_teacher(tmp_path: Path) -> None:
    """On real text with real weights: nothing to learn; against rows shifted by one token, a lot."""
    arguments = ["dataset.max_samples=3", "dataset.max_length=96", "dataset.long=truncate", "store.path=x.zarr"]
    arguments += ["capture.method=topk", "capture.k=64"]
    ran = generate(tmp_path, *arguments)
    assert ran.returncode == 0, ran.stderr
    cache = TeacherCache(str(tmp_path / "x.zarr"))
    source = find(StudentConfig(), {"model": "demo", "revision": None})
    learner = Learner(build(StudentConfig(), source, seed=0), DistillationLoss(), cache.temperatures)
    batch = collate([cache[i] for i in range(min(4, len(cache)))])
    shifted = dict(batch)
    for name in ("target_ids", "target_logprobs", "logsumexp", "tail_logprob"):
        shifted[name] = batch[name].roll(1, dims=1)
    found = []
    for rows in (batch, shifted):
        learner.zero_grad()
        mean = learner(rows) / rows["loss_mask"].sum()
        mean.backward()
        norm = torch.nn.utils.get_total_norm([w.grad for w in learner.parameters() if w.grad is not None])
        found.append((mean.item(), norm.item()))
    (kl, gradient), (kl_shifted, gradient_shifted) = found
    assert kl <= 1e-3
    assert kl_shifted > 1.0
    assert gradient < 0.02 * gradient_shifted
