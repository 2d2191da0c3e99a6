"""How well a student predicts held-out samples, compared with the text and with the teacher.

N rows, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill.reading.cache import TeacherCache
from distill.reading.samples import collate, empty_sample
from distill.student.divergence import LEAST_LOGPROB, log_softmax_at
from distill.student.loss import DistillationLoss, are_drawn

BINS = 15
"""Bins of confidence of the calibration error (Guo et al., On Calibration of Modern Neural Networks, 2017)."""

_TO_TEACHER = DistillationLoss("forward_kl", "bucket", temperature=1.0, alpha=1.0)
_TO_KEPT = DistillationLoss("forward_kl", "renormalize", temperature=1.0, alpha=1.0)


@torch.no_grad()
def evaluate(
    learner: nn.Module, cache: TeacherCache, batch_size: int, device: torch.device, on_policy: bool = False
) -> dict[str, float]:
    """Means over all next tokens of `cache`. Each worker does a part of them.

    on_policy: the tokens are a student's own, and the store has next_logprob: the last three figures are wanted too

    tokens             how many there were
    cross_entropy      -log q of the token that follows, nats
    kl                 KL(teacher || student) over the kept ids and the rest as one event, nats; ids that a store has
                       drawn belong to the rest. Where nobody says how likely the rest is, as if it were nothing
    top1_agreement     share of tokens for which both find the same id most probable
    calibration_error  expected |confidence - accuracy| of the most probable token, over 15 bins of confidence
    log_ratio          log q - log p of the token y that follows, nats: minus the mean advantage
    reverse_kl         p/q - 1 - log(p/q) of y, nats: k3 of Schulman, Approximating KL Divergence; never negative, and
                       in the mean KL(student || teacher) where this very student wrote the tokens
    entropy            of the student, nats
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = -(-len(cache) // world_size)
    mine = range(rank * share, min(len(cache), (rank + 1) * share))
    nothing = empty_sample(cache.attributes["k"], len(cache.temperatures))
    sums = torch.zeros(4 + 3 * BINS + 3 * on_policy, dtype=torch.float64, device=device)

    def measure(logits: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        found = measured(logits, rows, cache.temperatures)
        return torch.cat([found, measured_on_policy(logits, rows)]) if on_policy else found

    training = learner.training
    learner.eval()
    for first in range(0, share, batch_size):  # every worker the same number of times: the student may be sharded
        numbers = mine[first : first + batch_size]
        batch = collate([cache[i] for i in numbers] or [nothing])
        sums += learner({name: values.to(device) for name, values in batch.items()}, measure)
    learner.train(training)
    dist.all_reduce(sums)
    return summarize(sums)


def measured(logits: Tensor, rows: Mapping[str, Tensor], temperatures: list[float]) -> Tensor:
    """Sums over rows of what `summarize` divides, [4 + 3 * BINS] float64: logits [N, V], rows of a batch [N, ...]."""
    following = rows["next_tokens"]
    confidence, guess = logits.softmax(dim=1).max(dim=1)
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    per_bin = torch.zeros(3, BINS, dtype=torch.float64, device=logits.device)
    for i, values in enumerate((confidence, guess == following, torch.ones_like(confidence))):
        per_bin[i].index_add_(0, bins, values.double())
    whole = [
        torch.tensor(len(following), device=logits.device),
        torch.nn.functional.cross_entropy(logits, following, ignore_index=-1, reduction="sum"),
        divergences(logits, rows, temperatures).sum(),
        (guess == rows["target_ids"][:, 0]).sum(),
    ]
    return torch.cat([torch.stack([value.double() for value in whole]), per_bin.flatten()])


def divergences(logits: Tensor, rows: Mapping[str, Tensor], temperatures: list[float]) -> Tensor:
    """[N] nats: what `kl` of `evaluate` is the mean of."""
    loss = _TO_TEACHER if "tail_logprob" in rows else _TO_KEPT
    return loss.per_row(logits, _without_draws(rows), temperatures)


def measured_on_policy(logits: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
    """Sums over rows of log_ratio, reverse_kl and entropy, [3] float64."""
    following = rows["next_tokens"]
    own = log_softmax_at(logits, following.clamp(min=0)[:, None])[:, 0]
    ratio = torch.where(following >= 0, own - rows["next_logprob"].clamp(min=LEAST_LOGPROB), 0.0).double()
    entropy = torch.special.entr(logits.softmax(dim=1)).sum(dim=1)
    return torch.stack([ratio.sum(), (torch.expm1(-ratio) + ratio).sum(), entropy.double().sum()])


def _without_draws(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows of a batch without drawn ids: their weights say what the teacher does in the mean, not how KL is."""
    ids, logprobs = rows["target_ids"], rows["target_logprobs"]
    none = (ids < 0) | are_drawn(ids, logprobs)
    ids, logprobs = torch.where(none, ids[:, :1], ids), logprobs.masked_fill(none, -torch.inf)
    if none[:, -1].all():  # of a store of samples: K columns would be all ids where there are no more
        ids, logprobs = ids[:, :-1], logprobs[:, :-1]
    return {**rows, "target_ids": ids, "target_logprobs": logprobs}


def summarize(sums: Tensor) -> dict[str, Any]:
    """The figures of `evaluate`, from the sums over all rows."""
    tokens = max(1.0, sums[0].item())
    confidence, correct, _ = sums[4 : 4 + 3 * BINS].view(3, BINS)
    found = {
        "tokens": int(sums[0]),
        "cross_entropy": sums[1].item() / tokens,
        "kl": sums[2].item() / tokens,
        "top1_agreement": sums[3].item() / tokens,
        "calibration_error": (confidence - correct).abs().sum().item() / tokens,
    }
    names = ("log_ratio", "reverse_kl", "entropy")
    return found | {name: float(value) / tokens for name, value in zip(names, sums[4 + 3 * BINS :], strict=False)}
