"""The study of docs/on-policy.md on a small random model: its figures are what it says they are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks import fidelity, on_policy
from tests.benchmarks.fidelity_models import Windows
from tests.benchmarks.on_policy_rows import ARMS, TOPK, Settings, as_written, rows_at, said, write
from tests.benchmarks.on_policy_students import RATES, Seed, chosen, evaluate, repetition
from tests.support import build_model

SMALL = Settings(length=24, new=16, tokens=96, sequences=5)


def models() -> tuple[Any, Any]:
    """A teacher and a student, with distributions that are far from even, and ends of texts among what they say."""
    teacher, student = build_model("llama").eval(), build_model("llama").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(4.0)
        teacher.lm_head.weight[2].mul_(3.0)
        student.lm_head.weight.copy_(teacher.lm_head.weight + 0.05 * torch.randn_like(teacher.lm_head.weight))
    return teacher, student


def prompts(windows: int = 12) -> torch.Tensor:
    return torch.randint(3, 1000, (windows, SMALL.length + 1), generator=torch.Generator().manual_seed(0))


def test_what_is_written_follows_the_prompt_and_is_trained_on_to_the_end_of_the_text() -> None:
    _, student = models()
    written = write(student, prompts(), SMALL, 0)
    first = SMALL.length + 1 - SMALL.new
    assert torch.equal(written.tokens[:, :first], prompts()[:, :first])
    assert written.tokens.shape == (12, SMALL.length + 1)
    lengths = written.mask.sum(dim=1).tolist()
    assert min(lengths) < SMALL.new == max(lengths)
    for tokens, mask, length in zip(written.tokens, written.mask, lengths, strict=True):
        assert mask.tolist() == [False] * (first - 1) + [True] * length + [False] * (SMALL.new - length)
        ids = tokens[first:].tolist()
        assert ids.index(2) + 1 == length if 2 in ids else length == SMALL.new
    assert torch.equal(write(student, prompts(), SMALL, 0).tokens, written.tokens)
    assert not torch.equal(write(student, prompts(), SMALL, 1).tokens, written.tokens)


def test_what_is_written_is_as_frequent_as_it_is_probable() -> None:
    _, student = models()
    windows = prompts(1).repeat(4000, 1)
    settings = Settings(length=24, new=1, sequences=4000)
    found = write(student, windows, settings, 0).tokens[:, -1]
    with torch.no_grad():
        q = student(windows[:1, :-1]).logits[0, -1].softmax(dim=0)
    shares = torch.bincount(found, minlength=1000) / 4000
    assert float((shares - q).square().sum()) < 3 * float((q * (1 - q)).sum()) / 4000
    assert float(q.max()) > 0.02


def test_rows_are_those_of_the_tokens_that_follow() -> None:
    teacher, student = models()
    written = write(student, prompts(), SMALL, 0)
    rows = rows_at(said(teacher, written.tokens, [TOPK], SMALL, 0)["topk"], written, "cpu")
    with torch.no_grad():
        q = student(written.tokens).logits.log_softmax(dim=2)[:, :-1][written.mask]
        p = teacher(written.tokens).logits.log_softmax(dim=2)[:, :-1][written.mask]
    following = torch.cat([tokens[1:][mask] for tokens, mask in zip(written.tokens, written.mask, strict=True)])
    assert torch.equal(rows["next_tokens"], following)
    assert torch.allclose(rows["next_logprob"], p.gather(1, following[:, None])[:, 0], rtol=1e-3, atol=1e-3)
    assert torch.allclose(rows["sampled_logprob"], q.gather(1, following[:, None])[:, 0], rtol=1e-3, atol=1e-3)
    assert torch.allclose(rows["target_logprobs"][:, 0], p.amax(dim=1), rtol=2e-2)


def test_figures_are_those_of_what_the_student_writes() -> None:
    teacher, student = models()
    windows = Windows(prompts())
    with torch.no_grad():
        told = teacher.model(windows.inputs).last_hidden_state.flatten(0, 1)
        found = evaluate(student, teacher, SMALL, Seed({}, {}, windows, told, {}), 7)
        samples = write(student, windows.tokens, SMALL, 12345 + 7)
        p, q = (model(samples.tokens[:, :-1]).logits[samples.mask].log_softmax(dim=1) for model in (teacher, student))
        text_p, text_q = (model(windows.inputs).logits.log_softmax(dim=2) for model in (teacher, student))
    following = samples.tokens[:, 1:][samples.mask]
    assert found["reverse_kl"] == pytest.approx(float((q.exp() * (q - p)).sum(dim=1).mean()), rel=1e-4)
    nll = -p.gather(1, following[:, None]).mean()
    assert found["teacher_perplexity"] == pytest.approx(float(nll.exp()), rel=1e-3)
    assert found["entropy"] == pytest.approx(float(-(q.exp() * q).sum(dim=1).mean()), rel=1e-4)
    assert found["length"] == pytest.approx(len(following) / 12)
    forward = (text_p.exp() * (text_p - text_q)).sum(dim=2).mean()
    assert found["forward_kl"] == pytest.approx(float(forward), rel=1e-4)
    itself = evaluate(teacher, teacher, SMALL, Seed({}, {}, windows, told, {}), 7)
    assert itself["reverse_kl"] == pytest.approx(0, abs=1e-5)
    assert itself["forward_kl"] == pytest.approx(0, abs=1e-5)


def test_repetition_counts_what_came_before() -> None:
    tokens = torch.tensor([[9, 1, 2, 3, 4, 1, 2, 3, 4, 5], [9, 1, 2, 3, 4, 5, 6, 7, 8, 0]])
    mask = torch.ones(2, 9, dtype=torch.bool)
    assert repetition(as_written(tokens, mask)) == 1 / 12
    mask[0, 7:] = False  # the end of it is not written: 1 2 3 4 1 2 3
    assert repetition(as_written(tokens, mask)) == 0


def test_the_whole_study(model_folder: Any, texts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = "heal=20 steps=12 tokens=128 length=16 new=8 held_out=512 layers=2 lr=0.003 seeds=2 fresh=6 sequences=32"
    arguments = [
        *small.split(),
        "processes=1",
        f"teacher={model_folder('llama')}",
        f"texts={texts(200)}",
    ]
    on_policy.main([*arguments, "part=all", f"out={tmp_path}"])
    results = json.loads((tmp_path / "on_policy.json").read_text())
    swept, found = (results[part]["figures"] for part in ("sweep", "students"))
    assert swept.keys() == {arm.name for arm in ARMS if arm.texts != "live"}
    assert all(rates.keys() == {str(rate) for rate in RATES} for rates in swept.values())
    best = chosen(swept)
    assert found.keys() == {"start", "teacher", *(arm.name for arm in ARMS)}
    for arm in ARMS:
        assert {figures["rate"] for figures in found[arm.name].values()} == {best[arm.name]}
        least = min(swept[arm.name if arm.texts != "live" else "on_policy"].values(), key=lambda one: one["reverse_kl"])
        assert least["rate"] == best[arm.name]
    for seed in ("0", "1"):
        figures = {name: found[name][seed] for name in found}
        assert len({one["reverse_kl"] for one in figures.values()}) == len(figures)  # each learned something else
        tokens = {one["tokens"] for name, one in figures.items() if name not in ("start", "teacher", "on_policy_live")}
        assert len(tokens) == 1
        assert figures["reverse_kl"]["reverse_kl"] < figures["start"]["reverse_kl"]
        assert figures["teacher"]["reverse_kl"] == pytest.approx(0, abs=1e-4)
    printed = capsys.readouterr().out
    assert all(f"\n| {arm.name} |" in printed for arm in ARMS)
    with pytest.raises(SystemExit, match="step"):
        on_policy.main(["step=3"])


@pytest.mark.parametrize("name", ["on_policy", "on_policy_gpu"])
def test_the_tables_of_the_page_are_those_of_its_figures(name: str) -> None:
    page = (fidelity.DOCS / "on-policy.md").read_text().splitlines()
    lines = [*on_policy.tables(json.loads((fidelity.DOCS / f"{name}.json").read_text()))]
    assert len(lines) > len(ARMS)
    assert {line for line in lines if line.startswith("|")} <= {*page}
