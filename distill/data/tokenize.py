"""From the examples of a dataset to samples: tokenize texts or chats, and cut long ones into windows.

A sample is one sequence of token ids. A chat's sample also has a loss mask: True at each position whose NEXT token the
assistant wrote, the token that ends its turn among them.

S samples, N tokens of several samples.
"""

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute  # registers pa.compute
from numpy.typing import NDArray

from distill.config import DatasetConfig
from distill.data.chat import encode_chat
from distill.data.dataset import as_data_error, load
from distill.errors import DataError


@dataclass(frozen=True)
class Samples:
    """Tokenized samples on disk (memory-mapped Arrow), in the order of the dataset.

    lengths: [S] int32, the number of tokens of each sample
    """

    lengths: NDArray[np.int32]
    _dataset: Any

    @property
    def largest_token(self) -> int:
        """The largest token id of all samples."""
        chunks = self._dataset.with_format("arrow").data.column("tokens").chunks
        return int(max(pa.compute.max(chunk.flatten()).as_py() for chunk in chunks if len(chunk)))

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


def tokenize(config: DatasetConfig, tokenizer: Any, context_length: int | None) -> Samples:
    """Load the dataset and tokenize it into samples.

    Raises DataError for a dataset that cannot be loaded, a missing column, values that are neither text nor chat, a
    tokenizer without chat template, samples longer than `context_length`, or no tokens at all.
    """
    import datasets

    raw, column, is_chat = load(config), config.messages_column or config.text_column, bool(config.messages_column)
    with as_data_error(config):
        names = raw.column_names or list(next(iter(raw), {}))
    _check(config, column, names, tokenizer)
    if config.max_samples is not None:
        raw = raw.take(config.max_samples) if config.streaming else raw.select(range(min(config.max_samples, len(raw))))
    features = {"tokens": datasets.List(datasets.Value("int32")), "source": datasets.Value("int64")}
    features |= {"loss_mask": datasets.List(datasets.Value("bool"))} if is_chat else {}
    arguments: dict[str, Any] = {
        "function": _Encoder(tokenizer, column, is_chat, config.max_length, config.long),
        "batched": True,
        "with_indices": True,
        "remove_columns": names,
        "features": datasets.Features(features),
    }
    with as_data_error(config):
        if config.streaming:
            spool = tempfile.mkdtemp(prefix="distill-stream-")
            stream = _Rows(raw.map(**arguments))
            encoded = datasets.Dataset.from_generator(stream, features=arguments["features"], cache_dir=spool)
            weakref.finalize(encoded, shutil.rmtree, spool, ignore_errors=True)
        else:  # not from datasets' cache, which does not know when our code or the tokenizer has changed
            workers = config.num_proc if config.num_proc > 1 else None
            encoded = raw.map(**arguments, num_proc=workers, desc="tokenizing", load_from_cache_file=False)

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


def _check(config: DatasetConfig, column: str, names: list[str], tokenizer: Any) -> None:
    """Raise DataError where the column is missing, or the tokenizer cannot encode chats."""
    if column not in names:
        key = "messages_column" if config.messages_column else "text_column"
        raise DataError(
            f"dataset.{key}: expected a column {column!r} in {config.path}, found {', '.join(names) or 'none'}"
        )
    if config.messages_column and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "dataset.messages_column: the teacher's tokenizer has no chat template; use dataset.text_column"
        )
    if config.messages_column and not tokenizer.is_fast:
        raise DataError(
            "dataset.messages_column: expected a fast tokenizer, which knows where its tokens lie in a text"
        )


class _Rows:
    """A generator function over a stream. `datasets` pickles it to hash it; the pickle leaves out the stream."""

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
        self._prefix = with_specials[: _find(with_specials, bare)]

    def __call__(self, examples: Any, indices: list[int]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {"tokens": [], "source": []}
        if self._chat:
            columns["loss_mask"] = []
        values = list(examples[self._column])
        encoded = self._encode_chats(values, indices) if self._chat else self._encode_texts(values, indices)
        for (tokens, from_assistant), index in zip(encoded, indices, strict=True):
            prefix = self._prefix if tokens[: len(self._prefix)] == self._prefix else []  # not with every template
            for window in _windows(len(tokens), self._max_length, self._long, len(prefix)):
                repeated = prefix if window.start else []
                columns["tokens"].append(repeated + tokens[window])
                columns["source"].append(index)
                if self._chat:  # the mask is about the next token, and the last row of a window has none
                    columns["loss_mask"].append([False] * len(repeated) + from_assistant[window][1:] + [False])
        return columns

    def _encode_chats(self, chats: list[Any], indices: list[int]) -> list[tuple[list[int], list[bool]]]:
        where = f"{self._column!r}, example"
        return [encode_chat(self._tokenizer, chat, f"{where} {i}") for chat, i in zip(chats, indices, strict=True)]

    def _encode_texts(self, texts: list[Any], indices: list[int]) -> list[tuple[list[int], list[bool]]]:
        for text, index in zip(texts, indices, strict=True):
            if not isinstance(text, str | None):
                raise DataError(
                    f"dataset.text_column: expected text in {self._column!r}, found {_show(text)} in example {index}"
                )
        ids = self._tokenizer([text or "" for text in texts], verbose=False)["input_ids"]
        return [(tokens if text else [], []) for tokens, text in zip(ids, texts, strict=True)]


def _windows(length: int, max_length: int | None, long: str, prefix: int) -> list[slice]:
    """How a sequence is cut. Windows after the first leave room for `prefix` special tokens, which come before each."""
    if not length:
        return []
    if max_length is None or length <= max_length:
        return [slice(0, length)]
    if long == "truncate":
        return [slice(0, max_length)]
    step = max(1, max_length - prefix)
    return [slice(0, max_length), *(slice(at, at + step) for at in range(max_length, length, step))]


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
