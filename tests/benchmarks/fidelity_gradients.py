"""The gradient of each method with respect to a student's logits, beside that of the teacher's whole distribution.

With g the gradient of a row's loss, [V]:

error     sum over rows of |g - g_full|^2 / sum over rows of |g_full|^2
degrees   the angle between the means of g and g_full over the rows, of the first 2,048 rows and of all of them
"""

import math
from collections.abc import Iterator, Sequence
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
    draws = [
        (method, seed) for method in METHODS if method.kind in ("draws", "varopt") for seed in range(settings.seeds)
    ]
    others = [(method, 0) for method in METHODS if method.kind in ("text", "topk")]
    found: dict[str, Any] = {}
    compared_all = compared([*others, *draws], teacher.lm_head, said, student.lm_head, saying, some.next_ids)
    for (method, _), figures in compared_all.items():
        found.setdefault(method.name, []).append(figures)
    for name, seeds in found.items():
        print(name, [{key: round(value, 4) for key, value in one.items()} for one in seeds], flush=True)
    yield {"figures": found}


def compared(
    ways: Sequence[tuple[Method, int]],
    teacher_head: Any,
    said: Tensor,
    student_head: Any,
    saying: Tensor,
    next_ids: Tensor,
) -> dict[tuple[Method, int], dict[str, float]]:
    """The figures of each (method, seed): hidden states [N, H] of teacher and student, next_ids [N]."""
    errors, at_first = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0)
    sums: dict[tuple[Method, int], Tensor] = {}
    square, total = 0.0, torch.zeros(())
    for first in range(0, len(said), CHUNK):
        following = next_ids[first : first + CHUNK].to(said.device)
        with torch.no_grad():
            p, q = teacher_head(said[first : first + CHUNK]), student_head(saying[first : first + CHUNK])
        whole = gradient(Method("full"), q, p, following, 0, first)
        square += float(whole.double().square().sum())
        total = total + whole.double().sum(dim=0)
        for method, seed in ways:
            ours = gradient(method, q, p, following, seed, first)
            sums[method, seed] = sums.get((method, seed), 0) + ours.double().sum(dim=0)
            errors[method, seed] += float((ours - whole).double().square().sum())
            if first + CHUNK <= FIRST:
                at_first[method, seed] = angle(sums[method, seed], total)
    return {
        way: {"error": errors[way] / square, "degrees_2048": at_first[way], "degrees": angle(sums[way], total)}
        for way in ways
    }


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
