"""Students that write, and the rows of a store about what they wrote.

W windows of L + 1 tokens, N rows, V vocabulary, K kept ids. The last settings.new tokens of a window are trained on;
those before are its prompt. As everywhere, row t is about token t + 1.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig

from distill.config.generate import CaptureConfig
from distill.rollouts.draws import Draws, uniforms
from distill.student.loss import DistillationLoss
from distill.teacher import sample
from distill.teacher.capture import round_logprobs
from distill.teacher.method import capture
from tests.benchmarks import fidelity_rows
from tests.benchmarks.fidelity_models import Windows, hidden_states

CHUNK = 1024
SAMPLE, TOPK = CaptureConfig("sample", 24), CaptureConfig("topk", 64)
"""The default, and what the losses need that a sample has no estimate of."""


@dataclass(frozen=True)
class Arm:
    """A way to go on. texts: whose they are, and when: text, rollouts (written before the first step) or live."""

    name: str
    texts: str
    loss: DistillationLoss
    method: CaptureConfig


ARMS = (
    Arm("kd_text", "text", DistillationLoss(), SAMPLE),
    Arm("on_policy", "rollouts", DistillationLoss("on_policy"), TOPK),  # which reads next_logprob only
    Arm("on_policy_ratio", "rollouts", DistillationLoss("on_policy", max_ratio=2.0), TOPK),
    Arm("on_policy_live", "live", DistillationLoss("on_policy"), TOPK),
    Arm("reverse_kl", "rollouts", DistillationLoss("reverse_kl"), TOPK),
)


@dataclass(frozen=True)
class Settings(fidelity_rows.Settings):
    """As for docs/fidelity.md, with other sizes."""

    arms: str = ",".join(arm.name for arm in ARMS)
    heal: int = 40  # steps of KD from the teacher's layers to the common start
    steps: int = 16
    tokens: int = 640  # of a step, prompts among them
    length: int = 80
    new: int = 64  # tokens of a window that are trained on, or written
    fresh: int = 4  # steps after which the student of a live teacher writes again
    held_out: int = 4800
    sequences: int = 64  # that are written at the same time

    @property
    def compared(self) -> list[Arm]:
        """The arms that are asked for."""
        return [arm for arm in ARMS if arm.name in self.arms.split(",")]


@dataclass(frozen=True)
class Written:
    """Windows, tokens [W, L + 1], and which rows are trained on, mask [W, L].

    logprobs: [W, L] float32, log q of the token that follows, where a student has written it
    """

    tokens: Tensor
    mask: Tensor
    logprobs: Tensor

    def __getitem__(self, at: slice) -> "Written":
        return Written(self.tokens[at], self.mask[at], self.logprobs[at])


def as_written(tokens: Tensor, mask: Tensor) -> Written:
    """Text, [W, L + 1], as if it had been written: no student knows how likely it was."""
    return Written(tokens, mask, torch.full(mask.shape, torch.nan))


@torch.no_grad()
def write(model: Any, windows: Tensor, settings: Settings, seed: int) -> Written:
    """What the model writes after the prompts of the windows [W, L + 1], to the end of the text: as distill.rollout."""
    model.eval()
    length, new, end = windows.shape[1], settings.new, model.config.eos_token_id
    config = GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=end, pad_token_id=end)
    tokens, logprobs = [], []
    for first in range(0, len(windows), settings.sequences):
        prompts = windows[first : first + settings.sequences, : length - new].to(model.device)
        u = np.stack([uniforms(seed, first + i, 0, new) for i in range(len(prompts))])
        draws = Draws(
            torch.from_numpy(u).to(model.device),
            None,
            1.0,
            1.0,
            torch.tensor([end], device=model.device),
            lambda *_: None,
        )
        found = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), generation_config=config, logits_processor=[draws]
        )
        tokens.append(pad(found, (0, length - found.shape[1]), value=end).cpu())
        logprobs.append(draws.logprobs.cpu())
    written = torch.cat(tokens)
    ends = (written[:, length - new :] == end).long()
    prompt = (length - 1 - new, 0)
    mask = pad(ends.cumsum(dim=1) - ends == 0, prompt, value=False)
    return Written(written, mask, pad(torch.cat(logprobs), prompt, value=torch.nan))


@torch.no_grad()
def said(
    teacher: Any, tokens: Tensor, methods: Iterable[CaptureConfig], settings: Settings, seed: int
) -> dict[str, dict[str, Tensor]]:
    """Of each method the rows that a store has of windows [W, L + 1], in the store's dtypes: [W, L, ...]."""
    some, found = Windows(tokens), dict[str, dict[str, list[Tensor]]]()
    hidden = hidden_states(teacher, some.inputs, settings.sequences)
    u = torch.from_numpy(sample.uniforms(seed, 0, len(hidden)))
    for first in range(0, len(hidden), CHUNK):
        at = slice(first, first + CHUNK)
        logits = teacher.lm_head(hidden[at]).float()
        next_ids, random = (values[at].to(hidden.device) for values in (some.next_ids, u))
        for method in methods:
            kept = capture(logits.clone(), method, next_ids, random)
            assert kept is not None
            rows = {"target_ids": kept.target_ids, "logsumexp": kept.logsumexp}
            rows["next_logprob"] = kept.next_logprob.half()
            for name in ("target_logprobs", "tail_logprob"):
                rows[name] = torch.from_numpy(round_logprobs(getattr(kept, name).cpu().numpy()))
            for name, values in rows.items():
                found.setdefault(method.method, {}).setdefault(name, []).append(values.cpu())
    return {
        method: {name: torch.cat(parts).unflatten(0, (len(tokens), -1)) for name, parts in rows.items()}
        for method, rows in found.items()
    }


def rows_at(rows: dict[str, Tensor], written: Written, device: str) -> dict[str, Tensor]:
    """The rows that are trained on, [N, ...], as a batch has them."""
    found = {name: values[written.mask] for name, values in rows.items()}
    found = {name: values.long() if name == "target_ids" else values.float() for name, values in found.items()}
    found["sampled_logprob"] = written.logprobs[written.mask].half().float()
    found["next_tokens"] = written.tokens[:, 1:][written.mask]
    return {name: values.to(device) for name, values in found.items()}
