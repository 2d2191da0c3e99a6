"""Whether a language model is causal, and at which lengths it changes: asked of its configuration, and of the model.

N rows (token positions), V vocabulary.

A row of the store is the distribution of the next token given those before. That holds only for a causal model, in
which no logit depends on later tokens. `sees_later` compares the logits of the same rows before and after the tokens
behind them are changed. Both batches have the same shape, so that a causal model differs by noise alone: most do not at
all; a mixture of experts does by rounding, and in rows that then take other experts.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Samples = Sequence[NDArray[np.int32]]
"""Token ids, [T_i] each."""

_EDGES = (
    "sliding_window",
    "sliding_window_size",
    "window_size",
    "attention_window_size",
    "attention_chunk_size",
    "local_attention",
    "floor_scale",  # Llama 4 begins to scale its queries
)
_SHORT = 12
_MASKED = -1e30
_BEYOND = 17  # so many tokens past an edge there are rows that it could change, and later tokens


def rope_switch(config: Any) -> int | None:
    """The length beyond which a model's rotary frequencies depend on the length of its input; None where they do not.

    config: of the language model. For all rows of a batch, LongRoPE takes the factors, and dynamic NTK scaling the
    frequencies, that belong to its longest sample. So that each sample is what it is alone, a longer one is batched
    with samples of its own length only.
    """
    found = [
        rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if rope["rope_type"] == "longrope"
        else config.max_position_embeddings
        for rope in _ropes(config)
        if rope["rope_type"] in ("longrope", "dynamic")
    ]
    return min(found, default=None)


def edges(config: Any) -> list[int]:
    """The lengths at which a model's attention or its positions begin to work in another way, ascending."""
    found = [getattr(config, name, None) for name in _EDGES]
    found += [rope.get("original_max_position_embeddings") for rope in _ropes(config)] + [rope_switch(config)]
    return sorted({int(edge) for edge in found if isinstance(edge, int) and edge > 0})


def probe_lengths(config: Any, longest: int, max_tokens: int) -> list[list[int]]:
    """The batches to look at, as the lengths of their samples, for data whose longest sample has `longest` tokens.

    The first is short, and of mixed lengths. Where samples reach beyond an edge there is a second, just longer than the
    last such edge: of two samples if those are no more than `max_tokens`.
    """
    context, switch = getattr(config, "max_position_embeddings", None) or -1, rope_switch(config) or _SHORT
    short = max(2, min(_SHORT, context if context > 0 else _SHORT, switch))
    batches = [[short, max(2, short - 4), max(2, short // 4)]]
    if passed := [edge for edge in edges(config) if short < edge + 1 < longest]:
        length = min(longest, passed[-1] + _BEYOND)
        other = length if rope_switch(config) is not None else length - 5
        batches.append([length, other] if 2 * length <= max_tokens else [length])
    return batches


def probe(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[NDArray[np.int32]]:
    """Random samples of these lengths."""
    rng = np.random.Generator(np.random.PCG64(seed))
    return [rng.integers(0, vocab_size, length).astype(np.int32) for length in lengths]


def sees_later(
    logits_of: Callable[[Samples, list[int]], Tensor | None], samples: Samples, vocab_size: int, rounding: float
) -> float:
    """How much the last row before the change moves, relative to the spread of its logits; 0 for a causal model.

    logits_of: the logits [n, V] of some rows of some samples (numbered through all of them); None on a worker without.
    rounding:  what no model is blamed for, relative to the spread.
    Every other sample is changed, behind a row that any leak reaches. That row has to move twice as far as any row that
    can only move by noise: rows of the other samples, or where there is one sample, the first rows of it.
    """
    changed: list[NDArray[np.int32]] = []
    noise: list[int] = []
    last: list[int] = []
    at = 0
    for number, sample in enumerate(samples):
        cut = max(1, len(sample) - max(1, min(20, len(sample) // 3)))
        if number % 2:
            changed.append(sample)
            noise += np.linspace(at, at + len(sample) - 1, min(64, len(sample))).astype(int).tolist()
        else:
            changed.append(np.concatenate([sample[:cut], (sample[cut:] + 1 + vocab_size // 3) % vocab_size]))
            last.append(at + cut - 1)
        at += len(sample)
    noise = noise or list(range(min(64, last[0] // 4)))
    before, after = (logits_of(batch, noise + last) for batch in (samples, changed))
    if before is None or after is None:
        return 0.0
    moves = _moves(before.float(), after.float())
    by_noise = float(moves[: len(noise)].max()) if noise else 0.0
    moved = float(moves[len(noise) :].median())
    return moved if moved > 2 * by_noise + rounding else 0.0


def _moves(before: Tensor, after: Tensor) -> Tensor:
    """How much each row of logits [n, V] moves, relative to its spread, [n]; infinitely where other ids are masked."""
    known = before > _MASKED
    middle = torch.where(known, before, 0).sum(dim=1, keepdim=True) / known.sum(dim=1, keepdim=True).clamp(min=1)
    moved = torch.where(known, after - before, 0).norm(dim=1)
    spread = torch.where(known, before - middle, 0).norm(dim=1).clamp(min=1e-6)
    return torch.where((known == (after > _MASKED)).all(dim=1), moved / spread, torch.inf)


def relative_difference(expected: Tensor, found: Tensor) -> float:
    """The largest difference between logits [N, V], relative to the largest logit.

    Masked ids, -inf or the least number of some dtype, have to be the same.
    """
    known = expected > _MASKED
    if not torch.equal(known, found > _MASKED) or not known.any():
        return float("inf") if known.any() or (found > _MASKED).any() else 0.0
    largest = expected[known].abs().max().clamp(min=1e-6)
    return float((expected - found)[known].abs().max() / largest)


def forget_lengths(model: Any) -> None:
    """Make dynamic NTK scaling begin anew: it keeps the frequencies of the longest input that it has seen."""
    for part in model.modules():
        if "dynamic" in str(getattr(part, "rope_type", "")):
            for name in [name for name in vars(part) if name.endswith("max_seq_len_cached")]:
                setattr(part, name, 0)


def _ropes(config: Any) -> Iterator[dict[str, Any]]:
    """The settings of rotary embeddings: one for the model, or one for each type of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    for rope in (found, *found.values()):
        if isinstance(rope, dict) and isinstance(rope.get("rope_type"), str):
            yield rope
