"""A sample in words, so that a wrong mask is seen at a glance."""

from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LONGEST = 240


def marked(tokenizer: Any, tokens: NDArray[np.int32], loss_mask: NDArray[np.bool_] | None) -> str:
    """The text of a sample, with « and » around what is trained on, and the middle of long parts left out.

    tokens: [T]. loss_mask: [T], about the token that follows each, as in a store; None: every token but the first.
    """
    follows = np.ones(len(tokens), bool) if loss_mask is None else np.asarray(loss_mask, bool)
    trained = [False, *follows[:-1]]
    parts = []
    for is_trained, positions in groupby(range(len(tokens)), key=trained.__getitem__):
        text = _shortened(tokenizer.decode([int(tokens[i]) for i in positions], clean_up_tokenization_spaces=False))
        parts.append(f"«{text}»" if is_trained else text)
    return "".join(parts)


def _shortened(text: str) -> str:
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]} ... {text[-half:]}"
