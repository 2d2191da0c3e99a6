"""Divergences between what a teacher and a student say of each row, with gradients written out.

N rows, V the student's vocabulary, M ids of a target.

Forward KL is KL(p || q): Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015. Reverse KL is
KL(q || p): Gu et al., MiniLLM, 2024. Jensen-Shannon is the mean of both to the mixture: Agarwal et al., On-Policy
Distillation, 2024, with beta = 0.5. on_policy is an estimate of reverse KL from one token: Wu, Han, Cai, Lightning OPD,
2026.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LEAST_LOGPROB = -100.0
"""What a log-probability of the teacher counts as at least, where the student says a token that it does not."""

_LEAST_MASS = 1e-30  # of the rest: a gradient is divided by it


@dataclass(frozen=True)
class Target:
    """A teacher's distribution over some ids, in float32.

    ids:      [N, M] int64; an id may occur twice, and its probabilities are added
    logprobs: [N, M]; -inf where an id has no mass
    tail:     [N], log of the mass of all other ids; None where the given ids have all of the mass
    none:     [N, M], places that hold no id: they repeat one, without mass, and are no event of the student's either;
              None where each holds one
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tensor | None = None
    none: Tensor | None = None


def forward_kl(logits: Tensor, target: Target) -> Tensor:
    """[N]: sum over events of p (log p - log q), for logits [N, V] in float32."""
    logprobs, q = _events(logits, target)
    return _expected(logprobs, logprobs - q)


def reverse_kl(logits: Tensor, target: Target) -> Tensor:
    """[N]: sum over events of q (log q - log p). A p below e**-100 counts as that."""
    logprobs, q = _events(logits, target)
    return _expected(q, q - logprobs.clamp(min=LEAST_LOGPROB))


def jensen_shannon(logits: Tensor, target: Target) -> Tensor:
    """[N]: (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2."""
    logprobs, q = _events(logits, target)
    neither = (logprobs == -torch.inf) & (q == -torch.inf)  # logaddexp has no gradient there
    mixture = torch.logaddexp(logprobs.masked_fill(neither, 0.0), q.masked_fill(neither, 0.0)) - math.log(2)
    return (_expected(logprobs, logprobs - mixture) + _expected(q, q - mixture)) / 2


def on_policy(
    own: Tensor, teachers: Tensor, sampled: Tensor | None, max_advantage: float | None, max_ratio: float | None
) -> Tensor:
    """[N]: 1/2 (log q - log p)**2 of the token y that the student wrote, k2 of Schulman, Approximating KL Divergence.

    own, teachers, sampled: [N], log q(y), log p(y), and log mu(y) of the distribution mu that y was drawn from. A p
    below e**-100 counts as that. A y that the student never says adds nothing, and no gradient, as in `reverse_kl`.

    Its gradient is -A grad log q(y) with the advantage A = log p(y) - log q(y) (Lightning OPD): over y drawn from q, in
    the mean that of KL(q || p).
    max_advantage: A is cut to [-max_advantage, max_advantage], by the loss of Huber, Robust Estimation of a Location
    Parameter, 1964.
    max_ratio: each row weighs min(q(y) / mu(y), max_ratio), a constant for the gradient (Ionides, Truncated Importance
    Sampling, 2008). Over y drawn from mu the mean is then that over q, but for what the bound takes away.
    """
    never = own == -torch.inf
    own = own.masked_fill(never, 0.0)
    difference = own - teachers.clamp(min=LEAST_LOGPROB)
    found = difference.square() / 2
    if max_advantage is not None:
        size = difference.abs()
        found = torch.where(size <= max_advantage, found, max_advantage * (size - max_advantage / 2))
    if max_ratio is not None:
        assert sampled is not None
        found = found * (own.detach() - sampled).exp().clamp(max=max_ratio)
    return found.masked_fill(never, 0.0)


def _events(logits: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """log p and log q of the target's events: [N, M], or [N, M + 1] with the tail's bucket as the last."""
    if target.tail is None:
        return target.logprobs, log_softmax_at(logits, target.ids)
    none = target.none if target.none is not None else torch.zeros_like(target.ids, dtype=torch.bool)
    if target.ids.shape[1] == logits.shape[1] and not none.any():  # there are no other ids
        return target.logprobs, log_softmax_at(logits, target.ids)
    q = _event_logprobs(logits, target.ids, True)
    q = q.masked_fill(nn.functional.pad(none, (0, 1)), -torch.inf)
    return torch.cat([target.logprobs, target.tail[:, None]], dim=1), q


def log_softmax_at(logits: Tensor, ids: Tensor) -> Tensor:
    """log q of some ids only: logits [N, V] float32, ids [N, M] -> [N, M]."""
    return _event_logprobs(logits, ids, False)


class _EventLogprobs(torch.autograd.Function):
    """log_softmax at M ids, and of all other ids together, in four passes over [N, V]; autograd needs a dozen.

    z are the logits, q = softmax(z), r is the mass of the ids outside the M, g is the gradient of the M (+ 1) results:
    dz_j = -q_j sum(g) + [j among the M] g_j + [j outside] g_rest q_j / r.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, with_rest: bool) -> Tensor:
        """[N, V] float32, [N, M] -> [N, M], or [N, M + 1] with the rest. An id may occur twice in a row."""
        largest = logits.max(dim=1, keepdim=True).values
        kept = logits.gather(1, ids) - largest
        powers = (logits - largest).exp_()
        rest = total = powers.sum(dim=1, keepdim=True)
        if with_rest:
            powers.scatter_(1, ids, 0.0)
            rest = powers.sum(dim=1, keepdim=True).clamp_(min=_LEAST_MASS)
        logprobs = kept - total.log()
        ctx.save_for_backward(powers, ids, logprobs, rest, total)
        ctx.with_rest = with_rest
        return torch.cat([logprobs, rest.log() - total.log()], dim=1) if with_rest else logprobs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The formula above. It overwrites what was kept: there can be no second backward pass."""
        (gradient,) = gradients
        powers, ids, logprobs, rest, total = ctx.saved_tensors
        whole = gradient.sum(dim=1, keepdim=True)
        if ctx.with_rest:
            powers.mul_(gradient[:, -1:] / rest - whole / total).scatter_(1, ids, -whole * logprobs.exp())
        else:
            powers.mul_(-whole / total)
        return powers.scatter_add_(1, ids, gradient[:, : ids.shape[1]]), None, None


def _event_logprobs(logits: Tensor, ids: Tensor, with_rest: bool) -> Tensor:
    logprobs: Tensor = _EventLogprobs.apply(logits, ids, with_rest)  # type: ignore[no-untyped-call]
    return logprobs


def _expected(logprobs: Tensor, values: Tensor) -> Tensor:
    """[N]: sum over events of exp(logprobs) * values; events of probability 0 add nothing, and no gradient.

    They are taken out before they are multiplied: of 0 * -inf a mask would hide the value, not the gradient.
    """
    none = logprobs == -torch.inf
    return (logprobs.masked_fill(none, 0.0).exp() * values.masked_fill(none, 0.0)).sum(dim=1)
