"""The entries of the tokens of a row: ids and log-probabilities, as they stand there."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.data.messages import show
from distill.errors import DataError

Floats = NDArray[np.float64]

_DIGITS = 18
"""Of an id at most: int64 holds it."""


@dataclass(frozen=True)
class Entries:
    """The entries of each token as they stand in a row: ids and logprobs [T, K]; there: [T, K], those that count.

    masked: whether the row says itself which count
    """

    ids: Floats
    logprobs: Floats
    there: NDArray[np.bool_]
    masked: bool = False

    @property
    def full(self) -> bool:
        """Whether the first row and the last have entries, as rows of logits do: one of them is about no token."""
        return len(self.there) > 1 and bool(self.there[0].any() and self.there[-1].any())

    def part(self, kept: slice) -> "Entries":
        """Of these tokens only."""
        return Entries(self.ids[kept], self.logprobs[kept], self.there[kept], self.masked)

    def without_last(self) -> "Entries":
        """With an empty last row."""
        last = np.arange(len(self.there))[:, None] == len(self.there) - 1
        return Entries(self.ids, self.logprobs, self.there & ~last, self.masked)


def pairs_of(said: Any, where: str) -> Iterator[tuple[int, float]]:
    """The ids and log-probabilities of one token, however they are written."""
    entries: Any = said.items() if isinstance(said, dict) else said or ()
    for entry in entries:
        name: Any
        value: Any
        if isinstance(entry, dict):
            name, value = entry.get("token_id"), entry
        elif isinstance(entry, list | tuple) and len(entry) == 2:
            name, value = entry
        else:
            raise DataError(
                f"dataset: expected [id, log-probability] in 'prompt_logprobs' at {where}, found {show(entry)}"
            )
        if value is None:  # Arrow gives all objects of a column the same keys
            continue
        logprob: Any = value.get("logprob") if isinstance(value, dict) else value
        if isinstance(name, float) and name.is_integer():  # of a pair of numbers in a column of numbers
            name = int(name)
        text = str(name).removeprefix("token_id:")
        if not text.isdecimal() or len(text) > _DIGITS:
            raise DataError(f"dataset: expected a token id in 'prompt_logprobs' at {where}, found {show(name)}")
        too_large = isinstance(logprob, int) and logprob.bit_length() > 64  # for a float, perhaps
        if isinstance(logprob, bool) or not isinstance(logprob, int | float) or too_large:
            raise DataError(
                f"dataset: expected a log-probability in 'prompt_logprobs' at {where} (id {text}), found "
                f"{show(logprob)}"
            )
        yield int(text), float(logprob)


def rectangle(found: Any, length: int, name: str, where: str) -> Floats:
    """[T, K]: lists of different lengths as an array; nan where there is nothing."""
    expect_length(found, length, name, where)
    lists = [[] if entry is None else entry for entry in found]
    if any(not isinstance(entry, list) for entry in lists):
        raise DataError(f"dataset: expected a list for each token in {name!r} of {where}, found {show(found)}")
    counts = np.array([len(entry) for entry in lists], np.int64)
    flat = list(chain.from_iterable(lists))
    try:
        values = np.array(flat if None not in flat else [np.nan if value is None else value for value in flat])
    except (ValueError, OverflowError):  # lists among them
        values = np.array(None)
    if flat and (values.ndim != 1 or values.dtype.kind not in "iuf" + "b" * (name == "target_mask")):
        raise DataError(f"dataset: expected numbers in {name!r} of {where}, found {show(flat)}")
    filled = np.full((length, max(1, int(counts.max(initial=0)))), np.nan)
    filled[np.arange(filled.shape[1]) < counts[:, None]] = values.astype(np.float64)
    return filled


def expect_length(found: Any, length: int, name: str, where: str) -> None:
    """Raise DataError for what is no list with an entry for each token."""
    if not isinstance(found, list) or len(found) != length:
        size = len(found) if isinstance(found, list) else show(found)
        raise DataError(f"dataset: expected {length} entries in {name!r} of {where}, one for each token, found {size}")
