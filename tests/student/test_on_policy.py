"""The loss of on_policy, in float64: the policy gradient by hand, and the gradient of reverse KL by enumeration."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainingArguments

from distill import DistillationLoss, Learner, TeacherCache, collate
from distill.config.train import TrainConfig
from distill.errors import ConfigError
from distill.hf import DistillationTrainer
from distill.student.divergence import on_policy
from distill.student.evaluate import evaluate, measured_on_policy
from distill.student.metrics import evaluations
from distill.student.training import Training
from tests.support import build_model, generate_here, make_tokenizer

V, T, START = 5, 4, 0
PREFIXES = [
    torch.cartesian_prod(*[torch.arange(V)] * t).view(-1, t) if t else torch.zeros(1, 0).long() for t in range(T)
]


def tiny(seed: int, scale: float = 0.35) -> Any:
    """A Llama of float64 with a vocabulary of V."""
    model = build_model(
        "llama", vocab_size=V, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    ).double()  # fmt: skip
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * (scale if weight.ndim > 1 else 0.3) + (weight.ndim == 1))
    return model


def log_probs(model: Any, prefixes: Tensor) -> Tensor:
    """[N, V]: log-probabilities of what follows START and prefixes [N, t]."""
    ids = torch.cat([torch.full((len(prefixes), 1), START), prefixes], dim=1)
    found: Tensor = model(input_ids=ids).logits[:, -1].log_softmax(dim=1)
    return found


def rollouts(writer: Any, teacher: Any, count: int, seed: int) -> dict[str, Tensor]:
    """A batch of `count` rollouts of T tokens as `collate` makes them, from a sampler and scorer that are written out.

    Row t is about the token that follows token t; the last row is about none.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((count, T + 1), START)
    batch = {name: torch.zeros(count, T + 1, dtype=torch.float64) for name in ("next_logprob", "sampled_logprob")}
    with torch.no_grad():
        for t in range(T):
            said = log_probs(writer, ids[:, 1 : t + 1])
            ids[:, t + 1] = torch.multinomial(said.exp(), 1, generator=generator)[:, 0]
            at = torch.arange(count), ids[:, t + 1]
            batch["sampled_logprob"][:, t] = said[at]
            batch["next_logprob"][:, t] = log_probs(teacher, ids[:, 1 : t + 1])[at]
    batch |= {"input_ids": ids, "next_tokens": torch.cat([ids[:, 1:], torch.full((count, 1), -1)], dim=1)}
    return batch | {"loss_mask": batch["next_tokens"] >= 0}


def gradient(model: Any, total: Tensor) -> Tensor:
    """Of all weights, as one vector."""
    model.zero_grad()
    total.backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


BOUNDS: list[dict[str, Any]] = [
    {},
    {"max_advantage": 0.4},
    {"max_ratio": 1.3},
    {"max_advantage": 0.4, "max_ratio": 1.3},
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bounds", BOUNDS)
def test_the_gradient_is_the_policy_gradient(bounds: dict[str, Any], packed: bool) -> None:
    """-(weight of the row) A grad log q(y), with A and the weight as constants, written out in a call of the model."""
    student, batch = tiny(1), rollouts(tiny(3), tiny(2), 7, seed=0)
    batch["loss_mask"][:, 0] = False  # as of a prompt
    found = gradient(student, Learner(student, DistillationLoss("on_policy", **bounds), [1.0], packed)(batch))
    log_q = student(input_ids=batch["input_ids"]).logits.log_softmax(dim=2)[:, 1:T]
    own = log_q.gather(2, batch["input_ids"][:, 2:, None])[:, :, 0]
    advantage = (batch["next_logprob"][:, 1:T] - own).detach()
    ratio = (own - batch["sampled_logprob"][:, 1:T]).detach().exp()
    assert 0 < (advantage.abs() > 0.4).double().mean() < 1
    assert 0 < (ratio > 1.3).double().mean() < 1
    weight = ratio.clamp(max=bounds["max_ratio"]) if "max_ratio" in bounds else torch.ones_like(ratio)
    bounded = (
        advantage.clamp(-bounds["max_advantage"], bounds["max_advantage"]) if "max_advantage" in bounds else advantage
    )
    expected = gradient(student, -(weight * bounded * own).sum())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert found.abs().max() > 0.1


@pytest.mark.parametrize("bounds", BOUNDS)
def test_values_and_gradients_by_numbers(bounds: dict[str, Any]) -> None:
    torch.manual_seed(0)
    own = torch.randn(30, dtype=torch.float64).mul(3).sub(4).requires_grad_()
    teachers, sampled = torch.randn(2, 30, dtype=torch.float64) - 4
    found = on_policy(own, teachers, sampled, bounds.get("max_advantage"), bounds.get("max_ratio"))
    for row in range(30):
        q, p, mu = own[row].item(), teachers[row].item(), sampled[row].item()
        c = bounds.get("max_advantage", math.inf)
        value = 0.5 * (q - p) ** 2 if abs(q - p) <= c else c * (abs(q - p) - c / 2)
        weight = min(math.exp(q - mu), bounds["max_ratio"]) if "max_ratio" in bounds else 1.0
        assert found[row].item() == pytest.approx(weight * value)
    found.sum().backward()
    assert own.grad is not None


def exact(writer: Any, student: Any, teacher: Any, credit: bool = False) -> Tensor:
    """The gradient of the sum over all prefixes of w(prefix) KL(q(.|prefix) || p(.|prefix)), by enumeration.

    w: how likely `writer` writes the prefix, held fixed. This is what the loss of Lightning OPD follows in the mean:
    the advantage of a token is its own log-ratio alone, without credit for the tokens that it makes likely later.
    credit: w is the student's own and has its gradient too: the gradient of the KL of whole sequences.
    """
    total = torch.zeros((), dtype=torch.float64)
    weights = torch.zeros(1, dtype=torch.float64)  # log w of each prefix
    for prefixes in PREFIXES:
        q, p = log_probs(student, prefixes), log_probs(teacher, prefixes).detach()
        total = total + (weights.exp() * (q.exp() * (q - p)).sum(dim=1)).sum()
        said = log_probs(writer, prefixes)
        weights = (weights[:, None] + (said if credit else said.detach())).flatten()
    return gradient(student, total)


def estimate(
    loss: DistillationLoss, student: Any, batch: Mapping[str, Tensor], groups: int = 40
) -> tuple[Tensor, float]:
    """The mean gradient over a batch's rollouts, and its standard error (a norm), from the spread over groups."""
    learner = Learner(student, loss, [1.0])
    size = len(batch["input_ids"]) // groups
    found = torch.stack([
        gradient(student, learner({name: values[i * size : (i + 1) * size] for name, values in batch.items()}) / size)
        for i in range(groups)
    ])  # fmt: skip
    return found.mean(dim=0), math.sqrt(found.var(dim=0).sum().item() / groups)


def test_the_mean_over_rollouts_is_the_gradient_of_reverse_kl() -> None:
    """At the Monte-Carlo rate: the error is what the spread of the rollouts says, for 16 times as many a quarter."""
    student, teacher, loss = tiny(1), tiny(2), DistillationLoss("on_policy")
    expected, errors = exact(student, student, teacher), []
    for count in (1_000, 16_000):
        batch = rollouts(student, teacher, count, seed=count)
        mean, standard_error = estimate(loss, student, batch)
        errors.append((mean - expected).norm().item())
        assert 0.4 * standard_error < errors[-1] < 2 * standard_error
    assert 2 < errors[0] / errors[1] < 8
    assert standard_error < 0.03 * expected.norm()
    wrong = {
        "sign": -mean,
        "shift by one": estimate(loss, student, {**batch, "next_logprob": batch["next_logprob"].roll(1, 1)})[0],
        "the teacher's rows of others": estimate(
            loss, student, {**batch, "next_logprob": batch["next_logprob"].roll(1, 0)}
        )[0],
        "the whole sequence's": exact(student, student, teacher, credit=True),
    }
    for variant, vector in wrong.items():
        assert (vector - expected).norm() > 10 * standard_error, variant


def test_rollouts_of_another_student() -> None:
    """With the ratio the mean is over the tokens that this student says, after prefixes that the other one wrote."""
    student, teacher, other = tiny(1), tiny(2), tiny(3, 0.25)
    expected = exact(other, student, teacher)
    batch = rollouts(other, teacher, 16_000, seed=0)
    mean, standard_error = estimate(DistillationLoss("on_policy", max_ratio=1e6), student, batch)
    assert (mean - expected).norm() < 2 * standard_error
    assert standard_error < 0.1 * expected.norm()
    for loss in (DistillationLoss("on_policy"), DistillationLoss("on_policy", max_ratio=1.0)):
        assert (estimate(loss, student, batch)[0] - expected).norm() > 5 * standard_error


def test_what_nobody_says() -> None:
    """A token that the teacher never says counts as e**-100; one that the student never says teaches nothing."""
    rows = {"next_tokens": torch.tensor([2, 3, 4]), "next_logprob": torch.tensor([-torch.inf, -1.0, -2.0])}
    rows["sampled_logprob"] = torch.tensor([-1.0, -1.0, -torch.inf])
    for bounds in BOUNDS:
        logits = torch.zeros(3, V, dtype=torch.float64)
        logits[1:, 3] = -torch.inf
        logits.requires_grad_()
        found = DistillationLoss("on_policy", **bounds).per_row(logits, rows, [1.0])
        found.sum().backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
        assert (logits.grad[1] == 0).all()
        assert found[1] == 0
        advantage = torch.tensor([-100 + math.log(5), -2 + math.log(4)]).clamp(-bounds.get("max_advantage", 999), 999)
        weight = torch.tensor([min(math.e / 5, 1.3), 1.3]) if "max_ratio" in bounds else torch.ones(2)
        says = torch.tensor([1 - 1 / 5, 1 - 1 / 4])  # grad log q(y) at y
        torch.testing.assert_close(
            logits.grad[[0, 2], [2, 4]], (-advantage * weight * says).double(), rtol=1e-6, atol=0.0
        )


def test_a_batch_without_what_the_loss_needs() -> None:
    """It is refused before the student is called. With alpha=0 nothing of that is needed."""
    student, batch = tiny(1), rollouts(tiny(1), tiny(2), 3, seed=0)
    calls: list[object] = []
    student.register_forward_pre_hook(lambda *inputs: calls.append(inputs))
    for missing, told in (
        ("next_logprob", r"loss\.divergence: expected next_logprob in the batch with on_policy, found none"),
        ("sampled_logprob", r"loss\.max_ratio: expected sampled_logprob in the batch, found none"),
    ):
        less = {name: values for name, values in batch.items() if name != missing}
        for packed in (False, True):
            with pytest.raises(ConfigError, match=told):
                Learner(student, DistillationLoss("on_policy", max_ratio=2.0), [1.0], packed)(less)
        with pytest.raises(ConfigError, match=told):
            DistillationLoss("on_policy", max_ratio=2.0).from_logits(torch.zeros(3, T + 1, V), less, [1.0])
        assert not calls
        assert Learner(student, DistillationLoss("on_policy", alpha=0.0, max_ratio=2.0), [1.0])(less) > 0
        calls.clear()
    without = {name: values for name, values in batch.items() if name != "sampled_logprob"}
    assert Learner(student, DistillationLoss("on_policy"), [1.0])(without) > 0


def test_the_figures_of_an_evaluation() -> None:
    """Over all tokens as often as the student writes them, log_ratio and reverse_kl are both its reverse KL."""
    torch.manual_seed(0)
    q, p = (torch.randn(6, V, dtype=torch.float64).log_softmax(dim=1) for _ in range(2))
    q[0, 1] = -torch.inf  # never written: of p there, reverse_kl knows nothing
    q = q.log_softmax(dim=1)
    found = torch.zeros(6, 3, dtype=torch.float64)
    for row in range(6):
        for y in range(V):
            rows = {"next_tokens": torch.tensor([y]), "next_logprob": p[row, [y]]}
            if q[row, y].isfinite():
                found[row] += q[row, y].exp() * measured_on_policy(q[row, None].float(), rows)
    kl = torch.where(q.isfinite(), q.exp() * (q - p), 0.0).sum(dim=1)
    entropy = -torch.where(q.isfinite(), q.exp() * q, 0.0).sum(dim=1)
    unknown = torch.where(q[:, 1].isfinite(), 0.0, p[:, 1].exp())
    torch.testing.assert_close(found, torch.stack([kl, kl - unknown, entropy], dim=1), rtol=1e-5, atol=1e-6)
    none = measured_on_policy(q[1:2].float(), {"next_tokens": torch.tensor([-1]), "next_logprob": torch.zeros(1)})
    assert none[:2].tolist() == [0, 0]


def test_a_store_of_rollouts(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """From ids in a file through a store to loss, gradient and held-out figures, beside the logits of both models.

    With a loop of one's own, packed and not, and with the Trainer.
    """
    random = np.random.default_rng(0)
    examples = []
    for length in (5, 2, 17, 9):
        prompt, completion = (random.integers(6, 262, size).tolist() for size in (1 + length // 2, length))
        said = random.uniform(-8, -4, length).tolist()
        examples.append({"prompt_ids": prompt, "completion_ids": completion, "logprobs": said})
    (tmp_path / "x.jsonl").write_text("".join(f"{json.dumps(example)}\n" for example in examples))
    arguments = [f"teacher.model={model_folder('llama')}", f"dataset.path={tmp_path / 'x.jsonl'}"]
    cache = TeacherCache(str(generate_here(tmp_path, *arguments, f"store.path={tmp_path / 'x.zarr'}")))

    teacher = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    student, loss = build_model("qwen3"), DistillationLoss("on_policy", max_advantage=0.5, max_ratio=2.0)
    terms, figures, bounded = [], torch.zeros(3), []
    for example in examples:
        ids = torch.tensor(example["prompt_ids"] + example["completion_ids"])[None]
        wrote = torch.arange(len(example["prompt_ids"]), ids.shape[1])
        q, p = (model(ids).logits[0].log_softmax(dim=1)[wrote - 1] for model in (student, teacher))
        own, advantage = q.gather(1, ids[0, wrote, None])[:, 0], (p - q).gather(1, ids[0, wrote, None])[:, 0].detach()
        ratio = (own.detach() - torch.tensor(example["logprobs"])).exp()
        bounded += [advantage.abs() > 0.5, ratio > 2]
        terms.append(-ratio.clamp(max=2) * advantage.clamp(-0.5, 0.5) * own)
        figures += torch.stack([-advantage.sum(), (advantage.expm1() - advantage).sum(), -(q.exp() * q).sum().detach()])
    count = sum(map(len, terms))
    assert all(0 < torch.cat(bounded[i::2]).float().mean() < 1 for i in range(2))
    expected = gradient(student, torch.cat(terms).sum() / count)

    batch = collate(list(cache))
    assert int(batch["loss_mask"].sum()) == count
    values = []
    for packed in (False, True):
        total = Learner(student, loss, cache.temperatures, packed)(batch) / count
        values.append(total.item())
        torch.testing.assert_close(
            gradient(student, total), expected, rtol=0.01, atol=0.003 * float(expected.abs().max())
        )
    args = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True,
        per_device_eval_batch_size=3, logging_steps=1, save_strategy="no", learning_rate=0.0,
    )  # fmt: skip
    run = DistillationTrainer(
        student,
        args,
        train_dataset=cache,
        eval_dataset=cache,
        processing_class=make_tokenizer(),
        distillation_loss=loss,
    )
    values += [run.evaluate()["eval_loss"], run.train().training_loss]
    assert values == pytest.approx([values[0]] * 4, rel=1e-5)

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        measured = evaluate(Learner(student, loss, [1.0], packed=True), cache, 3, torch.device("cpu"), on_policy=True)
        keeper: Any = mock.Mock(step=0)
        config = TrainConfig(output=str(tmp_path / "out"))  # forward KL: the store says that these are rollouts
        Training(config, student, DistillationLoss(), cache, keeper, 1, torch.device("cpu"))._evaluate()
    finally:
        dist.destroy_process_group()
    assert list(measured.values())[-3:] == pytest.approx((figures / count).tolist(), rel=0.01, abs=1e-3)
    assert list(measured)[-3:] == ["log_ratio", "reverse_kl", "entropy"]
    assert measured["tokens"] == count
    (line,) = evaluations(tmp_path / "out" / "metrics.jsonl")
    assert line["held_out"] == pytest.approx(measured, rel=1e-5)
