"""Packing: several samples end to end in one row, so that no computation is spent on padding.

A packed batch is made at the model's call and nowhere else, since only that call makes it right: from position_ids,
without an attention mask and without a cache, transformers finds where samples begin. Batches that users get are
padded, which is right in every call.

B samples of up to T tokens; R rows of L tokens.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def wants_one_row(model: Any) -> bool:
    """Whether this model's attention kernel tells samples apart only in a batch of one row, as FlashAttention does."""
    return "flash" in (getattr(model.config.get_text_config(), "_attn_implementation", None) or "")


def pack(batch: Mapping[str, Tensor], one_row: bool) -> dict[str, Tensor]:
    """A padded batch [B, T, ...] as [R, L, ...], with position_ids [R, L] that begin at 0 again for each sample.

    What follows a sample's last position in the loss_mask is left out. one_row: R = 1, and there is no padding;
    otherwise L is the longest sample, since dense attention over one row of all tokens would cost R times as much.
    Padding has positions from 0, as if it were one more sample; nothing is learned from it.
    """
    mask = batch["loss_mask"]
    width = mask.shape[1]
    ends = (mask * torch.arange(1, width + 1, device=mask.device)).amax(dim=1)
    lengths = ends.clamp(min=1).tolist()
    rows = [list(range(len(lengths)))] if one_row else _first_fit(lengths)
    columns = max(sum(lengths[i] for i in row) for row in rows)
    source = torch.zeros((len(rows), columns), dtype=torch.long)  # where in the padded batch each token was
    positions, real = source.clone(), torch.zeros_like(source, dtype=torch.bool)
    for row, members in enumerate(rows):
        start = 0
        for i in members:
            stop = start + lengths[i]
            source[row, start:stop] = torch.arange(i * width, i * width + lengths[i])
            positions[row, start:stop] = torch.arange(lengths[i])
            real[row, start:stop] = True
            start = stop
        positions[row, start:] = torch.arange(columns - start)
    source = source.to(mask.device)
    packed = {name: values.flatten(0, 1)[source] for name, values in batch.items() if values.shape[:2] == mask.shape}
    packed["loss_mask"] = packed["loss_mask"] & real.to(mask.device)
    return packed | {"position_ids": positions.to(mask.device)}


def _first_fit(lengths: Sequence[int]) -> list[list[int]]:
    """The samples of each row: the longest first, each into the first row with room (first-fit decreasing)."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row, left in enumerate(room) if left >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max(lengths))
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients; afterwards each part of `model` is again in the mode that it was in."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def sees_neighbours(states: Callable[[Tensor, Tensor], Tensor], shape: torch.Size, one_row: bool, vocab: int) -> bool:
    """Whether what a model says of a sample depends on the samples before and after it in its row.

    states: from input_ids and position_ids [R, L] to hidden states or logits [R, L, ...], as training runs the model.
    shape: [R, L] of a packed batch; the trial has at least two rows, unless one_row, and three samples in each.
    """
    rows, columns = 1 if one_row else max(2, shape[0]), max(12, shape[1])
    length = -(-columns // 3)
    at = torch.arange(columns)
    positions, middle = (at % length).expand(rows, columns), at // length == 1
    ids = (torch.arange(rows * columns).view(rows, columns) * 7 + 3) % vocab
    others = torch.where(middle, ids, (ids + 1) % vocab)
    try:
        a, b = (states(tokens, positions)[:, middle] for tokens in (ids, others))
    except (TypeError, ValueError):  # it does not take position_ids
        return True
    device = a.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else a.dtype
    tolerance = max(1e-4, torch.finfo(dtype).eps)  # experts work on other groups of tokens, and round differently
    return not torch.allclose(a.float(), b.float(), rtol=0, atol=tolerance * float(a.abs().max()))
