"""What others captured of a teacher, row by row, in the forms in which they write it.

T tokens of an example, K entries of a token at most.

targets          input_ids [T], target_token_ids and target_logprobs [T][K], perhaps target_mask [T][K]: the columns of
                 axolotl's distillation, and of distill.export. Row t is about token t+1 (align=logits) or t (token)
prompt_logprobs  input_ids or prompt_token_ids [T], and what vLLM says of a prompt: null for the first token, then for
                 each its entries {id: log-probability}, the token's own among them, however improbable it is

Both may have labels (-100: not trained on) and an attention_mask (0: padding). An entry of prompt_logprobs is a number
or an object with a logprob; the entries of a token are an object by id, or a list of [id, entry] or of objects with a
token_id. Ids may be numbers, or texts of them, as JSON has them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.data.files import Row
from distill.data.messages import show
from distill.errors import DataError
from distill.exchange.entries import Entries, Floats, expect_length, pairs_of, rectangle

Mask = NDArray[np.bool_]

ALIGNS = ("logits", "token")
_TOKENS = ("input_ids", "prompt_token_ids")
_TARGETS = ("target_token_ids", "target_logprobs")
_PADDING = -1e8
"""A log-probability below this says that there is none; axolotl writes -1e9."""

_LEAST = -65504.0  # what float16 holds
_ABOVE_ZERO = 1e-3
"""What a log-probability of 1 may be by rounding."""

_ROUNDING = 2**-7 + 2**-11
"""The relative error of a log-probability that a store has rounded."""


@dataclass(frozen=True)
class Example:
    """An example, with its rows as a store has them: row t is about token t+1, and the last one is about nothing.

    tokens: [T] int32. trained: [T] bool, tokens that are trained on. said: [T] bool, rows with entries
    ids: [T, K] int32, by descending probability, then -1. logprobs: [T, K] float64, nan without an id
    following: [T] float64, of the token that really follows; nan where nobody says it
    """

    tokens: NDArray[np.int32]
    trained: Mask
    said: NDArray[np.bool_]
    ids: NDArray[np.int32]
    logprobs: Floats
    following: Floats

    @property
    def renormalized(self) -> bool:
        """Whether the entries of every row add up to 1, up to the rounding of a store: they may have been made to."""
        mass, slack = _mass(self.logprobs[self.said])
        return bool((mass >= 1 - slack).all())

    def tail(self) -> Floats:
        """[T]: the log of what the entries of each row leave of 1; nan in rows without entries."""
        left = np.clip(1 - _mass(self.logprobs)[0], 0, 1)
        with np.errstate(divide="ignore"):
            return np.where(self.said, np.log(left), np.nan)


def _mass(logprobs: Floats) -> tuple[Floats, Floats]:
    """[N]: the sum of each row's probabilities, and by how much rounding may have changed it."""
    p = np.nan_to_num(np.exp(logprobs), nan=0.0)
    size = np.nan_to_num(np.clip(-logprobs, 0, 1e3), nan=0.0)
    return p.sum(axis=1), 1e-3 + (p * np.expm1(_ROUNDING * size)).sum(axis=1)


class CapturedReader:
    """Reads the rows of a dataset. form: how they are written. columns: those that are read."""

    def __init__(self, columns: Sequence[str], vocab_size: int, name: str, align: str) -> None:
        """vocab_size: of the teacher's softmax. name: of the dataset. align: as dataset.align.

        Raises DataError for columns of no known form.
        """
        self._vocab_size, self._name, self._given = vocab_size, name, align
        tokens = [column for column in _TOKENS if column in columns]
        self.form = "prompt_logprobs" if "prompt_logprobs" in columns else "targets"
        needed = ["prompt_logprobs"] if self.form == "prompt_logprobs" else [*_TARGETS]
        if not tokens or not {*needed} <= {*columns}:
            raise DataError(
                "dataset: expected columns input_ids, target_token_ids and target_logprobs, or input_ids (or "
                f"prompt_token_ids) and prompt_logprobs, found {', '.join(columns)} in {name}"
            )
        self.needed = [tokens[0], *needed]
        self.columns = [*self.needed, "labels", "attention_mask", *(["target_mask"] * (self.form == "targets"))]

    def align(self, rows: Iterator[Row]) -> str:
        """Which token row t is about, from the first rows that tell.

        Raises DataError where they contradict each other, or none does.
        """
        possible = {*ALIGNS}
        for number, row in enumerate(rows):
            where = f"example {number} of {self._name}"
            _, labels, entries = self._parts(row, where)
            if entries.full:
                raise DataError(
                    f"dataset.align: expected logits or token with {where}, where the first row and the last both have "
                    "entries, found auto"
                )
            possible &= self._possible(labels, entries)
            if not possible:
                raise DataError(
                    f"dataset.align: expected rows of target_mask that are about the token of their own position, or "
                    f"about the one after it, found both, or neither, up to {where}"
                )
            if len(possible) == 1:
                return possible.pop()
        raise DataError(
            f"dataset.align: expected logits or token with {self._name}, where no target_mask says which token a row "
            "is about, found auto"
        )

    def read(self, row: Row, number: int, align: str) -> Example | None:
        """The example of a row, if it has tokens to learn from. number: of the row.

        Raises DataError for what is not as it has to be, naming the row and the token.
        """
        where = f"example {number} of {self._name}"
        tokens, labels, entries = self._parts(row, where)
        if len(tokens) < 2:
            return None
        if self.form == "targets":
            if self._given == "logits" and entries.full:  # of every logit: the last is about a token beyond the end
                entries = entries.without_last()
            self._check_align(align, labels, entries, where)
        self._check(entries, where)
        ids, logprobs = self._sorted(entries)
        if align == "token":
            nothing = np.zeros((1, ids.shape[1]))
            ids, logprobs = np.concatenate([ids[1:], nothing - 1]), np.concatenate([logprobs[1:], nothing + np.nan])
        said = ids[:, 0] >= 0
        trained = np.append(False, said[:-1]) if labels is None else labels
        unsaid = np.flatnonzero(trained[1:] & ~said[:-1])
        if len(unsaid):
            raise DataError(
                f"dataset: expected log-probabilities about token {unsaid[0] + 1} of {where}, on which its labels "
                "train, found none"
            )
        if not trained[1:].any():
            return None
        own = ids[:-1] == tokens[1:, None]
        following = np.append(np.where(own.any(axis=1), np.where(own, logprobs[:-1], 0).sum(axis=1), np.nan), np.nan)
        return Example(tokens.astype(np.int32), trained, said, ids.astype(np.int32), logprobs, following)

    def _check_align(self, align: str, labels: Mask | None, entries: Entries, where: str) -> None:
        """Raise DataError for entries that cannot be about what `align` says."""
        if align in self._possible(labels, entries):
            return
        if self._given == "token" and entries.full:
            raise DataError(
                f"dataset.align: expected an empty first row in {where} with token, as nothing predicts the first "
                "token, found entries; rows that stand as logits do are dataset.align=logits"
            )
        position = "their own" if align == "token" else "the next"
        source = "as in the rows before" if self._given == "auto" else f"as {align} says"
        raise DataError(
            f"dataset.align: expected targets about the token of {position} position, {source}, found others in {where}"
        )

    def _parts(self, row: Row, where: str) -> tuple[NDArray[np.int64], Mask | None, Entries]:
        """The tokens, which of them are trained on, if the row says so, and their entries; without padding."""
        name = self.needed[0]
        found = row.get(name)
        if not isinstance(found, list) or any(type(i) is not int for i in found):
            raise DataError(f"dataset: expected a list of token ids in {name!r} of {where}, found {show(found)}")
        bad = next((i for i in found if not 0 <= i < self._vocab_size), None)  # before numpy: it may be of any size
        if bad is not None:
            raise DataError(
                f"dataset: expected token ids below {self._vocab_size:,}, the teacher's vocabulary, in {name!r} of "
                f"{where}, found {show(bad)}"
            )
        tokens = np.array(found, np.int64)
        kept = self._attended(row.get("attention_mask"), found, where)
        labels = self._labels(row.get("labels"), found, where)
        form = self._targets if self.form == "targets" else self._said
        entries = form(row, found, kept, where)
        return tokens[kept], None if labels is None else labels[kept], entries.part(kept)

    def _attended(self, found: Any, tokens: list[int], where: str) -> slice:
        """The tokens that are not padding, which is at an end."""
        if found is None:
            return slice(0, len(tokens))
        expect_length(found, len(tokens), "attention_mask", where)
        there = [i for i, one in enumerate(found) if one]
        kept = slice(there[0], there[-1] + 1) if there else slice(0, 0)
        if len(there) != len(found[kept]):
            raise DataError(f"dataset: expected an attention_mask of ones between padding in {where}, found others")
        return kept

    def _labels(self, found: Any, tokens: list[int], where: str) -> Mask | None:
        if found is None:
            return None
        expect_length(found, len(tokens), "labels", where)
        wrong = next((i for i, label in enumerate(found) if label not in (-100, tokens[i])), None)
        if wrong is not None:
            raise DataError(
                f"dataset: expected labels that are the tokens or -100, found {show(found[wrong])} beside "
                f"{tokens[wrong]} at position {wrong} of {where}; labels are not shifted"
            )
        return np.array([label != -100 for label in found], np.bool_)

    def _targets(self, row: Row, tokens: list[int], _: slice, where: str) -> Entries:
        ids, logprobs = (rectangle(row.get(name), len(tokens), name, where) for name in _TARGETS)
        mask = row.get("target_mask")
        counts = ids if mask is None else rectangle(mask, len(tokens), "target_mask", where)
        for name, part in (("target_logprobs", logprobs), ("target_mask", counts)):
            if part.shape != ids.shape:
                raise DataError(
                    f"dataset: expected as many entries in {name!r} as in 'target_token_ids' of {where}, found "
                    f"{part.shape[1]} and {ids.shape[1]} at most"
                )
        if mask is not None:
            return Entries(ids, logprobs, counts == 1, masked=True)
        there = ~np.isnan(ids) & ~(logprobs <= _PADDING)
        lone = there.any(axis=1, keepdims=True) & np.isneginf(logprobs)  # in no row that is all padding
        return Entries(ids, logprobs, there | lone)

    def _said(self, row: Row, tokens: list[int], kept: slice, where: str) -> Entries:
        found: Any = row.get("prompt_logprobs")
        expect_length(found, len(tokens), "prompt_logprobs", where)
        if tokens[kept] and found[kept.start]:
            raise DataError(
                f"dataset: expected null in 'prompt_logprobs' at the first token of {where}, which follows nothing, "
                f"found {show(found[kept.start])}: an entry is about the token of its own position"
            )
        entries: list[list[tuple[int, float]]] = [[] for _ in tokens]
        for t in range(kept.start + 1, kept.stop):
            entries[t] = list(pairs_of(found[t], f"token {t} of {where}"))
            ids = [i for i, _ in entries[t]]
            if tokens[t] not in ids:
                shifted = t + 1 < len(tokens) and tokens[t + 1] in ids
                hint = "; the token after it is there: are the rows shifted by one?" if shifted else ""
                raise DataError(
                    f"dataset: expected the token itself (id {tokens[t]}) in 'prompt_logprobs' at token {t} of "
                    f"{where}, as vLLM writes it, found {', '.join(map(str, ids[:5])) or 'nothing'}{hint}"
                )
        ids_and_logprobs = ([[pair[i] for pair in pairs] for pairs in entries] for i in range(2))
        ids_there, logprobs = (rectangle(part, len(tokens), "prompt_logprobs", where) for part in ids_and_logprobs)
        return Entries(ids_there, logprobs, ~np.isnan(ids_there))

    @staticmethod
    def _possible(labels: Mask | None, entries: Entries) -> set[str]:
        """Which of ALIGNS the entries that are there may have."""
        there: Mask = np.asarray(entries.there.any(axis=1))
        if len(there) < 2:
            return {*ALIGNS}
        trained = labels if labels is not None and entries.masked else np.ones(len(there), np.bool_)
        possible = {"token"} if not there[0] and not (there & ~trained).any() else set()
        return possible | ({"logits"} if not there[-1] and not (there[:-1] & ~trained[1:]).any() else set())

    def _check(self, entries: Entries, where: str) -> None:
        """Raise DataError for entries that no teacher says."""
        there, ids = entries.there, np.where(entries.there, entries.ids, np.nan)
        logprobs, ordered = np.where(there, entries.logprobs, np.nan), np.sort(ids, axis=1)
        whole = (ids >= 0) & (ids < self._vocab_size) & (ids == np.floor(ids))
        mass, slack = _mass(logprobs)
        for what, wrong, found in (
            (f"token ids below {self._vocab_size:,}, the teacher's vocabulary,", there & ~whole, ids),
            ("log-probabilities, at most 0", there & ~((logprobs >= _LEAST) & (logprobs <= _ABOVE_ZERO)), logprobs),
            ("different ids", np.equal(ordered[:, 1:], ordered[:, :-1]), ordered),
            ("probabilities that add up to at most 1", (mass > 1 + slack)[:, None], mass[:, None]),
        ):
            rows, columns = np.nonzero(wrong)
            if len(rows):
                twice = " twice" if found is ordered else ""
                raise DataError(
                    f"dataset: expected {what} at position {rows[0]} of {where}, found "
                    f"{found[rows[0], columns[0]]:g}{twice}"
                )

    @staticmethod
    def _sorted(entries: Entries) -> tuple[Floats, Floats]:
        """Ids and log-probabilities by descending probability, then -1 and nan."""
        logprobs = np.where(entries.there, np.minimum(entries.logprobs, 0), -np.inf)
        order = np.argsort(-logprobs, axis=1, kind="stable")
        ids = np.take_along_axis(np.where(entries.there, entries.ids, -1), order, axis=1)
        return ids, np.where(ids >= 0, np.take_along_axis(logprobs, order, axis=1), np.nan)
