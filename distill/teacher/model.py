"""From tokens to float32 logits, slice by slice, for any causal LM of transformers.

B batch, T positions (padded), N real tokens of a batch, H hidden size, V vocabulary.

1. The model gets right-padded ids [B, T] without a mask. It is causal: padding cannot reach a real token. Its forward
   pass ends behind the backbone: the outermost part that holds the input embedding and not the output head.
2. Padding is dropped from the backbone's hidden states: [N, H] are left, which go through the output head in slices.
3. For each slice the model's own ``forward`` runs, with the backbone replaced by the slice. So everything that a model
   does to its logits (soft-capping, scaling) is done. Only the matrix product is ours, since it must give float32:
   neighbouring bfloat16 numbers between 16 and 32 differ by 0.125.

All this is compared with the plain model when it is loaded; `check` looks whether the model is causal at all. `Share`
knows how a model is spread over workers.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distill.config.generate import CaptureConfig
from distill.errors import TeacherError, first_line
from distill.teacher.backbone import Backbone, BackboneEnd, Float32Head, backbones
from distill.teacher.capture import Captured
from distill.teacher.check import (
    Samples,
    forget_lengths,
    probe,
    probe_lengths,
    relative_difference,
    rope_switch,
    sees_later,
)
from distill.teacher.method import capture
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

    device:      where it takes ids
    captures:    whether its output is captured on this worker
    rope_switch: samples longer than this are to be batched with samples of their own length only
    """

    def __init__(
        self, model: Any, device: torch.device, share: Share | None = None, longest: int = 40, max_tokens: int = 16384
    ) -> None:
        """Take over `model`, a transformers causal LM in eval mode, and check our head against its own.

        longest: the length of the longest sample to come. max_tokens: of a batch, with padding.
        Raises TeacherError where ids alone are not enough for the model, and, on all workers of a replica, where the
        logits of a token depend on later tokens.
        """
        self.device = device
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.rope_switch = rope_switch(model.config.get_text_config())
        self._slice_tokens = max(_FEWEST_SLICE_TOKENS, slice_bytes(device) // (4 * self.vocab_size))
        self._model, self._share = model, share or Share()
        self.captures = self._share.captures
        self._backbone: Backbone | None = None
        short, *long = probe_lengths(model.config.get_text_config(), longest, max_tokens)
        self._sliced = False
        try:
            self._refuse_what_sees_later(short[:1] * 4)
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # not what torch says of lost workers
            if isinstance(error, TeacherError):
                raise
            raise TeacherError(
                f"teacher.model: expected a model that runs on token ids alone, found {type(model).__name__}, where "
                f"they lead to {type(error).__name__}: {first_line(error)}"
            ) from error
        self._sliced = self._split(short)
        for lengths in long:
            self._refuse_what_sees_later(lengths)

    def capture(
        self, samples: Sequence[NDArray[np.int32]], settings: CaptureConfig, u: NDArray[np.float64]
    ) -> Captured | None:
        """What is kept of the distributions after every token of the samples, sample after sample, on the CPU.

        samples: token ids, [T_i] each, together one batch, N tokens. u: [N], of `sample.uniforms`, for the rows that
        these are of a store. All workers of a replica have to call this with the same batches; the result is None on
        those that do not capture.
        """
        following = np.concatenate([np.append(sample[1:], -1) for sample in samples]).astype(np.int64)  # [N]
        next_ids = torch.from_numpy(following).to(self.device)
        draws = torch.from_numpy(u).to(self.device)
        parts: list[Captured] = []
        at = 0
        for logits in self.logits(samples):  # [n, V]
            ids = next_ids[at : at + len(logits)].to(logits.device)
            part = capture(logits, settings, ids, draws[at : at + len(logits)].to(logits.device), self._share)
            parts += [part] if part else []
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

    def _hidden(self, samples: Samples) -> Tensor | None:
        """The last hidden states of the real tokens, [N, H]; None where another worker has them."""
        assert self._backbone is not None
        ids, real = _pad(samples, self.device)
        self._begin_anew()
        try:
            whole = self._share.run(self._model, ids)
        except BackboneEnd as end:
            return self._backbone.keep(end.output)[real.to(end.output[0].device)]
        if whole is not None:
            raise LookupError("it does not run the backbone")
        return None

    def _begin_anew(self) -> None:
        """A batch is what it would be for a model that has seen no other."""
        if self.rope_switch is not None:
            forget_lengths(self._model)

    def _head(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, H] to float32 logits [n, V], by the model's own forward around them."""
        assert self._backbone is not None
        ids = torch.zeros((1, len(hidden)), dtype=torch.long, device=self.device)
        with self._backbone.returns(hidden[None]):
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits[0].float()
        return logits

    def _plain(self, *samples: NDArray[np.int32]) -> Tensor | None:
        """The plain model's logits for the samples in one padded batch, [N, V] float32; None as in `_hidden`."""
        ids, real = _pad(samples, self.device)
        self._begin_anew()
        output = self._share.run(self._model, ids)
        return None if output is None else output.logits[real.to(output.logits.device)].float()

    @torch.inference_mode()
    def _refuse_what_sees_later(self, lengths: Sequence[int]) -> None:
        """Run such a batch twice, with other tokens at the end of samples, and look at the rows before; see `check`.

        Noise may look like a leak once in some hundred times, so that another batch has to show it as well.
        """

        def logits_of(samples: Samples, rows: list[int]) -> Tensor | None:
            if self._sliced:
                hidden = self._hidden(samples)
                return None if hidden is None else self._head(hidden[rows]).clone()
            parts = [self._plain(sample) for sample in samples]
            return None if parts[0] is None else torch.cat([part for part in parts if part is not None])[rows]

        rounding = 1e-4 if self._model.dtype == torch.float32 else 1e-2
        for seed in (0, 1):
            change = sees_later(logits_of, probe(lengths, self.vocab_size, seed), self.vocab_size, rounding)
            if self._share.agree(change == 0):
                return
        raise TeacherError(
            f"teacher.model: expected a causal language model, found {type(self._model).__name__}, in which later "
            f"tokens change the logits of earlier ones (samples of {lengths[0]} tokens)"
        )

    @torch.inference_mode()
    def _split(self, lengths: Sequence[int]) -> bool:
        """Put our head in place, compare it with the plain model, and undo it where they differ.

        On one padded batch both must agree closely, and padding may change the logits only as batch shapes do.
        All workers of a replica come to the same result.
        """
        model, head = self._model, self._model.get_output_embeddings()
        samples, parts = probe(lengths, self.vocab_size), backbones(self._model)
        if not self._share.agree(bool(parts) and (not self.captures or isinstance(head, nn.Linear))):
            return self._fall_back("it has no backbone and linear head to take apart")
        padded = self._plain(*samples)  # [N, V]
        alone = [part for part in map(self._plain, samples) if part is not None]
        exact = model.dtype == torch.float32
        harmless = padded is None or relative_difference(torch.cat(alone), padded) <= (1e-3 if exact else 0.25)
        if not self._share.agree(harmless):
            return self._fall_back("padding on the right changes its logits")
        name = next(name for name, part in model.named_modules() if part is head)
        reason = ""
        for part in parts:
            self._backbone = Backbone(part)
            reason = self._compare(samples, padded, name)
            if self._share.agree(not reason):
                return True
            self._backbone.release()
            model.set_submodule(name, head)
        return self._fall_back(reason or "another worker of this replica found so")

    def _compare(self, samples: Samples, padded: Tensor | None, head: str) -> str:
        """Put our head in the place of that name, and say why its logits are not `padded`; nothing if they are."""
        try:
            hidden = self._hidden(samples)
            if hidden is None or padded is None:
                return ""
            self._model.set_submodule(head, Float32Head(self._model.get_submodule(head)))
            found = torch.cat([self._head(rows).clone() for rows in torch.split(hidden, 4)])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a forward that wants more than hidden states may raise anything
            return f"its forward does not run on hidden states ({type(error).__name__}: {error})"
        difference = relative_difference(padded, found)
        limit = 1e-3 if self._model.dtype == torch.float32 else 0.02
        return "" if difference <= limit else f"taken apart, its logits differ by {difference:.2g} of the largest"

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
