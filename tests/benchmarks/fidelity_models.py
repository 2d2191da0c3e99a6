"""The text in windows, the teacher, and students made of its layers.

W windows, L tokens of a window, N = W L rows, H hidden size, V vocabulary.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.benchmarks.fidelity_rows import Settings


@dataclass(frozen=True)
class Windows:
    """Tokens [W, L + 1]: of a window, row t is about token t + 1."""

    tokens: Tensor

    @property
    def inputs(self) -> Tensor:
        """[W, L] int64."""
        return self.tokens[:, :-1]

    @property
    def next_ids(self) -> Tensor:
        """[N] int64, the tokens that follow."""
        return self.tokens[:, 1:].flatten()


def read_texts(settings: Settings) -> list[str]:
    """The texts, in their order."""
    if settings.texts:
        return [json.loads(line)["text"] for line in Path(settings.texts).read_text().splitlines()]
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())]


def windows(texts: Sequence[list[int]], settings: Settings) -> Windows:
    """The texts end to end, cut into windows; each window begins with the last token of the one before."""
    stream = torch.tensor([token for text in texts for token in text])
    return Windows(stream.unfold(0, settings.length + 1, settings.length))


def split(settings: Settings, seed: int, encoded: Sequence[list[int]]) -> tuple[Windows, Windows, Windows]:
    """Windows to heal on, to train on and to hold out. No text is in two of them; the first are the same for all seeds.

    Training windows are in the seed's order, and come again where the text is too short for all steps.
    """
    order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(12345)).tolist()
    healing, rest = _until([encoded[i] for i in order], settings.heal * settings.tokens)
    shuffled = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out, training = _until([rest[i] for i in shuffled], settings.held_out)
    train = windows(training, settings).tokens
    needed = settings.steps * settings.tokens // settings.length
    random = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(len(train), generator=random) for _ in range(-(-needed // len(train)))]
    held = windows(held_out, settings).tokens[: settings.held_out // settings.length]
    heal = windows(healing, settings) if healing else Windows(train[:0])
    return heal, Windows(train[torch.cat(epochs)[:needed]]), Windows(held)


def _until(texts: list[list[int]], tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """The first texts that have more than so many tokens together, and the others."""
    count = 0
    for i, text in enumerate(texts):
        if count > tokens or not tokens:
            return texts[:i], texts[i:]
        count += len(text)
    raise ValueError(f"expected texts of more than {tokens:,} tokens, found {count:,}")


def folder(settings: Settings) -> Path:
    """The teacher's."""
    if settings.teacher != "demo":
        return Path(settings.teacher)
    from distill.teacher import demo

    return demo.folder()


@functools.cache
def encode(settings: Settings) -> list[list[int]]:
    """The texts as tokens, each with the token that ends a text."""
    tokenizer = AutoTokenizer.from_pretrained(folder(settings))
    return [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in read_texts(settings)]


def load(settings: Settings) -> Any:
    """The teacher, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder(settings), dtype=torch.float32)
    return model.to(settings.device).eval()


def student_of(teacher: Any, layers: int) -> Any:
    """A student of so many of the teacher's layers, evenly spaced."""
    from distill.student.model import evenly_spaced, shortened

    return shortened(teacher, evenly_spaced(layers, teacher.config)).to(teacher.device)


@torch.no_grad()
def hidden_states(model: Any, inputs: Tensor, batch: int) -> Tensor:
    """[N, H] float32, what the output head reads, for inputs [W, L], so many windows at a time."""
    parts = [model.model(part.to(model.device)).last_hidden_state.flatten(0, 1) for part in inputs.split(batch)]
    return torch.cat(parts).float()
