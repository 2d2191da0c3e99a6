"""Datasets for the tests, and what becomes of them."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from distill.config.generate import GenerateConfig
from distill.data.dataset import find
from distill.data.show import marked
from distill.data.tokenize import Samples, tokenize
from distill.settings import load
from tests.support import make_tokenizer

logging.getLogger("distill.data.tokenize").setLevel(logging.INFO)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments: str, tokenizer: Any = None, context: int | None = None, vocab_size: int = 262) -> Samples:
    data = find(load(GenerateConfig, arguments).dataset)
    return tokenize(data, tokenizer or make_tokenizer(), context, vocab_size, visible=False)


def decoded(samples: Samples, tokenizer: Any = None) -> list[tuple[int, str]]:
    """Each sample's source and text."""
    tokenizer = tokenizer or make_tokenizer()
    found = [samples.take(np.array([i])) for i in range(len(samples.lengths))]
    return [(int(sample["source"][0]), tokenizer.decode(sample["tokens"])) for sample in found]


def shown(samples: Samples, tokenizer: Any = None) -> list[str]:
    """Each sample's text, with what is trained on between « and »."""
    found = [samples.take(np.array([i])) for i in range(len(samples.lengths))]
    return [marked(tokenizer or make_tokenizer(), sample["tokens"], sample.get("loss_mask")) for sample in found]
