"""One token after the other, each drawn by one number.

The number u of a token follows from the seed, its prompt, its rollout and its position alone. The token is the first
whose cumulative probability is above u. So a rollout does not depend on those beside it, nor on who writes it, but for
the rounding of the model's logits.

B rollouts of a batch, V vocabulary, n tokens at most.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor

_BELOW_ONE = 1 - 1e-12


def uniforms(seed: int, prompt: int, sample: int, count: int) -> NDArray[np.float64]:
    """The numbers u in [0, 1) of the first `count` tokens of a rollout, [count]."""
    sequence = np.random.SeedSequence(seed, spawn_key=(prompt, sample))
    return np.random.Generator(np.random.PCG64(sequence)).random(count)


def log_distribution(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """The logarithms of what is sampled from, [B, V] float32, of float32 logits.

    top_p: of the ids by descending probability, ties by lowest id, those are kept whose predecessors have less of it.
    """
    found = (logits / temperature).log_softmax(dim=1)
    if top_p < 1:
        falling, order = found.sort(dim=1, descending=True, stable=True)
        powers = falling.double().exp()
        falling.masked_fill_(powers.cumsum(dim=1) - powers >= top_p, -torch.inf)
        found = torch.empty_like(found).scatter_(1, order, falling).log_softmax(dim=1)
    return found


def draw(logprobs: Tensor, u: Tensor) -> Tensor:
    """The ids [B] int64 where the cumulative probabilities of [B, V] pass u, [B] float64. None has probability 0."""
    ends = logprobs.double().exp().cumsum(dim=1)
    at = (u[:, None] * ends[:, -1:]).minimum(ends[:, -1:] * _BELOW_ONE)
    return torch.searchsorted(ends, at, right=True)[:, 0].clamp(max=logprobs.shape[1] - 1)


class Draws(LogitsProcessor):  # type: ignore[misc]
    """Draws the next token of each rollout of a batch: leaves its id with score 0 and every other with -inf.

    logprobs: [B, n] float32, of the drawn ids; those after a rollout's end mean nothing
    """

    def __init__(
        self, u: Tensor, impossible: Tensor | None, temperature: float, top_p: float, stops: Tensor,
        heard: Callable[[int, int], None],
    ) -> None:  # fmt: skip
        """u: [B, n] float64. impossible: [V], ids never to be drawn. stops: ids that end a rollout.

        heard: told after each step how many tokens were written, and how many rollouts have ended.
        """
        self._u, self._impossible, self._temperature, self._top_p = u, impossible, temperature, top_p
        self._stops, self._heard, self._step = stops, heard, 0
        self._open = torch.ones(len(u), dtype=torch.bool, device=u.device)
        self.logprobs = torch.zeros(u.shape, dtype=torch.float32, device=u.device)

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        """scores: [B, V] logits."""
        scores = scores.float()
        if self._impossible is not None:
            scores = scores.masked_fill(self._impossible, -torch.inf)
        logprobs = log_distribution(scores, self._temperature, self._top_p)
        drawn = draw(logprobs, self._u[:, self._step])[:, None]
        self.logprobs[:, self._step] = logprobs.gather(1, drawn)[:, 0]
        ended = self._open & torch.isin(drawn[:, 0], self._stops)
        written, over = torch.stack([self._open.sum(), ended.sum()]).tolist()
        self._heard(written, over)
        self._open &= ~ended
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)
