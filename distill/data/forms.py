"""What the columns of a dataset mean: texts, chats, prompts with completions, instructions, or tokens.

A form turns examples into token ids, and says which of them are trained on. docs/data.md shows each with an example.
"""

from collections.abc import Sequence
from typing import Any

from distill.config.data import DatasetConfig
from distill.data.chat import ChatEncoder
from distill.data.dataset import template_of
from distill.data.files import Row
from distill.data.form import Encoded, Form, empty
from distill.data.ids import Tokens
from distill.data.messages import normalize, parsed, show
from distill.errors import DataError


class Texts(Form):
    """Plain texts, of which every token is trained on."""

    splits, masked = True, False

    def __init__(self, config: DatasetConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self.columns = (config.text_column or "text",)

    def encode(self, rows: Sequence[Row], first: int) -> list[Encoded]:
        """As above, all at once: the tokenizer has threads."""
        name = self.columns[0]
        texts = [self._text(row, name, f"example {i}") for i, row in enumerate(rows, first)]
        try:
            ids = self._tokenizer(texts, verbose=False)["input_ids"]
        except Exception:  # one by one, to find which it is
            ids = [self._tokens(text, f"{name!r} of example {i}") for i, text in enumerate(texts, first)]
        return [
            self._undoubled(tokens) if text else Encoded([], dropped=empty(row, self.columns))
            for row, text, tokens in zip(rows, texts, ids, strict=True)
        ]


class Chats(Form):
    """Lists of messages through the chat template; the assistant's are trained on."""

    name = "messages"
    columns: tuple[str, ...] = ("messages",)
    optional: tuple[str, ...] = ("system", "tools", "chat_template_kwargs")

    def __init__(self, config: DatasetConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self.columns = (config.messages_column or self.columns[0],)
        template = template_of(config.chat_template) if config.chat_template is not None else None
        self._chats = ChatEncoder(tokenizer, template, config.chat_template_kwargs)
        if template is None and not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"dataset: the teacher's tokenizer has no chat template for the column {self.columns[0]}; "
                "dataset.chat_template=FILE names one"
            )
        if not tokenizer.is_fast:
            raise DataError("dataset: expected a fast tokenizer for chats, which knows where its tokens lie in a text")

    def _encode(self, row: Row, where: str) -> Encoded:
        return self._chat(row, self.columns[0], [], where)

    def _chat(self, row: Row, column: str, before: list[Any], where: str, has_system: bool = True) -> Encoded:
        """The chat of a column. before: messages that come before it, and are not trained on."""
        if not row.get(column):
            return Encoded([], dropped=empty(row, (column,)))
        where = f"{column!r} of {where}"
        messages, tools, variables = self._turns(row, column, before, where, has_system)
        return Encoded(*self._chats.encode(messages, where, tools, variables, len(before)))

    def _turns(
        self, row: Row, column: str, before: list[Any], where: str, has_system: bool
    ) -> tuple[list[Any], Any, Any]:
        """The messages of a chat, and what the template is given beside them: tools and variables."""
        messages = [*before, *normalize(row[column], where)]
        system = row.get("system") if has_system else None
        if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        tools = parsed(row.get("tools"), list, "dataset: tools", where)
        variables = parsed(row.get("chat_template_kwargs"), dict, "dataset: chat_template_kwargs", where)
        return messages, tools, variables


class ShareGpt(Chats):
    """Lists of {from, value}."""

    name = "conversations"
    columns: tuple[str, ...] = ("conversations",)


class Instructions(Chats):
    """Alpaca's columns, as a chat where the tokenizer has a template, else as a text and its continuation."""

    name = "instruction"
    columns: tuple[str, ...] = ("instruction", "output")
    optional: tuple[str, ...] = ("input", "system")

    def __init__(self, config: DatasetConfig, tokenizer: Any) -> None:
        self._plain: Completions | None = None
        if getattr(tokenizer, "chat_template", None) or config.chat_template is not None:
            super().__init__(config, tokenizer)
        else:
            Form.__init__(self, config, tokenizer)
            self._plain = Completions(config, tokenizer)
        self.columns = Instructions.columns

    def _encode(self, row: Row, where: str) -> Encoded:
        parts = [self._text(row, name, where) for name in ("instruction", "input", "output")]
        if not parts[2] or not (parts[0] or parts[1]):
            return Encoded([], dropped=empty(row, self.columns))
        question = "\n\n".join(part for part in parts[:2] if part)
        if self._plain is not None:
            return self._plain._encode({"prompt": f"{question}\n\n", "completion": parts[2]}, where)
        asked = {"role": "user", "content": question}
        chat = [asked, {"role": "assistant", "content": parts[2]}]
        return self._chat({"instruction": chat, "system": row.get("system")}, "instruction", [], where)


class Completions(Form):
    """Prompts and their completions, as texts or as messages; only the completion is trained on."""

    name = "prompt_completion"
    columns: tuple[str, ...] = ("prompt", "completion")
    optional: tuple[str, ...] = ("tools", "chat_template_kwargs")

    def __init__(self, config: DatasetConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self._chats: Chats | None = None
        self._anchor = tokenizer("\n", add_special_tokens=False)["input_ids"]

    def _encode(self, row: Row, where: str) -> Encoded:
        if not row.get("completion"):
            return Encoded([], dropped=empty(row, ("completion",)))
        if isinstance(row["completion"], str) and isinstance(row.get("prompt"), str | None):
            return self._texts(row.get("prompt") or "", row["completion"], where)
        if isinstance(row["completion"], str) or isinstance(row.get("prompt"), str):
            raise DataError(
                f"dataset: expected text or messages in both 'prompt' and 'completion' of {where}, found "
                f"{show(row.get('prompt'))} and {show(row['completion'])}"
            )
        self._chats = self._chats or Chats(self._config, self._tokenizer)
        before = normalize(row.get("prompt") or [], f"'prompt' of {where}")
        return self._chats._chat(row, "completion", before, where, has_system=False)

    def _texts(self, prompt: str, completion: str, where: str) -> Encoded:
        """The prompt's tokens are those that it has alone, as when the model is asked; no token lies in both texts."""
        ending = self._tokenizer.eos_token or ""
        if not completion.endswith(ending):
            completion += ending
        asked = self._tokens(prompt, where) if prompt else [*self.prefix, *self.suffix]
        asked = asked[: len(asked) - len(self.suffix)]
        answered = self._continuation(completion, where)
        return self._undoubled(asked + answered, [False] * len(asked) + [True] * len(answered))

    def _continuation(self, text: str, where: str) -> list[int]:
        """The tokens of a text that does not begin a sequence: some tokenizers put a blank before one that does."""
        anchored = self._tokens(f"\n{text}", where, specials=False)
        if anchored[: len(self._anchor)] == self._anchor:
            return anchored[len(self._anchor) :]
        return self._tokens(text, where, specials=False)


def recognize(
    columns: Sequence[str], config: DatasetConfig, tokenizer: Any, vocab_size: int | None
) -> tuple[Form, str]:
    """The form of a dataset with these columns, and a sentence on what else they may mean, or nothing.

    vocab_size: of the teacher. Raises DataError where no form has such columns.
    """
    forms: list[type[Form]] = [Tokens, Chats, ShareGpt, Completions, Instructions, Texts]
    there = {*columns}
    fitting = [form for form in forms if {*form.columns} <= there]
    if {"prompt_ids", "completion_ids"} <= there:
        fitting.insert(0, Tokens)
    named = config.text_column or config.messages_column
    if named is not None:
        key = "text_column" if config.text_column else "messages_column"
        if named not in there:
            raise DataError(f"dataset.{key}: expected a column {named!r} in {config.path}, found {_list(columns)}")
        fitting = [Texts if config.text_column else Chats]
    elif config.form != "auto":
        fitting = [form for form in fitting if form.name == config.form]
    fitting = [form for i, form in enumerate(fitting) if form not in fitting[:i]]
    if not columns:
        raise DataError(f"dataset.path: found no rows in {config.path} (split {config.split})")
    if not fitting:
        raise DataError(
            f"dataset.path: expected columns as in docs/data.md (text, messages, conversations, prompt and completion, "
            f"instruction and output, or input_ids) in {config.path}, found {_list(columns)}; dataset.text_column or "
            "dataset.messages_column names one"
        )
    chosen, others = fitting[0], [form.name for form in fitting[1:]]
    form = Tokens(config, tokenizer, columns, vocab_size) if chosen is Tokens else chosen(config, tokenizer)
    note = f"dataset.form={' or '.join(others)} reads them otherwise" if others else ""
    return form, note


def _list(columns: Sequence[str]) -> str:
    return ", ".join(columns) or "none"
