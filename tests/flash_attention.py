"""transformers' own flash_attention_2 path on a CPU.

The two kernels of the flash-attn package, which needs a GPU, are replaced by plain PyTorch of the same contract. What
is around them is transformers': it takes the variable-length kernel only for a batch of one row.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import transformers.modeling_flash_attention_utils as flash
from torch import Tensor
from transformers import PreTrainedModel

_called: list[str] = []


@contextmanager
def flash_attention() -> Iterator[list[str]]:
    """Models built inside may have attn_implementation="flash_attention_2"; yields the kernels that were called."""
    _called.clear()
    with (
        mock.patch.object(flash, "_lazy_imports", lambda *_, **__: _KERNELS),  # transformers keeps what it first found
        mock.patch.object(PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True),
    ):
        yield _called


def _dense(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    _called.append("dense")
    return torch.stack([_attend(*parts, **options) for parts in zip(q, k, v, strict=True)])


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any) -> Tensor:
    _called.append("varlen")
    assert cu_seqlens_q.equal(cu_seqlens_k)
    lengths = cu_seqlens_q.diff().tolist()
    parts = zip(*(states.split(lengths) for states in (q, k, v)), strict=True)
    return torch.cat([_attend(*part, **options) for part in parts])


_KERNELS = (_dense, _varlen, None, flash._pad_input, flash._unpad_input)


def _attend(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False,
            window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, **_: Any) -> Tensor:  # fmt: skip
    """Causal attention within one sample: q [T, heads, D], k and v [T, key-value heads, D] -> [T, heads, D]."""
    assert causal
    k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (softmax_scale or 1 / math.sqrt(q.shape[-1]))
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
    far = distance > window_size[0] if window_size[0] >= 0 else distance < 0
    return torch.einsum("hqk,khd->qhd", scores.masked_fill((distance < 0) | far, -torch.inf).softmax(dim=2), v)
