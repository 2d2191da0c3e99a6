"""From tokens to float32 logits, slice by slice, for any causal LM of transformers.

B batch, T positions (padded), N real tokens of a batch, H hidden size, V vocabulary.

1. The backbone gets right-padded ids [B, T] without a mask. Attention is causal: padding cannot reach a real token.
2. Padding is dropped from its hidden states: [N, H] are left, which go through the output head in slices.
3. For each slice the model's own ``forward`` runs, with the backbone replaced by the slice. So everything that a model
   does to its logits (soft-capping, scaling) is done. Only the matrix product is ours, since it must give float32:
   neighbouring bfloat16 numbers between 16 and 32 differ by 0.125.

All this is compared with the plain model when it is loaded. `Share` knows how a model is spread over workers.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distill.teacher.capture import Captured, conclude, reduce
from distill.teacher.share import Share
from distill.teacher.source import Source

logger = logging.getLogger(__name__)

_FEWEST_SLICE_TOKENS = 256


def slice_bytes(device: torch.device) -> int:
    """About how many bytes of float32 logits are held at a time."""
    return (256 if device.type == "cpu" else 1024) << 20


def resolve_dtype(source: Source, device: torch.device) -> torch.dtype:
    """The dtype of the weights: as configured; with auto bfloat16 on a GPU, the checkpoint's elsewhere."""
    if source.config.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[source.config.dtype]
    if device.type == "cuda":
        return torch.bfloat16
    return getattr(source.text_config, "dtype", None) or getattr(source.model_config, "dtype", None) or torch.float32


class Teacher:
    """A causal language model, or this worker's share of one.

    device:   where it takes ids
    captures: whether its output is captured on this worker
    """

    def __init__(self, model: Any, device: torch.device, share: Share | None = None) -> None:
        """Take over `model`, a transformers causal LM in eval mode, and check our head against its own."""
        self.device = device
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self._slice_tokens = max(_FEWEST_SLICE_TOKENS, slice_bytes(device) // (4 * self.vocab_size))
        self._model, self._share = model, share or Share()
        self.captures = self._share.captures
        self._sliced = self._split()

    def capture(self, samples: Sequence[NDArray[np.int32]], k: int, temperatures: Sequence[float]) -> Captured | None:
        """What is kept of the distributions after every token of the samples, sample after sample, on the CPU.

        samples: token ids, [T_i] each, together one batch. All workers of a replica have to call this with the same
        batches; the result is None on those that do not capture.
        """
        following = np.concatenate([np.append(sample[1:], -1) for sample in samples]).astype(np.int64)  # [N]
        next_ids = torch.from_numpy(following).to(self.device)
        parts, at = [], 0
        for logits in self.logits(samples):  # [n, V]
            ids = next_ids[at : at + len(logits)].to(logits.device)
            shards = self._share.collect(reduce(logits, k, temperatures, ids, self._share.first_id), k)
            parts += [conclude(shards, k, temperatures)] if shards else []
            at += len(logits)
        return Captured.concatenate(parts) if parts else None

    def close(self) -> None:
        """Wait until the other workers of the replica have received everything from this one."""
        self._share.flush()

    @torch.inference_mode()
    def logits(self, samples: Sequence[NDArray[np.int32]]) -> Iterator[Tensor]:
        """Float32 logits [n, V] of every token of the samples, sample after sample, a slice at a time.

        With tensor parallelism: those of this worker's shard of the vocabulary, [n, W]. In a pipeline only the last
        stage has logits. The caller may overwrite a slice; the next slice may use the same memory.
        """
        if not self._sliced:
            for sample in samples:
                whole = self._plain(sample)
                yield from () if whole is None else torch.split(whole, self._slice_tokens)
            return
        hidden = self._hidden(samples)  # [N, H]
        for part in () if hidden is None else torch.split(hidden, self._slice_tokens):
            yield self._head(part)

    def _hidden(self, samples: Sequence[NDArray[np.int32]]) -> Tensor | None:
        """The last hidden states of the real tokens, [N, H]; None where another worker has them."""
        ids, real = _pad(samples, self.device)
        self._output = self._share.run(self._backbone, ids)
        if self._output is None:
            return None
        hidden: Tensor = self._output.last_hidden_state  # [B, T, H]
        return hidden[real.to(hidden.device)]

    def _head(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, H] to float32 logits [n, V], by the model's own forward around them."""
        self._replay.output = copy.copy(self._output)
        self._replay.output.last_hidden_state = hidden[None]
        ids = torch.zeros((1, len(hidden)), dtype=torch.long, device=self.device)
        logits: Tensor = self._model(input_ids=ids, use_cache=False).logits[0].float()
        return logits

    def _plain(self, *samples: NDArray[np.int32]) -> Tensor | None:
        """The plain model's logits for the samples in one padded batch, [N, V] float32; None as in `_hidden`."""
        ids, real = _pad(samples, self.device)
        output = self._share.run(self._model, ids)
        return None if output is None else output.logits[real.to(output.logits.device)].float()

    @torch.inference_mode()
    def _split(self) -> bool:
        """Put our head in place, compare it with the plain model, and undo it where they differ.

        On one padded batch both must agree closely, and padding may change the logits only as batch shapes do.
        All workers of a replica come to the same result.
        """
        model, head = self._model, self._model.get_output_embeddings()
        rng = np.random.Generator(np.random.PCG64(0))
        samples = [rng.integers(0, self.vocab_size, length).astype(np.int32) for length in (9, 5)]
        self._backbone, self._replay = model.base_model, _Replay()
        if not self._share.agree(
            self._backbone is not model and (not self._share.captures or isinstance(head, nn.Linear))
        ):
            return self._fall_back("it has no backbone and linear head to take apart")
        padded = self._plain(*samples)  # [N, V]
        alone = [self._plain(sample) for sample in samples]
        harmless = True
        if padded is not None:
            exact = head.weight.dtype == torch.float32
            together = torch.cat([part for part in alone if part is not None])
            harmless = _relative_difference(together, padded) <= (1e-3 if exact else 0.25)
        if not self._share.agree(harmless):
            return self._fall_back("padding on the right changes its logits")
        hidden = self._hidden(samples)
        reason = ""
        if hidden is not None and padded is not None:
            setattr(model, model.base_model_prefix, self._replay)
            model.set_output_embeddings(_Float32Head(head))
            try:
                found = torch.cat([self._head(part).clone() for part in torch.split(hidden, 4)])
                difference = _relative_difference(padded, found)
                if difference > (1e-3 if exact else 0.02):
                    reason = f"taken apart, its logits differ by {difference:.2g} of the largest"
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a forward that wants more than hidden states may raise anything
                reason = f"its forward does not run on hidden states ({type(error).__name__}: {error})"
        if self._share.agree(not reason):
            return True
        if hidden is not None:
            setattr(model, model.base_model_prefix, self._backbone)
            model.set_output_embeddings(head)
        return self._fall_back(reason or "another worker of this replica found so")

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
    """The largest difference between logits [N, V], relative to the largest logit."""
    if not torch.equal(expected.isfinite(), found.isfinite()):
        return float("inf")
    finite = expected.isfinite()
    return (
        ((expected - found)[finite].abs().max() / expected[finite].abs().max().clamp(min=1e-6)).item()
        if finite.any()
        else 0.0
    )


class _Replay(nn.Module):
    """Replaces the backbone, and returns the output that it was given."""

    output: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


class _Float32Head(nn.Module):
    """The output head, with float32 results for any dtype of its weight."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = _resident(head)
        on_gpu = self.weight.device.type == "cuda"
        self._mixed = on_gpu and self.weight.dtype != torch.float32
        self._weight32 = self.weight if on_gpu else self.weight.float()  # CPU products have no mixed precision: a copy
        # Reused on a CPU: there the new memory pages of a new tensor cost up to a tenth of the product's time.
        self._buffer = None if on_gpu else torch.empty(0, len(self.weight))

    def forward(self, hidden: Tensor) -> Tensor:
        """[1, n, H] -> [1, n, V] float32."""
        hidden = hidden[0].to(self.weight.device)
        if self._mixed:
            logits = torch.mm(hidden.to(self.weight.dtype), self.weight.t(), out_dtype=torch.float32)
        elif self._buffer is None:
            logits = torch.mm(hidden.float(), self._weight32.t())
        else:
            if len(self._buffer) < len(hidden):
                self._buffer = hidden.new_empty(len(hidden), len(self.weight), dtype=torch.float32)
            logits = torch.mm(hidden.float(), self._weight32.t(), out=self._buffer[: len(hidden)])
        return (logits if self.bias is None else logits.add_(self.bias.float()))[None]


def _resident(head: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """The head's weight and bias as plain tensors: this worker's shard, or read from where they are offloaded."""
    if head.weight.is_meta:  # offloaded by accelerate; we keep the head here, since every slice needs it
        from accelerate.utils import align_module_device

        with align_module_device(head):
            return head.weight.detach().clone(), None if head.bias is None else head.bias.detach().clone()
    # Asked by name: importing DTensor takes every worker a second.
    local = [part.to_local() if hasattr(part, "to_local") else part for part in (head.weight, head.bias)]
    return local[0], local[1]
