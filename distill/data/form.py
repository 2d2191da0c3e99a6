"""A form: one meaning of a dataset's columns. It turns examples into token ids, and says which are trained on."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from distill.config.data import DatasetConfig
from distill.data.files import Row
from distill.data.messages import show
from distill.errors import DataError


class Encoded(NamedTuple):
    """An example's tokens; trained: whether each is trained on, None = all are. dropped: why there are no tokens.

    logprobs: of each token, of whoever sampled it, nan where it is not trained on; None = nobody says
    notes: what a user should know about it, the end of a sentence that begins with a number of examples
    """

    tokens: list[int]
    trained: list[bool] | None = None
    notes: tuple[str, ...] = ()
    dropped: str = ""
    logprobs: list[float] | None = None


class Form:
    """One meaning of columns.

    columns: those that it needs. optional: those that it uses where they are. splits: whether a long example may be cut
    into windows that are trained on one by one. masked: whether not every token may be trained on. sampled: whether
    examples have log-probabilities. prefix, suffix: the special tokens that the tokenizer puts around a text.
    """

    name = "text"
    columns: tuple[str, ...] = ("text",)
    optional: tuple[str, ...] = ()
    splits, masked, sampled = False, True, False

    def __init__(self, config: DatasetConfig, tokenizer: Any) -> None:
        self._config, self._tokenizer = config, tokenizer
        whole, bare = (tokenizer("a", add_special_tokens=specials)["input_ids"] for specials in (True, False))
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        self.prefix, self.suffix = list(whole[:at]), list(whole[at + len(bare) :])

    def encode(self, rows: Sequence[Row], first: int) -> list[Encoded]:
        """The examples' tokens. first: the number of the first one. Raises DataError, with an example's number."""
        return [self._encode(row, f"example {i}") for i, row in enumerate(rows, first)]

    def _encode(self, row: Row, where: str) -> Encoded:
        raise NotImplementedError

    def _tokens(self, text: str, where: str, specials: bool = True) -> list[int]:
        """The tokens of a text, with the tokenizer's special tokens."""
        return list(encoding(self._tokenizer, text, where, add_special_tokens=specials)["input_ids"])

    def _undoubled(self, tokens: list[int], trained: list[bool] | None = None) -> Encoded:
        """A text with one beginning, where it began with the tokenizer's special tokens already."""
        size = len(self.prefix)
        if not size or tokens[: 2 * size] != 2 * self.prefix:
            return Encoded(tokens, trained)
        note = f"begin with {self._tokenizer.decode(self.prefix)} already and got no second one"
        return Encoded(tokens[size:], trained and trained[size:], (note,))

    def _text(self, row: Row, column: str, where: str) -> str:
        value = row.get(column)
        if not isinstance(value, str | None):
            raise DataError(f"dataset: expected text in {column!r} of {where}, found {show(value)}")
        return value or ""


def encoding(tokenizer: Any, text: str, where: str, **options: Any) -> Any:
    """What the tokenizer makes of a text. Raises DataError for one that it does not accept."""
    try:
        return tokenizer(text, verbose=False, **options)
    except Exception as error:  # the tokenizer's own
        raise DataError(f"dataset: expected valid Unicode in {where}, {_fault(text, error)}") from error


def empty(row: Row, columns: Sequence[str]) -> str:
    """Why an example without words is dropped: one of its columns is null, or they are empty."""
    return "null" if any(row.get(name) is None for name in columns) else "empty"


def _fault(text: str, error: Exception) -> str:
    """What a tokenizer does not accept: half of a character that JSON writes as two."""
    half = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
    if half is None:
        return f"the tokenizer says: {error}"
    return f"found half of a surrogate pair, {text[half]!a}, at character {half}"
