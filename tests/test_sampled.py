"""A store of samples, all the way: the format page's code, inspect, training in every way, and what is refused."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, TrainingArguments

from distill import DistillationLoss, Learner, TeacherCache, collate
from distill.config.generate import GenerateConfig
from distill.errors import ConfigError
from distill.hf import DistillationTrainer
from distill.inspect import describe
from distill.run.grid import Grid
from distill.settings import load
from distill.store.store import Store
from distill.student.evaluate import evaluate
from distill.teacher.choice import Choice
from distill.teacher.preview import preview
from tests.support import build_model, environment, generate_here, make_tokenizer

PAGE = Path(__file__).parent.parent / "docs" / "format.md"
K = 16


def test_the_code_of_the_format_page(sampled_store: Path) -> None:
    names: dict[str, Any] = {"zarr": __import__("zarr")}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)[:3]:
        if "chunk = 5" not in block:  # of checksums
            exec(block.replace("outputs/demo.zarr", str(sampled_store)), names)
    weights, ids = names["weights"], names["ids"]
    assert weights.shape == (names["length"], K)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=0.03)
    assert (weights[ids >= 0] > 0).all()
    assert names["drawn"].any()


def target(rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weights of a batch's rows, [N, V] float64, as the format page says."""
    ids, logprobs = rows["target_ids"], rows["target_logprobs"].double()
    drawn = logprobs.isnan() & (ids >= 0)
    part = rows["tail_logprob"].double().exp() / drawn.sum(dim=1, keepdim=True).clamp(min=1)
    weights = torch.where(drawn, part, logprobs.exp().nan_to_num(0)).masked_fill(ids < 0, 0)
    dense = torch.zeros(len(ids), 1000, dtype=torch.float64).scatter_add(1, ids.clamp(min=0), weights)
    return dense / dense.sum(dim=1, keepdim=True)


def plain(model: Any, batch: Any) -> torch.Tensor:
    """The sum of forward KL over a batch's rows, with dense weights in float64."""
    mask = batch["loss_mask"]
    p = target({name: batch[name][mask] for name in ("target_ids", "target_logprobs", "tail_logprob")})
    log_q = model(input_ids=batch["input_ids"]).logits[mask].double().log_softmax(dim=1)
    total: torch.Tensor = (torch.special.xlogy(p, p) - p * log_q).sum()
    return total


def test_learner_and_trainer_learn_what_the_rows_say(sampled_store: Path, tmp_path: Path) -> None:
    """Losses and gradients are those of the dense weights, packed and not; a loader with readers passes rows on."""
    cache = TeacherCache(str(sampled_store), tokenizer=make_tokenizer())
    batch = collate([cache[i] for i in range(6)])
    assert batch["target_logprobs"][batch["loss_mask"]].isnan().any()
    expected = build_model("llama", num_hidden_layers=2)
    wanted = plain(expected, batch)
    wanted.backward()
    for packed in (False, True):
        model = build_model("llama", num_hidden_layers=2)
        total = Learner(model, DistillationLoss(), cache.temperatures, packed)(batch)
        assert total.item() == pytest.approx(wanted.item(), rel=1e-4)
        total.backward()
        for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4, msg=name)
    args = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=6, report_to="none", use_cpu=True, disable_tqdm=True,
        logging_steps=1, save_strategy="no", train_sampling_strategy="sequential",
    )  # fmt: skip
    model = build_model("llama", num_hidden_layers=2)
    run = DistillationTrainer(
        model, args, train_dataset=cache[:6], eval_dataset=cache[:6], processing_class=make_tokenizer()
    )
    mean = wanted.item() / int(batch["loss_mask"].sum())
    assert run.evaluate()["eval_loss"] == pytest.approx(mean, rel=1e-4)
    run.train()
    assert [line["loss"] for line in run.state.log_history if "loss" in line] == [pytest.approx(mean, rel=1e-4)]
    loader = DataLoader(cache.shuffled(batch_size=5, seed=0), batch_size=None, num_workers=1)
    seen = [number for part in loader for number in part["sample"].tolist() if number >= 0]
    assert sorted(seen) == list(range(len(cache)))


def test_what_a_sample_cannot_say_is_refused_before_work_is_lost(sampled_store: Path, tmp_path: Path) -> None:
    cache = TeacherCache(str(sampled_store))
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ConfigError, match=r"expected divergence forward_kl and temperature 1"):
        DistillationTrainer(
            build_model("llama"), args, train_dataset=cache, processing_class=make_tokenizer(),
            distillation_loss=DistillationLoss("reverse_kl"),
        )  # fmt: skip
    learner = Learner(build_model("llama"), DistillationLoss("jensen_shannon"), cache.temperatures)
    with pytest.raises(ConfigError, match=r"found jensen_shannon and 1 \(generate with capture\.method=topk"):
        learner(collate([cache[0]]))


def test_the_teacher_as_its_own_student(sampled_store: Path, sharp_model: Path, tmp_path: Path) -> None:
    """Held-out KL is of the kept ids and the rest: nearly 0. The most probable id is always kept."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        cache = TeacherCache(str(sampled_store))[:20]
        model = AutoModelForCausalLM.from_pretrained(sharp_model)
        learner = Learner(model, DistillationLoss(), cache.temperatures)
        found = evaluate(learner, cache, 4, torch.device("cpu"))
        other = Learner(build_model("llama", num_hidden_layers=1), DistillationLoss(), cache.temperatures)
        assert evaluate(other, cache, 4, torch.device("cpu"))["kl"] > 20 * found["kl"]
    finally:
        dist.destroy_process_group()
    assert 0 <= found["kl"] < 1e-3
    assert found["top1_agreement"] > 0.999


def test_measuring_before_a_run_says_what_the_run_keeps(
    texts: Callable[[int], Path], sharp_model: Path, tmp_path: Path
) -> None:
    """Of data that is measured whole: the same ids a row and the same mass, to the last digit shown."""
    arguments = [f"teacher.model={sharp_model}", f"dataset.path={texts(40)}", "dataset.max_samples=6"]
    arguments += ["capture.k=12"]
    shown = preview(load(GenerateConfig, arguments), Grid(), arguments, measure=True)
    lines = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in shown.partition("\n\n")[0].splitlines())
    store = Store.existing(str(generate_here(tmp_path, *arguments, f"store.path={tmp_path / 'x.zarr'}")), {})
    assert lines["measured"] == f"{store.attributes['num_tokens']:,} tokens"
    found = Choice.of(store)
    for k in (8, 12):
        assert f"{k}: {found.expected_ids('sample', k):.1f} ids, " in lines["sampled with k"]
    assert re.search(r"; 12: [3-9]\.\d ids, \d+ bytes/token; 16: ", lines["sampled with k"])
    size = re.search(r"about .*, (\d+) bytes/token", lines["store"])
    told = re.search(r" 12: .*? (\d+) bytes/token", lines["sampled with k"])
    assert size is not None
    assert told is not None
    assert size[1] == told[1]
    without = preview(load(GenerateConfig, arguments), Grid(), arguments)
    assert "measured" not in without
    assert re.search(r"^store +at most ", without, re.MULTILINE)
    best = preview(load(GenerateConfig, [*arguments, "capture.method=topk"]), Grid(), arguments)
    assert re.search(r"^store +about ", best, re.MULTILINE)


def test_measuring_says_the_perplexity_of_what_is_trained_on(sharp_model: Path, tmp_path: Path) -> None:
    """As the store does afterwards: a prompt is not what a student learns from."""
    data = tmp_path / "x.jsonl"
    data.write_text('{"prompt_ids": [9, 8, 7, 6, 5, 4, 3, 200, 100], "completion_ids": [17, 18]}\n' * 3)
    arguments = [f"teacher.model={sharp_model}", f"dataset.path={data}"]
    shown = preview(load(GenerateConfig, arguments), Grid(), arguments, measure=True)
    store = Store.existing(str(generate_here(tmp_path, *arguments, f"store.path={tmp_path / 'x.zarr'}")), {})
    told = re.search(r"^teacher perplexity +(.*)$", shown, re.MULTILINE)
    assert told is not None
    said = Choice.of(store).lines(store.attributes["vocab_size"], "portable")["teacher perplexity"]
    assert float(told[1]) == pytest.approx(float(said), rel=0.01)


def test_train_and_inspect(sampled_store: Path, tmp_path: Path) -> None:
    def train(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "distill.train", f"store.path={sampled_store}", "student.layers=1", *arguments],
            cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip

    refused = train("loss.divergence=reverse_kl")
    assert refused.returncode == 2
    assert refused.stderr.count("error: loss: expected divergence forward_kl and temperature 1") == 1, refused.stderr
    assert not (tmp_path / "outputs").exists()
    ran = train("optimizer.steps=4", "batch.readers=1", "evaluation.samples=10", "device=cpu")
    assert ran.returncode == 0, ran.stderr
    assert "KL to teacher" in ran.stderr
    shown = describe(Store.existing(str(sampled_store), {}))
    assert re.search(r"^capture +sample, k 16, temperatures \[1.0\]$", shown, re.MULTILINE)
    assert re.search(r"^mass of the top +at least 1: 0\.\d\d, 2: ", shown, re.MULTILINE)
    assert re.search(r"^ids +\d\.\d on average$", shown, re.MULTILINE), shown
    assert re.search(r"^sampled with k +8: \d\.\d ids, \d+ bytes/token; 16: ", shown, re.MULTILINE)
    assert " (drawn)" in shown
    assert "nan" not in shown
