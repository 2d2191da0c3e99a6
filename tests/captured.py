"""What a store would have of logits, before it is rounded."""

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.config.generate import CaptureConfig
from distill.teacher.capture import Captured
from distill.teacher.method import capture


def topk(logits: Tensor, k: int, temperatures: Sequence[float], next_ids: Tensor) -> Captured:
    """The k most probable ids of each of N rows: logits [N, V], overwritten; next_ids [N]."""
    found = capture(logits, CaptureConfig("topk", k, list(temperatures)), next_ids, torch.zeros(len(logits)))
    assert found is not None
    return found


def sample(logits: Tensor, k: int, u: Tensor, next_ids: Tensor | None = None) -> Captured:
    """At most k ids of each of N rows, some of them drawn: logits [N, V], overwritten; u [N] float64."""
    following = torch.full((len(logits),), -1) if next_ids is None else next_ids
    found = capture(logits, CaptureConfig("sample", k), following, u)
    assert found is not None
    return found


def weights(found: Captured) -> Tensor:
    """The weight of each id, [N, K] float64: its probability, or an equal part of what was sampled; 0 without an id."""
    drawn = (found.target_ids >= 0) & found.target_logprobs.isnan()
    part = found.tail_logprob.double().exp() / drawn.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(drawn, part, found.target_logprobs.double().exp().nan_to_num(0))
