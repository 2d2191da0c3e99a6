"""From a dataset to samples: load it, tokenize text or chat messages, cut long texts into windows.

A sample is one sequence of token ids. With chat messages it carries a loss mask: True at each position whose NEXT
token was written by the assistant (its end-of-turn marker included).
"""

import glob
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute  # registers pa.compute
from numpy.typing import NDArray

from distill.config import DatasetConfig
from distill.errors import DataError
from distill.fingerprint import digest, text_digest

logger = logging.getLogger(__name__)

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text", ".csv": "csv"}
_DEMO_LONGEST_CHARACTERS = 4000


@dataclass(frozen=True)
class Samples:
    """Tokenized samples on disk (memory-mapped Arrow), in the order of the dataset.

    lengths: [S] int32, tokens of each sample
    """

    lengths: NDArray[np.int32]
    _dataset: Any

    @property
    def has_loss_mask(self) -> bool:
        """Whether the samples are chats."""
        return "loss_mask" in self._dataset.column_names

    def take(self, samples: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """The given samples, concatenated: tokens [N] int32, source [n] int64 and, for chats, loss_mask [N] bool."""
        table = self._dataset.with_format("arrow")[samples]
        found = {"tokens": _flat(table["tokens"]), "source": table["source"].to_numpy()}
        if self.has_loss_mask:
            found["loss_mask"] = _flat(table["loss_mask"])
        return found


def identity(config: DatasetConfig) -> dict[str, str]:
    """What identifies the data beyond the configuration's words: the content of the demo or of local files.

    A hub id is identified by its name: the store keeps the tokens, so that a resume never reads the dataset again.
    """
    if config.path == "demo":
        return {"dataset.content": text_digest("\0".join(row["text"] for row in _demo_rows()))}
    root = Path(config.path).expanduser()
    files = [root] if root.is_file() else [file for file in sorted(root.rglob("*")) if file.is_file()]
    patterns = [config.data_files] if isinstance(config.data_files, str) else config.data_files or []
    base = root if root.is_dir() else Path()
    files += [base / name for pattern in patterns for name in sorted(glob.glob(pattern, root_dir=base, recursive=True))]
    present = [file for file in files if file.is_file() and not file.name.startswith("cache-")]  # datasets' own caches
    return {"dataset.content": digest(present)} if present else {"dataset.path": config.path}


def tokenize(config: DatasetConfig, tokenizer: Any, context_length: int | None) -> Samples:
    """Load the dataset and tokenize it into samples.

    Raises DataError for a dataset that cannot be loaded, a missing column, values that are neither text nor chat, a
    tokenizer without chat template, samples beyond `context_length`, or no tokens at all.
    """
    import datasets

    raw = _load(config)
    column = config.messages_column or config.text_column
    names = raw.column_names or list(next(iter(raw), {}))
    if column not in names:
        key = "messages_column" if config.messages_column else "text_column"
        raise DataError(
            f"dataset.{key}: expected a column {column!r} in {config.path}, found {', '.join(names) or 'none'}"
        )
    if config.messages_column and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "dataset.messages_column: the teacher's tokenizer has no chat template; use dataset.text_column"
        )
    if config.max_samples is not None:
        raw = raw.take(config.max_samples) if config.streaming else raw.select(range(min(config.max_samples, len(raw))))

    columns = {"tokens": datasets.List(datasets.Value("int32")), "source": datasets.Value("int64")}
    if config.messages_column:
        columns["loss_mask"] = datasets.List(datasets.Value("bool"))
    arguments: dict[str, Any] = {
        "function": _Encoder(tokenizer, column, bool(config.messages_column), config.max_length, config.long),
        "batched": True,
        "with_indices": True,
        "remove_columns": names,
        "features": datasets.Features(columns),
    }
    if config.streaming:
        spool = tempfile.mkdtemp(prefix="distill-stream-")
        encoded = datasets.Dataset.from_generator(
            _Rows(raw.map(**arguments)), features=arguments["features"], cache_dir=spool
        )
        weakref.finalize(encoded, shutil.rmtree, spool, ignore_errors=True)
    else:
        workers = config.num_proc if config.num_proc > 1 else None
        encoded = raw.map(**arguments, num_proc=workers, desc="tokenizing")

    lengths = _lengths(encoded)
    if not len(lengths):
        raise DataError(
            f"dataset.path: expected text, found none in {config.path} (split {config.split}, column {column})"
        )
    longest = int(lengths.argmax())
    if context_length is not None and lengths[longest] > context_length:
        raise DataError(
            f"dataset.max_length: expected at most {context_length}, the teacher's context, found a sample of "
            f"{lengths[longest]} tokens (example {encoded[longest]['source']} of {config.path})"
        )
    return Samples(lengths, encoded)


class _Rows:
    """A generator function over a stream, named so that `datasets` can hash it without its contents."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __call__(self) -> Iterator[Any]:
        return iter(self._stream)

    def __reduce__(self) -> Any:
        return _Rows, (None,)


class _Encoder:
    """Turns a batch of examples into samples: tokens, source (index of the example) and, for chats, loss_mask."""

    def __init__(self, tokenizer: Any, column: str, chat: bool, max_length: int | None, long: str) -> None:
        self._tokenizer, self._column, self._chat = tokenizer, column, chat
        self._max_length, self._long = max_length, long
        with_specials = tokenizer("a")["input_ids"]
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._prefix = [] if chat else with_specials[: _find(with_specials, bare)]

    def __call__(self, examples: Any, indices: list[int]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {"tokens": [], "source": []}
        if self._chat:
            columns["loss_mask"] = []
        values = list(examples[self._column])
        encoded = map(self._encode_chat, values, indices) if self._chat else self._encode_texts(values, indices)
        for (tokens, from_assistant), index in zip(encoded, indices, strict=True):
            for window in self._windows(len(tokens)):
                prefix = self._prefix if window.start else []
                columns["tokens"].append(prefix + tokens[window])
                columns["source"].append(index)
                if self._chat:  # the mask speaks of the next token, which the last row of a window has not
                    columns["loss_mask"].append([*from_assistant[window][1:], False])
        return columns

    def _windows(self, length: int) -> list[slice]:
        """How a sequence is cut: later windows leave room for the special tokens that go in front of each."""
        if not length:
            return []
        if self._max_length is None or length <= self._max_length:
            return [slice(0, length)]
        if self._long == "truncate":
            return [slice(0, self._max_length)]
        step = max(1, self._max_length - len(self._prefix))
        return [slice(0, self._max_length), *(slice(at, at + step) for at in range(self._max_length, length, step))]

    def _encode_texts(self, texts: list[Any], indices: list[int]) -> list[tuple[list[int], list[bool]]]:
        for text, index in zip(texts, indices, strict=True):
            if not isinstance(text, str | None):
                raise DataError(
                    f"dataset.text_column: expected text in {self._column!r}, found {_show(text)} in example {index}"
                )
        ids = self._tokenizer([text or "" for text in texts], verbose=False)["input_ids"]
        return [(tokens if text else [], []) for tokens, text in zip(ids, texts, strict=True)]

    def _encode_chat(self, messages: Any, index: int) -> tuple[list[int], list[bool]]:
        """Tokens of a chat and whether each was written by the assistant.

        Templates that mark the assistant's words are asked; for others, a turn's words are what changes in the
        rendered text when that turn is replaced, plus the special token that ends the turn.
        """
        if not messages:
            return [], []
        valid = isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
        )
        if not valid:
            raise DataError(
                f"dataset.messages_column: expected a list of {{role, content}} in {self._column!r}, "
                f"found {_show(messages)} in example {index}"
            )
        turns = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            text = self._render(turns)
            others = [
                self._render([*turns[:i], {**turn, "content": "\u2063"}, *turns[i + 1 :]])
                if turn["role"] == "assistant"
                else text
                for i, turn in enumerate(turns)
            ]
        except Exception as error:  # jinja's own, or whatever a template raises on purpose
            raise DataError(f"dataset.messages_column: the chat template refuses example {index}: {error}") from error
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
        special = set(self._tokenizer.all_special_ids)
        mask = [False] * len(tokens)
        for other in others:
            if other == text:
                continue
            start = len(os.path.commonprefix([text, other]))
            end = len(text) - len(os.path.commonprefix([text[start:][::-1], other[start:][::-1]]))
            inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
            for i in inside:
                mask[i] = True
            following = inside[-1] + 1 if inside else len(tokens)
            if following < len(tokens) and tokens[following] in special:
                mask[following] = True
        return tokens, mask

    def _render(self, turns: list[dict[str, Any]]) -> str:
        return str(self._tokenizer.apply_chat_template(turns, tokenize=False))


def _load(config: DatasetConfig) -> Any:
    """The raw dataset, map-style or streaming. Raises DataError where it cannot be loaded."""
    import datasets

    if config.path == "demo":
        demo = datasets.Dataset.from_list(_demo_rows())
        return demo.to_iterable_dataset() if config.streaming else demo
    path = Path(config.path).expanduser()
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(path))
            if isinstance(saved, datasets.DatasetDict):
                if config.split not in saved:
                    raise DataError(f"dataset.split: expected one of {', '.join(saved)}, found {config.split}")
                saved = saved[config.split]
            return saved.to_iterable_dataset() if config.streaming else saved
        if path.is_file():
            if path.suffix not in _BUILDERS:
                raise DataError(f"dataset.path: expected a file named {' '.join(_BUILDERS)}, found {path.name}")
            return datasets.load_dataset(
                _BUILDERS[path.suffix], data_files=str(path), split=config.split, streaming=config.streaming
            )
        if config.path.startswith(("/", "./", "../", "~")) and not path.is_dir():
            raise DataError(f"dataset.path: found no file or folder {config.path}")
        return datasets.load_dataset(
            config.path, config.name, data_files=config.data_files, split=config.split, streaming=config.streaming
        )
    except DataError:
        raise
    except Exception as error:  # load_dataset raises several dozen kinds, from the parsers' to the network's
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"dataset.path: cannot load {config.path} (split {config.split}): {line}") from error


def _demo_rows() -> list[dict[str, str]]:
    """CPython's own help topics, the short ones: real text on every machine, and few enough for a CPU."""
    from pydoc_data.topics import topics

    return [{"text": text} for _, text in sorted(topics.items()) if len(text) <= _DEMO_LONGEST_CHARACTERS]


def _lengths(dataset: Any) -> NDArray[np.int32]:
    """[S] int32: tokens of each sample, from the Arrow offsets, without reading a token."""
    chunks = dataset.with_format("arrow").data.column("tokens").chunks
    return np.concatenate(
        [np.zeros(0, np.int32), *(pa.compute.list_value_length(chunk).to_numpy() for chunk in chunks)]
    ).astype(np.int32)


def _flat(column: pa.ChunkedArray) -> NDArray[Any]:
    return np.asarray(column.combine_chunks().flatten().to_numpy(zero_copy_only=False))


def _find(tokens: list[int], part: list[int]) -> int:
    """Where `part` begins in `tokens`; 0 if it is nowhere."""
    return next((i for i in range(len(tokens)) if tokens[i : i + len(part)] == part), 0)


def _show(value: Any) -> str:
    return f"{repr(value)[:40]} ({type(value).__name__})"
