"""Students of each method: the same start, the same windows in the same order, the same steps; held-out figures.

The start is a student of some of the teacher's layers, healed by a few steps of cross-entropy on text of its own. Each
seed holds out other texts, reads the others in another order, and has other draws. A token's draws are made once, as in
a store. N rows, V vocabulary, H hidden size.
"""

import functools
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from tests.benchmarks.fidelity_models import Windows, encode, hidden_states, load, split, student_of
from tests.benchmarks.fidelity_rows import METHODS, Arrays, Method, Settings, as_read, full_kl, losses, rows_of

Step = tuple[Tensor, Callable[[Tensor], Tensor]]
"""Inputs [B, L], and from a student's logits [B, L, V] the losses of the rows that count."""
BINS = 15
CHUNK = 1024
SKIPPED = ("top-64 ground_truth", "VarOpt 32", "VarOpt 128")
STUDENTS = tuple(method for method in METHODS if method.name not in SKIPPED)
"""A student takes minutes. What is skipped lies between others, or is next to the whole distribution."""


@dataclass
class Seed:
    """What the students of a seed share. said: the teacher's hidden states [N, H]. rows: of each method, [W, L, K]."""

    train: Windows
    held_out: Windows
    said: Tensor
    said_held_out: Tensor
    head: Tensor
    rows: dict[str, Arrays]


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """The figures of all students so far, whenever one more is done."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="distill-fidelity-") as scratch:
        start(settings, Path(scratch))
        for part in (
            [(prepare, settings, Path(scratch), seed) for seed in range(settings.seeds)],
            [
                (train, settings, Path(scratch), seed, method)
                for seed in range(settings.seeds)
                for method in (None, *STUDENTS)
            ],
        ):
            for name, seed, figures in ran(settings, part):
                if name is not None:
                    found.setdefault(name, {})[str(seed)] = figures
                    print(name, seed, {key: round(value, 4) for key, value in figures.items()}, flush=True)
                    yield {"figures": found}


def ran(settings: Settings, calls: list[Any]) -> Iterator[Any]:
    """The results of the calls, as they come: in processes of one thread each, or here on a GPU."""
    if settings.device != "cpu" or settings.processes < 2:
        yield from (function(*arguments) for function, *arguments in calls)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(settings.processes, context, torch.set_num_threads, (1,)) as pool:
        for done in as_completed([pool.submit(*call) for call in calls]):
            yield done.result()


def start(settings: Settings, scratch: Path) -> None:
    """Heal the common start, with all threads."""
    torch.manual_seed(0)
    torch.set_num_threads(max(1, settings.processes))
    student = student_of(load(settings), settings.layers)
    heal, _, _ = split(settings, 0, encode(settings))
    if len(heal.tokens):
        needed = settings.heal * settings.tokens // settings.length
        some, nothing = Windows(heal.tokens[torch.randperm(len(heal.tokens))[:needed]]), torch.empty(0)
        optimize(student, settings, Method("text"), Seed(some, some, nothing, nothing, nothing, {}))
    student.save_pretrained(scratch / "start")


def prepare(settings: Settings, scratch: Path, seed: int) -> tuple[None, int, None]:
    """What the teacher says on a seed's windows, and what each method keeps of it: to a file."""
    teacher, batch = load(settings), max(1, settings.tokens // settings.length)
    _, train, held_out = split(settings, seed, encode(settings))
    tokens, number = train.tokens.unique(dim=0, return_inverse=True)  # a window that comes again has the same rows
    some, head = Windows(tokens), teacher.lm_head.weight.detach()
    next_ids = some.next_ids.to(settings.device)

    def joined(values: list[NDArray[Any]]) -> NDArray[Any]:
        """[W, L, ...] of arrays over rows."""
        return np.concatenate(values).reshape(len(tokens), settings.length, -1)

    said, held = (hidden_states(teacher, windows.inputs, batch) for windows in (some, held_out))
    kept = {method.kept: method for method in STUDENTS if method.kind not in ("full", "text")}
    parts: dict[str, list[Arrays]] = {name: [] for name in kept}
    for first in range(0, len(said), CHUNK):
        logits = linear(said[first : first + CHUNK], head)
        for name, method in kept.items():
            parts[name].append(rows_of(logits, method, next_ids[first : first + CHUNK], seed, first))
    rows = {
        name: {key: joined([part[key] for part in found])[number] for key in found[0]} for name, found in parts.items()
    }
    said = said.unflatten(0, (len(tokens), -1))[number].flatten(0, 1)
    torch.save(Seed(train, held_out, said, held, head, rows), scratch / f"{seed}.pt")
    return None, seed, None


@functools.lru_cache(maxsize=1)
def prepared(scratch: Path, seed: int) -> Seed:
    """What `prepare` has saved."""
    found: Seed = torch.load(scratch / f"{seed}.pt", weights_only=False)
    return found


def train(settings: Settings, scratch: Path, seed: int, method: Method | None) -> tuple[str, int, dict[str, float]]:
    """The figures of one student after its training; of the start without a method."""
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(scratch / "start", dtype=torch.float32).to(settings.device)
    given, began = prepared(scratch, seed), time.monotonic()
    if method is not None:
        optimize(student, settings, method, given)
    seconds = round(time.monotonic() - began, 1)
    return method.name if method else "start", seed, evaluate(student, settings, given) | {"seconds": seconds}


def optimize(student: Any, settings: Settings, method: Method, given: Seed) -> None:
    """All steps of a student, on the windows of its seed."""
    batch, kept, empty = settings.tokens // settings.length, given.rows.get(method.kept, {}), torch.empty(0)

    def step_of(step: int) -> Step:
        at = slice(step * batch, (step + 1) * batch)
        some = Windows(given.train.tokens[at].to(settings.device))
        rows = as_read({name: values[at].reshape(-1, values.shape[-1]) for name, values in kept.items()}, some.next_ids)
        said = given.said[step * batch * settings.length :][: settings.tokens] if method.kind == "full" else empty
        teacher_logits = linear(said, given.head) if method.kind == "full" else empty
        return some.inputs, lambda logits: losses(method, logits.flatten(0, 1), rows, teacher_logits)

    learn(student, settings.lr, len(given.train.tokens) // batch, step_of)


def learn(student: Any, lr: float, steps: int, step_of: Callable[[int], Step]) -> None:
    """AdamW: linear warm-up over a tenth of the steps, then cosine decay to a tenth."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    warmup = max(1, steps // 10)
    for step in range(steps):
        decay = 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
        optimizer.param_groups[0]["lr"] = lr * ((step + 1) / warmup if step < warmup else decay)
        inputs, loss = step_of(step)
        student.train()
        with torch.autocast(student.device.type, torch.bfloat16):
            logits = student(inputs).logits
        loss(logits).mean().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()


@torch.inference_mode()
def evaluate(student: Any, settings: Settings, given: Seed) -> dict[str, float]:
    """Held-out figures, means over rows.

    cross_entropy      -log q of the token that follows, nats
    kl                 KL(p || q) over the whole vocabulary, nats
    top1_agreement     share of rows for which both find the same id most probable
    overconfidence     q of the most probable id, less how often that follows
    calibration_error  the same over 15 bins of q, absolute (Guo et al., 2017)
    """
    student.eval()
    with torch.autocast(settings.device, torch.bfloat16):
        saying = hidden_states(student, given.held_out.inputs, max(1, settings.tokens // settings.length))
    next_ids = given.held_out.next_ids.to(saying.device)
    sums, bins = torch.zeros(3, dtype=torch.float64), torch.zeros(2, BINS, dtype=torch.float64)
    for first in range(0, len(saying), CHUNK):
        p = linear(given.said_held_out[first : first + CHUNK], given.head)
        q, following = student.lm_head(saying[first : first + CHUNK]), next_ids[first : first + CHUNK]
        sums += torch.stack(
            [
                cross_entropy(q, following, reduction="sum"),
                full_kl(q, p).sum(),
                (q.argmax(dim=1) == p.argmax(dim=1)).sum(),
            ]
        ).cpu().double()  # fmt: skip
        confidence, guess = (values.cpu() for values in q.softmax(dim=1).max(dim=1))
        at = (confidence * BINS).long().clamp(max=BINS - 1)
        bins[0].index_add_(0, at, confidence.double())
        bins[1].index_add_(0, at, (guess == following.cpu()).double())
    nll, kl, agreement = (sums / len(saying)).tolist()
    gaps = (bins[0] - bins[1]) / len(saying)
    return {
        "cross_entropy": nll,
        "kl": kl,
        "top1_agreement": agreement,
        "overconfidence": float(gaps.sum()),
        "calibration_error": float(gaps.abs().sum()),
    }
