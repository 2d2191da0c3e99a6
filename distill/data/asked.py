"""What the columns of a dataset ask a student: texts to continue, chats, prompts, instructions, or prompts' ids.

`forms` reads the same columns with their answers. What the
assistant has said last in a chat is such an answer: the student writes its own.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

from distill.config.data import DatasetConfig
from distill.data.chat import ChatEncoder
from distill.data.files import Row
from distill.data.form import Encoded, Form, empty
from distill.data.forms import Chats, Texts
from distill.data.ids import Tokens
from distill.data.messages import normalize, show
from distill.errors import DataError


class AskedTexts(Texts):
    """Texts, which the student continues: the tokens of a text, without the special ones at its end."""

    def encode(self, rows: Sequence[Row], first: int) -> list[Encoded]:
        """As in Form."""
        return [found._replace(tokens=_open(self, found.tokens)) for found in super().encode(rows, first)]


class AskedChats(Chats):
    """Chats up to the generation prompt of the next turn."""

    def _chat(self, row: Row, column: str, before: list[Any], where: str, has_system: bool = True) -> Encoded:
        if not row.get(column):
            return Encoded([], dropped=empty(row, (column,)))
        where = f"{column!r} of {where}"
        messages, tools, variables = self._turns(row, column, before, where, has_system)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            return Encoded([], dropped="empty")
        tokens, notes = self._chats.prompt(messages, where, tools, variables)
        return Encoded(tokens, None, notes)


class AskedShareGpt(AskedChats):
    """The same of ShareGPT's messages."""

    name = "conversations"
    columns: tuple[str, ...] = ("conversations",)


class AskedPrompts(Form):
    """Prompts, each a text or a list of messages."""

    name = "prompt"
    columns: tuple[str, ...] = ("prompt",)
    optional: tuple[str, ...] = ("tools", "chat_template_kwargs")

    def __init__(self, config: DatasetConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self._chats: AskedChats | None = None

    def _encode(self, row: Row, where: str) -> Encoded:
        found = row.get("prompt")
        if not found:
            return Encoded([], dropped=empty(row, self.columns))
        if isinstance(found, str):
            return self._undoubled(_open(self, self._tokens(found, where)))
        if not isinstance(found, list):
            raise DataError(f"dataset: expected text or messages in 'prompt' of {where}, found {show(found)}")
        self._chats = self._chats or AskedChats(self._config, self._tokenizer)
        return self._chats._chat(row, "prompt", [], where, has_system=False)


class AskedInstructions(AskedPrompts):
    """Instructions, as a chat where the tokenizer has a template, else as a text."""

    name = "instruction"
    columns: tuple[str, ...] = ("instruction",)
    optional: tuple[str, ...] = ("input", "system")

    def _encode(self, row: Row, where: str) -> Encoded:
        question = "\n\n".join(part for name in ("instruction", "input") if (part := self._text(row, name, where)))
        if not question:
            return Encoded([], dropped=empty(row, self.columns))
        if not getattr(self._tokenizer, "chat_template", None) and self._config.chat_template is None:
            return super()._encode({"prompt": f"{question}\n\n"}, where)
        self._chats = self._chats or AskedChats(self._config, self._tokenizer)
        chat = {"instruction": normalize({"role": "user", "content": question}, where), "system": row.get("system")}
        return self._chats._chat(chat, "instruction", [], where)


class AskedIds(Form):
    """Ids of prompts, as they are."""

    name = "prompt_ids"
    columns: tuple[str, ...] = ("prompt_ids",)

    def __init__(self, config: DatasetConfig, tokenizer: Any, vocab_size: int) -> None:
        super().__init__(config, tokenizer)
        self._form = Tokens(config, tokenizer, self.columns, vocab_size)

    def _encode(self, row: Row, where: str) -> Encoded:
        return Encoded(self._form._ids(row, "prompt_ids", where), dropped=empty(row, self.columns))


def ask(columns: Sequence[str], config: DatasetConfig, tokenizer: Any, vocab_size: int) -> Form:
    """The form of prompts with these columns, the first that fits. vocab_size: of the student.

    Raises DataError where there is none.
    """
    named = config.text_column or config.messages_column
    if named is not None and named not in columns:
        key = "text_column" if config.text_column else "messages_column"
        raise DataError(f"dataset.{key}: expected a column {named!r} in {config.path}, found {', '.join(columns)}")
    if named is not None:
        return (AskedTexts if config.text_column else AskedChats)(config, tokenizer)
    if "prompt_ids" in columns:
        return AskedIds(config, tokenizer, vocab_size)
    for form in (AskedChats, AskedShareGpt, AskedPrompts, AskedInstructions, AskedTexts):
        if form.columns[0] in columns:
            return form(config, tokenizer)
    raise DataError(
        "dataset.path: expected a column prompt_ids, messages, conversations, prompt, instruction or text in "
        f"{config.path}, found {', '.join(columns) or 'none'}; dataset.text_column or dataset.messages_column names one"
    )


def turn_end(tokenizer: Any) -> int | None:
    """The special token that ends the assistant's turn in the chat template; None where that cannot be told."""
    chat = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    with contextlib.suppress(Exception):  # no template, or one that wants other chats
        tokens, trained, _ = ChatEncoder(tokenizer, None, {}).encode(chat, "a chat")
        last = [token for token, of_assistant in zip(tokens, trained, strict=True) if of_assistant][-1]
        return last if last in tokenizer.added_tokens_decoder else None
    return None


def _open(form: Form, tokens: list[int]) -> list[int]:
    """The tokens of a text that goes on: without the special ones that the tokenizer puts at an end."""
    size = len(form.suffix)
    return tokens[:-size] if size and tokens[-size:] == form.suffix else tokens
