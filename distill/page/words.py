"""Tokens as text: each token's own part of what the tokens read together."""

from collections.abc import Sequence
from typing import Any

_LONGEST_CHARACTER = 6
"""Tokens that may be needed for one character; what is not one after so many is shown as it is."""

_VISIBLE = {"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "␣"}


def pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The part of the text that each token adds. Joined they are the text, but for characters that are never whole.

    A character may be made of several tokens: it is the part of the last of them, and those before have an empty one.
    tokenizer: None where there is none; then each token is shown as its id.
    """
    if tokenizer is None:
        return [f" #{token}" for token in tokens]
    found = []
    known, done = 0, 0  # the text of tokens [known, done) has been given out; it says how the next one is spelled
    for i in range(len(tokens)):
        before = _text(tokenizer, tokens[known:done])
        text = _text(tokenizer, tokens[known : i + 1])
        whole = len(text) > len(before) and not text.endswith("�")
        if not whole and i + 1 - done < _LONGEST_CHARACTER and i + 1 < len(tokens):
            found.append("")
            continue
        found.append(text[len(before) :])
        known, done = done, i + 1
    return found


def _text(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)) if len(tokens) else ""


class Words:
    """Single ids as words in which blanks are seen; each is decoded once, and has a number, so that a page has it once.

    words: all that were asked for, by their numbers
    """

    def __init__(self, tokenizer: Any) -> None:
        """tokenizer: None where there is none; then each word is an id."""
        self._tokenizer, self._numbers = tokenizer, dict[int, int]()
        self.words: list[str] = []

    def number(self, token: int) -> int:
        """The number of an id's word."""
        if token not in self._numbers:
            self._numbers[token] = len(self.words)
            self.words.append(self._word(token))
        return self._numbers[token]

    def _word(self, token: int) -> str:
        text = "" if self._tokenizer is None else _text(self._tokenizer, [token])
        if not text:  # ids beyond the tokenizer's vocabulary have no text
            return f"#{token}"
        if "�" in text:  # a part of a character
            return f"{self._tokenizer.convert_ids_to_tokens(token)} (bytes)"
        if not text.startswith(" ") and str(self._tokenizer.convert_ids_to_tokens(token)).startswith("▁"):
            text = f" {text}"  # SentencePiece's: a single token is decoded as the first of a text
        return "".join(_VISIBLE.get(c, c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)
