"""Examples that are tokens already: ids are used as they are, never decoded."""

import math
from collections.abc import Sequence
from typing import Any

from distill.config.data import DatasetConfig
from distill.data.files import Row
from distill.data.form import Encoded, Form, empty
from distill.data.messages import show
from distill.errors import DataError

_LEAST = -65504.0  # what float16 holds
_ABOVE_ZERO = 1e-3
"""What a log-probability of 1 may be by rounding."""


class Tokens(Form):
    """Token ids, which are used as they are; with a mask or labels, or with a prompt's ids apart.

    Tokens that a model has written may have `logprobs`: what it drew each of them with.
    """

    name = "tokens"
    columns: tuple[str, ...] = ("input_ids",)
    masks = ("loss_mask", "completion_mask", "assistant_masks", "labels", "prompt_length")

    def __init__(self, config: DatasetConfig, tokenizer: Any, columns: Sequence[str], vocab_size: int | None) -> None:
        super().__init__(config, tokenizer)
        self._vocab_size = vocab_size
        self._apart = "input_ids" not in columns
        self.columns = ("prompt_ids", "completion_ids") if self._apart else ("input_ids",)
        found = [] if self._apart else [name for name in self.masks if name in columns]
        self._mask = found[0] if found else None
        self.unused = found[1:]
        self.masked = self._apart or self._mask is not None
        self.sampled = "logprobs" in columns
        self.splits = not self.masked and not self.sampled
        self.optional = (("logprobs",) if self.sampled else ()) + (
            () if self._apart else ("attention_mask", *found[:1])
        )

    def _encode(self, row: Row, where: str) -> Encoded:
        masks = () if self._apart else self.masks
        late = [name for name in masks if row.get(name) is not None and name not in (self._mask, *self.unused)]
        late += ["logprobs"] if row.get("logprobs") is not None and not self.sampled else []
        if late:
            raise DataError(
                f"dataset: expected the columns of the first examples, found {late[0]!r} too in {where}: put one "
                "that has it first"
            )
        if self._apart:
            asked, answered = (self._ids(row, name, where) for name in self.columns)
            if not answered:
                return Encoded([], dropped=empty(row, self.columns))
            trained: list[bool] | None = [False] * len(asked) + [True] * len(answered)
            return Encoded(asked + answered, trained, logprobs=self._logprobs(row, asked + answered, trained, where))
        ids = self._ids(row, "input_ids", where)
        if not ids:
            return Encoded([], dropped=empty(row, self.columns))
        trained = self._trained(row, ids, where) if self._mask else None
        attended, kept = row.get("attention_mask"), slice(0, len(ids))
        if attended is not None and not all(attended):  # padding, which is at one end
            self._expect_length(attended, ids, "attention_mask", where)
            there = [i for i, one in enumerate(attended) if one]
            kept = slice(there[0], there[-1] + 1) if there else slice(0)
            if len(there) != len(attended[kept]):
                raise DataError(f"dataset: expected an attention_mask of ones between padding in {where}, found others")
            if not there:
                return Encoded([], dropped="empty")
        if trained is not None and not any(trained[kept]):
            raise DataError(f"dataset: expected a token to train on in {self._mask!r} of {where}, found none")
        logprobs = self._logprobs(row, ids, trained, where, kept.start)
        return Encoded(ids[kept], trained and trained[kept], logprobs=logprobs and logprobs[kept])

    def _logprobs(
        self, row: Row, ids: list[int], trained: list[bool] | None, where: str, first: int = 0
    ) -> list[float] | None:
        """Of each token, nan where it is not trained on: from one for each of them, or for each that is trained on.

        first: the number of the first token, which follows nothing
        """
        if not self.sampled:
            return None
        found = row.get("logprobs")
        at = [i for i in range(len(ids)) if trained is None or trained[i]]
        if not isinstance(found, list) or len(found) not in (len(ids), len(at)):
            size = len(found) if isinstance(found, list) else show(found)
            few = f"{len(at)} entries" if len(at) == len(ids) else f"{len(at)} entries, or {len(ids)},"
            raise DataError(f"dataset: expected {few} in 'logprobs' of {where}, one for each token, found {size}")
        entries = dict(zip(at if len(found) == len(at) else range(len(ids)), found, strict=True))
        logprobs = [math.nan] * len(ids)
        for i in at:
            if i > first:
                logprobs[i] = _logprob(entries[i], ids[i], f"token {i} of {where}")
        return logprobs

    def _ids(self, row: Row, column: str, where: str) -> list[int]:
        ids = row.get(column)
        if ids is None:
            return []
        if not isinstance(ids, list) or any(type(i) is not int for i in ids):
            raise DataError(f"dataset: expected a list of token ids in {column!r} of {where}, found {show(ids)}")
        bad = [i for i in ids if i < 0 or (self._vocab_size is not None and i >= self._vocab_size)]
        if bad:
            limit = f"below {self._vocab_size:,}, the teacher's vocabulary" if self._vocab_size else "of 0 or more"
            raise DataError(f"dataset: expected token ids {limit} in {column!r} of {where}, found {bad[0]}")
        return ids

    def _trained(self, row: Row, ids: list[int], where: str) -> list[bool]:
        """Which tokens are trained on. A mask and labels are about the token that they stand at, not the next one."""
        name, found = str(self._mask), row.get(str(self._mask))
        if name == "prompt_length":
            if type(found) is not int or not 0 <= found <= len(ids):
                raise DataError(f"dataset: expected a prompt_length of 0 to {len(ids)} in {where}, found {show(found)}")
            return [i >= found for i in range(len(ids))]
        if found is None:
            raise DataError(f"dataset: expected a list in {name!r} of {where}, found null")
        self._expect_length(found, ids, name, where)
        if name == "labels":
            wrong = next((i for i in range(len(ids)) if found[i] not in (-100, ids[i])), None)
            if wrong is not None:
                raise DataError(
                    f"dataset: expected labels that are input_ids or -100, found {found[wrong]} beside {ids[wrong]} at "
                    f"position {wrong} of {where}; labels are not shifted"
                )
            return [label != -100 for label in found]
        if any(one not in (0, 1) for one in found):
            raise DataError(f"dataset: expected zeros and ones in {name!r} of {where}, found {show(found)}")
        return [bool(one) for one in found]

    def _expect_length(self, found: Any, ids: list[int], name: str, where: str) -> None:
        if not isinstance(found, list) or len(found) != len(ids):
            size = len(found) if isinstance(found, list) else show(found)
            raise DataError(
                f"dataset: expected {len(ids)} entries in {name!r} of {where}, as in input_ids, found {size}"
            )


def _logprob(entry: Any, token: int, where: str) -> float:
    """A log-probability, as engines write it: a number, SGLang's (number, id, text), or vLLM's {id: {logprob: ...}}."""
    value: Any = entry
    if isinstance(value, dict) and "logprob" not in value:
        value = value.get(str(token))  # of all ids that were likely, in JSON's words
    if isinstance(value, dict):
        value = value.get("logprob")
    if isinstance(value, list) and len(value) in (2, 3) and value[1] == token:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int | float) or not _LEAST <= value <= _ABOVE_ZERO:
        raise DataError(
            f"dataset: expected a log-probability in 'logprobs' at {where} (id {token}), found {show(entry)}"
        )
    return min(0.0, float(value))
