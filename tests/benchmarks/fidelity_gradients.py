"""The gradient of each method with respect to a student's logits, beside that of the teacher's whole distribution.

With g the gradient of a row's loss, [V]:

error     sum over rows of |g - g_full|^2 / sum over rows of |g_full|^2
degrees   the angle between the means of g and g_full over the rows, of the first 2,048 rows and of all of them
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.fidelity_models import Windows, encode, hidden_states, load, student_of, windows
from tests.benchmarks.fidelity_rows import METHODS, Method, Settings, as_read, losses, rows_of

CHUNK = 256
FIRST = 2048


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Of each method: error and degrees, for each seed of its draws."""
    torch.set_num_threads(max(1, settings.processes))
    teacher = load(settings)
    student = student_of(teacher, settings.gradient_layers)
    some = Windows(windows(encode(settings), settings).tokens[: settings.rows // settings.length])
    said, saying = (hidden_states(model, some.inputs, 4) for model in (teacher, student))
    next_ids = some.next_ids.to(settings.device)
    found: dict[str, Any] = {}
    for method in METHODS:
        if method.kind == "full":
            continue
        seeds = settings.seeds if method.kind in ("draws", "varopt") else 1
        found[method.name] = [
            compared(method, teacher.lm_head, said, student.lm_head, saying, next_ids, seed) for seed in range(seeds)
        ]
        print(
            method.name,
            [{key: round(value, 4) for key, value in one.items()} for one in found[method.name]],
            flush=True,
        )
    yield {"figures": found}


def compared(
    method: Method, teacher_head: Any, said: Tensor, student_head: Any, saying: Tensor, next_ids: Tensor, seed: int
) -> dict[str, float]:
    """The figures of one method: hidden states [N, H] of teacher and student, next_ids [N]."""
    squares = torch.zeros(2, dtype=torch.float64)
    sums: list[Tensor] = []
    at_first = 0.0
    for first in range(0, len(said), CHUNK):
        with torch.no_grad():
            p, q = teacher_head(said[first : first + CHUNK]), student_head(saying[first : first + CHUNK])
        ours, whole = (
            gradient(each, q, p, next_ids[first : first + CHUNK], seed, first) for each in (method, Method("full"))
        )
        squares += torch.stack([(ours - whole).double().square().sum(), whole.double().square().sum()]).cpu()
        totals = [ours.double().sum(dim=0), whole.double().sum(dim=0)]
        sums = [old + new for old, new in zip(sums, totals, strict=True)] if sums else totals
        if first + CHUNK <= FIRST:
            at_first = angle(*sums)
    degrees = angle(*sums)
    return {"error": float(squares[0] / squares[1]), "degrees_2048": at_first, "degrees": degrees}


def gradient(method: Method, logits: Tensor, teacher_logits: Tensor, next_ids: Tensor, seed: int, first: int) -> Tensor:
    """[N, V]: of each row's loss with respect to the student's logits."""
    rows = as_read(rows_of(teacher_logits, method, next_ids, seed, first), next_ids)
    logits = logits.detach().clone().requires_grad_()
    losses(method, logits, rows, teacher_logits).sum().backward()
    assert logits.grad is not None
    return logits.grad


def angle(a: Tensor, b: Tensor) -> float:
    """Between two vectors, in degrees."""
    return math.degrees(
        math.atan2(float((a / a.norm() - b / b.norm()).norm()), float((a / a.norm() + b / b.norm()).norm())) * 2
    )
