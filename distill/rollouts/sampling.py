"""The student writes: transformers' own generation, with draws of ours (draws.py), batch by batch.

Nothing of a checkpoint's generation settings has a say but its ids that end a text: a top_k or a repetition penalty in
them would change the distribution without a word.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from distill.config.rollout import SamplingConfig
from distill.errors import ConfigError, NumericalError
from distill.rollouts.draws import Draws, uniforms
from distill.teacher.check import forget_lengths, probe, relative_difference, rope_switch
from distill.teacher.source import Source

logger = logging.getLogger(__name__)

_PROBE_LENGTHS, _PROBE_STEPS = (12, 5), 4


class Rollout(NamedTuple):
    """What a student wrote after a prompt.

    ids: [n] int32, with the one that ended it. logprobs: [n] float32. finished: whether one ended it
    """

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    finished: bool


def stop_ids(source: Source, stop: Sequence[int | str]) -> list[int]:
    """The ids that end a rollout, ascending: the checkpoint's, its tokenizer's, and those of ``sampling.stop``.

    Raises ConfigError for a text that is not one token, or an id that the model lacks.
    """
    settings: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        settings = json.loads((source.folder / "generation_config.json").read_text())
    found = settings.get("eos_token_id", getattr(source.text_config, "eos_token_id", None))
    ids = {*(found if isinstance(found, list) else [found]), source.tokenizer.eos_token_id} - {None}
    vocabulary = source.tokenizer.get_vocab()
    for token in stop:
        read = [token] if isinstance(token, int) else [vocabulary[token]] if token in vocabulary else None
        read = read or source.tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(read) != 1:
            raise ConfigError(f"sampling.stop: expected texts of one token, found {token!r} of {len(read)}")
        if not 0 <= read[0] < source.vocab_size:
            raise ConfigError(f"sampling.stop: expected ids below {source.vocab_size:,}, found {read[0]}")
        ids |= {*read}
    return sorted(i for i in ids if i < source.vocab_size)


class Sampler:
    """A student that writes.

    even: whether all prompts of a batch have the same length, as the model does not do without
    """

    def __init__(
        self, model: Any, source: Source, settings: SamplingConfig, stops: Sequence[int], sequences: int
    ) -> None:
        """model: on its device, in eval mode. stops: as from `stop_ids`. sequences: of a batch, at most."""
        self._model, self._settings, self._sequences = model, settings, sequences
        self._device: torch.device = model.device
        self._context, self._stops = source.context_length, list(stops)
        size = source.vocab_size
        known = [i for i in source.tokenizer.get_vocab().values() if i < size]
        impossible = torch.ones(size, dtype=torch.bool, device=self._device)
        impossible[known] = False
        self._impossible = impossible if bool(impossible.any()) else None
        pad = source.tokenizer.pad_token_id
        self._pad = pad if pad is not None and pad < size else known[0]
        model.generation_config = GenerationConfig()
        self._changes = rope_switch(source.text_config) is not None
        self.even = self._changes or not self._may_pad(known)
        if self.even and not self._changes:
            logger.info("%s does not do with padding before prompts: batches have prompts of equal length",
                        type(model).__name__)  # fmt: skip

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Which rollouts are written side by side, whose prompts have these lengths: similar ones, long ones first.

        All of a batch may have as many new tokens: where the context allows fewer, those of equal prompts' lengths.
        """
        found: list[list[int]] = []
        kind: tuple[int, int] | None = None
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            alike = self.limit(lengths[i]), lengths[i] if self.even else 0
            if kind != alike or len(found[-1]) == self._sequences:
                found.append([])
            found[-1].append(i)
            kind = alike
        return found

    def limit(self, length: int) -> int:
        """The most tokens that may follow a prompt of this length."""
        most = self._settings.max_new_tokens
        return most if self._context is None else min(most, self._context - length)

    def write(
        self,
        prompts: Sequence[NDArray[np.int32]],
        numbers: Sequence[tuple[int, int]],
        heard: Callable[[int, int], None],
    ) -> list[Rollout]:
        """The rollouts of a batch. numbers: of each, its prompt's and its own, which its draws follow from.

        heard: as of `Draws`. Raises NumericalError for logits that are NaN, naming the prompt.
        """
        limit = min(self.limit(len(prompt)) for prompt in prompts)
        u = np.stack([uniforms(self._settings.seed, prompt, sample, limit) for prompt, sample in numbers])
        stops = torch.tensor(self._stops, dtype=torch.long, device=self._device)
        draws = Draws(
            torch.from_numpy(u).to(self._device), self._impossible, self._settings.temperature, self._settings.top_p,
            stops, heard,
        )  # fmt: skip
        ids = self._generate(prompts, limit, draws, self._stops).cpu().numpy().astype(np.int32)  # [B, n]
        logprobs = draws.logprobs.cpu().numpy()
        ends = np.isin(ids, self._stops)
        found = []
        for row, number in enumerate(numbers):
            size = int(ends[row].argmax()) + 1 if ends[row].any() else ids.shape[1]
            if not np.isfinite(logprobs[row, :size]).all():
                at = int(np.argmin(np.isfinite(logprobs[row])))
                raise NumericalError(
                    f"the student's logits are NaN or infinite at token {at} of rollout {number[1]} of prompt "
                    f"{number[0]}; expected finite ones. Nothing of its part was written"
                )
            found.append(Rollout(ids[row, :size], logprobs[row, :size], bool(ends[row].any())))
        return found

    @torch.inference_mode()
    def _generate(
        self, prompts: Sequence[NDArray[np.int32]], limit: int, processor: LogitsProcessor, stops: list[int]
    ) -> Tensor:
        """The ids that follow prompts, [B, n]: what transformers' generation makes of the processor's scores."""
        if self._changes:
            forget_lengths(self._model)
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self._pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.from_numpy(np.asarray(prompt, np.int64))
            mask[row, longest - len(prompt) :] = 1
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=limit, eos_token_id=stops or None, pad_token_id=self._pad
        )
        try:
            found: Tensor = self._model.generate(
                ids.to(self._device), attention_mask=mask.to(self._device), generation_config=settings,
                logits_processor=LogitsProcessorList([processor]),
            )  # fmt: skip
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"batch.sequences: expected so many that {len(prompts)} sequences of up to {longest + limit:,} tokens "
                f"fit into the memory of {self._device}; the run may go on with fewer"
            ) from error
        return found[:, longest:]

    def _may_pad(self, known: Sequence[int]) -> bool:
        """Whether prompts of different lengths, padded at their left, get the logits that each has alone."""
        if self._context is not None and self._context < max(_PROBE_LENGTHS) + _PROBE_STEPS:
            return False
        prompts = [np.asarray(known, np.int32)[found % len(known)] for found in probe(_PROBE_LENGTHS, 1 << 30)]
        together = _Told(prompts)
        self._generate(prompts, _PROBE_STEPS, together, [])
        limit = 1e-3 if self._model.dtype == torch.float32 else 0.05
        for row, prompt in enumerate(prompts):
            alone = _Told([prompt])
            self._generate([prompt], _PROBE_STEPS, alone, [])
            for padded, plain in zip(together.heard, alone.heard, strict=True):
                if not relative_difference(plain[0], padded[row]) <= limit:
                    return False
        return True


class _Told(LogitsProcessor):  # type: ignore[misc]
    """Has each sequence go on with the ids of its prompt, from the first on, and keeps the logits that it hears."""

    def __init__(self, prompts: Sequence[NDArray[np.int32]]) -> None:
        self._prompts = prompts
        self.heard: list[Tensor] = []

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        step = len(self.heard)
        self.heard.append(scores.float().clone())
        told = torch.tensor([[int(prompt[step % len(prompt)])] for prompt in self._prompts], device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, told, 0.0)
