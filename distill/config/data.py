"""Settings of the data that is read."""

from dataclasses import dataclass
from typing import Any

from distill.errors import ConfigError
from distill.settings import key


@dataclass(frozen=True)
class ExamplesConfig:
    """Where examples are, and what is read of them."""

    path: str = key(
        "demo", "hub id, file, glob, folder, save_to_disk folder, or builder; docs/data.md; demo", path=True
    )
    name: str | None = key(None, "configuration of the dataset, as in datasets.load_dataset")
    split: str = key("train", "split of the dataset; where there is only one, that one instead of train")
    data_files: str | list[str] | None = key(None, "file, glob or list of them, as in datasets.load_dataset", path=True)
    text_column: str | None = key(None, "column of plain text, if it is not called text")
    messages_column: str | None = key(None, "column of chat messages, if it is not called messages or conversations")
    chat_template: str | None = key(None, "file of a chat template, instead of the tokenizer's own", path=True)
    chat_template_kwargs: dict[str, Any] = key({}, "variables for the chat template, e.g. {enable_thinking: false}")
    max_samples: int | None = key(None, "use only the first N examples of the dataset", least=1)


@dataclass(frozen=True)
class DatasetConfig(ExamplesConfig):
    """Which texts or chats the teacher reads, and how they become samples."""

    form: str = key(
        "auto", "what the columns mean; auto = what their names say (docs/data.md)",
        ("auto", "text", "messages", "conversations", "prompt_completion", "instruction", "tokens"),
    )  # fmt: skip
    streaming: bool = key(False, "read a dataset of the hub as a stream, without storing its raw text")
    max_length: int | str | None = key(
        "auto",
        "most tokens in a sample; auto = 1024 for texts, the teacher's context for all others; null = no limit",
        ("auto",),
        least=2,
    )
    long: str = key(
        "split", "beyond max_length: texts are split into windows (all others: truncated), truncated, or dropped",
        ("split", "truncate", "drop"),
    )  # fmt: skip
    num_proc: int = key(1, "processes that tokenize", least=1)

    def __post_init__(self) -> None:
        named = [self.text_column, self.messages_column, None if self.form == "auto" else self.form]
        if sum(name is not None for name in named) > 1:
            raise ConfigError(f"dataset: expected one of text_column, messages_column and form, found {named}")
