"""From tokens to float32 logits of real tokens, slice by slice, for any causal LM of transformers.

B batch, T positions (padded), N real tokens of a batch, H hidden size, V vocabulary.

The backbone sees right-padded ids [B, T] without a mask: attention is causal, so that padding cannot reach a real
token. Its hidden states, padding dropped, [N, H], go through the head in slices. The head is the model's own
``forward`` with the backbone replaced by those hidden states, so that whatever a model does to its logits
(soft-capping, scaling) is done; only the matrix product itself is ours, since it must give float32: bfloat16 logits
of 16 to 32 are 0.125 apart. All this is checked against the plain model when it is loaded.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distill.errors import TeacherError, first_line
from distill.teacher.source import Source

logger = logging.getLogger(__name__)

_SLICE_LOGITS_CPU = 256 * 1024 * 1024 // 4  # about 256 MiB of float32 logits at a time
_SLICE_LOGITS_GPU = 1024 * 1024 * 1024 // 4
_FEWEST_SLICE_TOKENS = 256


def resolve_dtype(source: Source, device: torch.device) -> torch.dtype:
    """The dtype of the weights: as configured, or bfloat16 on a GPU and the checkpoint's elsewhere."""
    if source.config.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[source.config.dtype]
    if device.type == "cuda":
        return torch.bfloat16
    return getattr(source.text_config, "dtype", None) or getattr(source.model_config, "dtype", None) or torch.float32


class Teacher:
    """A causal language model on one device."""

    def __init__(self, model: Any, device: torch.device) -> None:
        """Take over `model`, a transformers causal LM in eval mode on `device`, and check that our head is its own."""
        self.device = device
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        budget = _SLICE_LOGITS_CPU if device.type == "cpu" else _SLICE_LOGITS_GPU
        self._slice_tokens = max(_FEWEST_SLICE_TOKENS, budget // self.vocab_size)
        self._model = model
        self._sliced = self._split()

    @classmethod
    def load(cls, source: Source, device: torch.device, dtype: torch.dtype) -> "Teacher":
        """Load the weights at `dtype` onto `device`. Raises TeacherError where transformers cannot."""
        from transformers import AutoModelForCausalLM

        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                source.folder,
                dtype=dtype,
                trust_remote_code=source.config.trust_remote_code,
                attn_implementation=source.config.attn_implementation,
                output_loading_info=True,
            )
        except Exception as error:
            raise TeacherError(f"teacher.model: cannot load {source.folder}: {first_line(error)}") from error
        if missing := sorted(info["missing_keys"]):
            raise TeacherError(
                f"teacher.model: expected all weights in {source.folder}, found {len(missing)} missing ({missing[0]})"
            )
        try:
            return cls(model.eval().to(device), device)
        except torch.OutOfMemoryError as error:
            raise TeacherError(f"teacher.model: {source.folder} does not fit into the memory of {device}") from error

    @torch.inference_mode()
    def logits(self, samples: Sequence[NDArray[np.int32]]) -> Iterator[Tensor]:
        """Float32 logits [n, V] of every token of the samples, sample after sample, a slice at a time.

        samples: token ids, [T_i] each, together one batch. A slice is the caller's to overwrite until the next is
        taken, which may lie in the same memory.
        """
        if not self._sliced:
            for sample in samples:
                yield from torch.split(self._plain(sample), self._slice_tokens)
            return
        for hidden in torch.split(self._hidden(samples), self._slice_tokens):  # [n, H]
            yield self._head(hidden)

    def _hidden(self, samples: Sequence[NDArray[np.int32]]) -> Tensor:
        """Last hidden states of the real tokens, [N, H]."""
        ids, real = _pad(samples, self.device)
        self._output = self._backbone(input_ids=ids, use_cache=False)
        hidden: Tensor = self._output.last_hidden_state  # [B, T, H]
        return hidden[real]

    def _head(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, H] to float32 logits [n, V], by the model's own forward around them."""
        self._replay.output = copy.copy(self._output)
        self._replay.output.last_hidden_state = hidden[None]
        ids = torch.zeros((1, len(hidden)), dtype=torch.long, device=self.device)
        logits: Tensor = self._model(input_ids=ids, use_cache=False).logits[0].float()
        return logits

    def _plain(self, sample: NDArray[np.int32]) -> Tensor:
        """The model's own logits of one sample alone, [T, V] in float32."""
        ids = torch.from_numpy(sample.astype(np.int64))[None].to(self.device)
        logits: Tensor = self._model(input_ids=ids, use_cache=False).logits[0].float()
        return logits

    @torch.inference_mode()
    def _split(self) -> bool:
        """Put our head in place and compare it with the plain model; where they differ, undo it.

        On one padded batch the two must agree closely, and padding may not matter more than other batch shapes do.
        """
        model, head = self._model, self._model.get_output_embeddings()
        rng = np.random.Generator(np.random.PCG64(0))
        samples = [rng.integers(0, self.vocab_size, length).astype(np.int32) for length in (9, 5)]
        self._backbone, self._replay = model.base_model, _Replay()
        if self._backbone is model or not isinstance(head, nn.Linear):
            return self._fall_back("it has no backbone and linear head to take apart")
        exact = head.weight.dtype == torch.float32
        ids, real = _pad(samples, self.device)
        padded = model(input_ids=ids, use_cache=False).logits[real].float()  # [N, V]
        alone = torch.cat([self._plain(sample) for sample in samples])  # [N, V]
        if _relative_difference(alone, padded) > (1e-3 if exact else 0.25):
            return self._fall_back("padding on the right changes its logits")
        setattr(model, model.base_model_prefix, self._replay)
        model.set_output_embeddings(_Float32Head(head))
        try:
            found = torch.cat([self._head(hidden).clone() for hidden in torch.split(self._hidden(samples), 4)])
            difference = _relative_difference(padded, found)
            if difference <= (1e-3 if exact else 0.02):
                return True
            reason = f"taken apart, its logits differ by {difference:.2g} of the largest"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a forward that wants more of its backbone than hidden states may raise anything
            reason = f"its forward does not run on hidden states ({type(error).__name__}: {error})"
        setattr(model, model.base_model_prefix, self._backbone)
        model.set_output_embeddings(head)
        return self._fall_back(reason)

    def _fall_back(self, reason: str) -> bool:
        logger.warning("teacher: one sample at a time, with whole forward passes, which is slower: %s", reason)
        return False


def _pad(samples: Sequence[NDArray[np.int32]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [B, T] int64, padded on the right, and which of them are real, [B, T] bool."""
    lengths = np.array([len(sample) for sample in samples])
    real = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(real.shape, np.int64)  # any id serves as padding
    ids[real] = np.concatenate(samples)
    return torch.from_numpy(ids).to(device), torch.from_numpy(real).to(device)


def _relative_difference(expected: Tensor, found: Tensor) -> float:
    """The largest difference of logits [N, V], relative to the largest logit."""
    if not torch.equal(expected.isfinite(), found.isfinite()):
        return float("inf")
    finite = expected.isfinite()
    return (
        ((expected - found)[finite].abs().max() / expected[finite].abs().max().clamp(min=1e-6)).item()
        if finite.any()
        else 0.0
    )


class _Replay(nn.Module):
    """Stands where the backbone was, and returns the output it was given."""

    output: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


class _Float32Head(nn.Module):
    """The output head with float32 results, whatever the dtype of its weight."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias
        on_gpu = head.weight.device.type == "cuda"
        self._mixed = on_gpu and head.weight.dtype != torch.float32
        self._weight32 = head.weight if on_gpu else head.weight.float()  # CPU matmuls have no mixed precision: a copy
        # Reused on a CPU, where the fresh pages of a new tensor cost up to a tenth of the product.
        self._buffer = None if on_gpu else torch.empty(0, head.weight.shape[0])

    def forward(self, hidden: Tensor) -> Tensor:
        """[1, n, H] -> [1, n, V] float32."""
        if self._mixed:
            logits = torch.mm(hidden[0].to(self.weight.dtype), self.weight.t(), out_dtype=torch.float32)
        elif self._buffer is None:
            logits = torch.mm(hidden[0].float(), self._weight32.t())
        else:
            if len(self._buffer) < hidden.shape[1]:
                self._buffer = hidden.new_empty(hidden.shape[1], len(self.weight), dtype=torch.float32)
            logits = torch.mm(hidden[0].float(), self._weight32.t(), out=self._buffer[: hidden.shape[1]])
        return (logits if self.bias is None else logits.add_(self.bias.float()))[None]
