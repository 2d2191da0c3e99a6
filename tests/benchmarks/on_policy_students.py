"""Students of each arm: from the same KD student, with the same number of tokens; figures of what they write then.

The start is a student of some of the teacher's layers that has learned from the teacher by forward KL (KD), on texts of
its own. Each seed trains on other windows, and holds out other texts. The prompts of an arm's rollouts are the windows
of the text, and KD on text trains on as many tokens of each window as the rollout has.
"""

import functools
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.student.loss import DistillationLoss
from tests.benchmarks.fidelity_models import Windows, encode, hidden_states, load, split, student_of
from tests.benchmarks.fidelity_rows import full_kl
from tests.benchmarks.fidelity_students import Step, learn, ran
from tests.benchmarks.on_policy_rows import (
    ARMS,
    CHUNK,
    SAMPLE,
    Arm,
    Settings,
    Written,
    as_written,
    rows_at,
    said,
    write,
)

RATES = (0.3, 1.0, 3.0)
"""Times settings.lr: part sweep tries them, on a seed of its own."""


@dataclass
class Seed:
    """What the arms of a seed share: texts by whose they are, and of each the teacher's rows, by method."""

    texts: dict[str, Written]
    rows: dict[str, dict[str, dict[str, Tensor]]]
    held_out: Windows
    said_held_out: Tensor
    seconds: dict[str, float]  # to write them, and to ask the teacher


def measure(settings: Settings, rates: dict[str, float]) -> Iterator[dict[str, Any]]:
    """The figures of all students so far, whenever one more is done. rates: of each arm, times settings.lr."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="distill-on-policy-") as scratch:
        seeds = range(settings.seeds)
        longest_first = sorted(settings.compared, key=lambda arm: arm.texts != "live")
        calls: list[Any] = [
            (train, settings, Path(scratch), seed, arm, rates.get(arm.name, 1.0) if arm else 1.0)
            for seed in seeds
            for arm in (*longest_first, None)
        ]
        calls += [(teacher_itself, settings, Path(scratch), seed) for seed in seeds]
        for name, seed, _, figures in everything(settings, Path(scratch), seeds, calls):
            found.setdefault(name, {})[str(seed)] = figures
            yield {"figures": found}


def sweep(settings: Settings) -> Iterator[dict[str, Any]]:
    """The figures of each arm at each rate, for the seed beyond those that are reported."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="distill-on-policy-") as scratch:
        arms = [arm for arm in settings.compared if arm.texts != "live"]
        calls = [(train, settings, Path(scratch), settings.seeds, arm, rate) for arm in arms for rate in RATES]
        for name, _, rate, figures in everything(settings, Path(scratch), [settings.seeds], calls):
            found.setdefault(name, {})[str(rate)] = figures
            yield {"figures": found}


def chosen(swept: dict[str, Any]) -> dict[str, float]:
    """Of each arm of a sweep's figures the rate with the least reverse KL. The live arm has that of its loss."""
    best = {name: float(min(rates, key=lambda rate: rates[rate]["reverse_kl"])) for name, rates in swept.items()}
    for arm in ARMS:
        if arm.texts == "live" and arm.loss.divergence in best:
            best[arm.name] = best[arm.loss.divergence]
    return best


def everything(settings: Settings, scratch: Path, seeds: Sequence[int], calls: list[Any]) -> Iterator[Any]:
    """The start, then what the arms of a seed share, then the results of the calls."""
    began = time.monotonic()
    start(settings, scratch)
    print(f"KD of the start: {time.monotonic() - began:.0f} s", flush=True)
    for seed, seconds in ran(settings, [(prepare, settings, scratch, seed) for seed in seeds]):
        print(f"seed {seed}: {seconds}", flush=True)
    for done in ran(settings, calls):
        print(*done[:3], {key: round(value, 4) for key, value in done[3].items()}, flush=True)
        yield done


def start(settings: Settings, scratch: Path) -> None:
    """KD from the teacher's layers to the common start, with all threads."""
    torch.manual_seed(0)
    torch.set_num_threads(max(1, settings.processes))
    teacher = load(settings)
    student = student_of(teacher, settings.layers)
    heal, _, _ = split(settings, 0, encode(settings))
    tokens = heal.tokens[torch.randperm(len(heal.tokens))][: settings.heal * settings.tokens // settings.length]
    whole = as_written(tokens, torch.ones(len(tokens), tokens.shape[1] - 1, dtype=torch.bool))
    rows = said(teacher, tokens, [SAMPLE], settings, 0)["sample"]
    run(student, settings, DistillationLoss(), settings.lr, whole, rows)
    student.save_pretrained(scratch / "start")


def prepare(settings: Settings, scratch: Path, seed: int) -> tuple[int, dict[str, float]]:
    """The rollouts of the start, and what the teacher says of them and of the text: to a file."""
    teacher, student = load(settings), read(scratch, settings)
    _, train, held_out = split(settings, seed, encode(settings))
    began = time.monotonic()
    rollouts = write(student, train.tokens, settings, seed)
    texts = {"text": as_written(train.tokens, rollouts.mask), "rollouts": rollouts}
    seconds = {"text": 0.0, "rollouts": time.monotonic() - began}
    rows: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, written in texts.items():
        began = time.monotonic()
        methods = {arm.method.method: arm.method for arm in settings.compared if arm.texts == name}
        rows[name] = said(teacher, written.tokens, methods.values(), settings, seed)
        seconds[name] += time.monotonic() - began
    held = hidden_states(teacher, held_out.inputs, settings.sequences)
    torch.save(Seed(texts, rows, held_out, held, seconds), scratch / f"{seed}.pt")
    return seed, {name: round(value, 1) for name, value in seconds.items()}


@functools.lru_cache(maxsize=1)
def prepared(scratch: Path, seed: int) -> Seed:
    """What `prepare` has saved."""
    found: Seed = torch.load(scratch / f"{seed}.pt", weights_only=False)
    return found


def read(scratch: Path, settings: Settings) -> Any:
    """The common start."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(scratch / "start", dtype=torch.float32).to(settings.device)


def train(
    settings: Settings, scratch: Path, seed: int, arm: Arm | None, rate: float
) -> tuple[str, int, float, dict[str, float]]:
    """The figures of an arm's student after its training; of the start without an arm.

    seconds_asked are those in which the student wrote what the arm trains on, and the teacher was asked about it; where
    arms share it, each has them.
    """
    teacher, student, given = load(settings), read(scratch, settings), prepared(scratch, seed)
    began, tokens, spent, asked = time.monotonic(), 0, 0.0, 0.0
    if arm is not None and arm.texts == "live":
        tokens, spent = run_live(student, teacher, settings, arm, rate, given.texts["text"].tokens, seed)
        asked = spent
    elif arm is not None:
        texts = given.texts[arm.texts]
        rows = given.rows[arm.texts][arm.method.method]
        run(student, settings, arm.loss, settings.lr * rate, texts, rows)
        tokens, asked = int(texts.mask.sum()), given.seconds[arm.texts]
    seconds = time.monotonic() - began - spent
    figures = evaluate(student, teacher, settings, given, seed)
    figures |= {"tokens": tokens, "rate": rate, "seconds": round(seconds, 1), "seconds_asked": round(asked, 1)}
    return arm.name if arm else "start", seed, rate, figures


def teacher_itself(settings: Settings, scratch: Path, seed: int) -> tuple[str, int, float, dict[str, float]]:
    """The figures of what the teacher writes."""
    teacher = load(settings)
    return "teacher", seed, 1.0, evaluate(teacher, teacher, settings, prepared(scratch, seed), seed)


def run(
    student: Any, settings: Settings, loss: DistillationLoss, lr: float, texts: Written, rows: dict[str, Tensor]
) -> None:
    """One pass over windows whose rows are known."""
    batch = settings.tokens // settings.length

    def step_of(step: int) -> Step:
        at = slice(step * batch, (step + 1) * batch)
        return a_step(texts[at], {name: values[at] for name, values in rows.items()}, loss, settings.device)

    learn(student, lr, len(texts.tokens) // batch, step_of)


def run_live(
    student: Any, teacher: Any, settings: Settings, arm: Arm, rate: float, windows: Tensor, seed: int
) -> tuple[int, float]:
    """The same on what the student of the moment writes. Tokens; seconds of the student's writing and the teacher."""
    batch, spent, tokens = settings.tokens // settings.length, 0.0, 0
    texts, rows = as_written(windows[:0], windows[:0, 1:].bool()), dict[str, Tensor]()

    def step_of(step: int) -> Step:
        nonlocal texts, rows, spent, tokens
        if step % settings.fresh == 0:
            began, first = time.monotonic(), step * batch
            some = windows[first : first + settings.fresh * batch]
            texts = write(student, some, settings, seed * 1000 + step)
            rows = said(teacher, texts.tokens, [arm.method], settings, seed * 1000 + step)[arm.method.method]
            spent, tokens = spent + time.monotonic() - began, tokens + int(texts.mask.sum())
        at = slice(step % settings.fresh * batch, (step % settings.fresh + 1) * batch)
        return a_step(texts[at], {name: values[at] for name, values in rows.items()}, arm.loss, settings.device)

    learn(student, settings.lr * rate, len(windows) // batch, step_of)
    return tokens, spent


def a_step(texts: Written, rows: dict[str, Tensor], loss: DistillationLoss, device: str) -> Step:
    """What `learn` asks for."""
    chosen, mask = rows_at(rows, texts, device), texts.mask.to(device)
    inputs = texts.tokens[:, :-1].to(device)
    return inputs, lambda logits: loss.per_row(logits[mask], chosen, [1.0])


@torch.inference_mode()
def evaluate(model: Any, teacher: Any, settings: Settings, given: Seed, seed: int) -> dict[str, float]:
    """Figures of what the model writes after held-out prompts, means over the tokens that it writes; and of the text.

    reverse_kl          KL(q || p) over the whole vocabulary, nats
    teacher_perplexity  exp of the mean of -log p of what was written
    entropy             of q, nats
    length              tokens that were written, with the one that ends the text
    repetition          share of 4-grams that were in the same sample before (Welleck et al., 2020)
    forward_kl          KL(p || q) over the whole vocabulary on the held-out text, all its rows
    """
    samples = write(model, given.held_out.tokens, settings, 12345 + seed)
    some, mask = Windows(samples.tokens), samples.mask.flatten().to(settings.device)
    next_ids = some.next_ids.to(settings.device)[mask]
    saying, told = (hidden_states(each, some.inputs, settings.sequences)[mask] for each in (model, teacher))
    sums = torch.zeros(3, dtype=torch.float64)
    for first in range(0, len(saying), CHUNK):
        at = slice(first, first + CHUNK)
        q, p = model.lm_head(saying[at]).log_softmax(dim=1), teacher.lm_head(told[at]).log_softmax(dim=1)
        found = [full_kl(p, q).sum(), -p.gather(1, next_ids[at, None]).sum(), -(q.exp() * q).sum()]
        sums += torch.stack(found).cpu().double()
    reverse, nll, entropy = (sums / len(saying)).tolist()
    of_text, forward = hidden_states(model, given.held_out.inputs, settings.sequences), 0.0
    for first in range(0, len(of_text), CHUNK):
        at = slice(first, first + CHUNK)
        forward += float(full_kl(model.lm_head(of_text[at]), teacher.lm_head(given.said_held_out[at])).sum())
    return {
        "reverse_kl": reverse,
        "teacher_perplexity": float(torch.tensor(nll).exp()),
        "entropy": entropy,
        "length": float(samples.mask.sum(dim=1).float().mean()),
        "repetition": repetition(samples),
        "forward_kl": forward / len(of_text),
    }


def repetition(samples: Written) -> float:
    """The share of 4-grams of what was written that came before in the same sample."""
    again = total = 0
    for tokens, mask in zip(samples.tokens[:, 1:], samples.mask, strict=True):
        ids = tokens[mask].tolist()
        grams = list(zip(*(ids[i:] for i in range(4)), strict=False))
        again, total = again + len(grams) - len(set(grams)), total + len(grams)
    return again / max(1, total)
