"""From a dataset to samples: load it, tokenize text or chat messages, cut long texts into windows.

A sample is one sequence of token ids. With chat messages it carries a loss mask: True at each position whose NEXT
token was written by the assistant (its end-of-turn marker included).
"""

import glob
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute  # registers pa.compute
from numpy.typing import NDArray

from distill.chat import encode_chat
from distill.config import DatasetConfig
from distill.errors import DataError, UserError, first_line
from distill.fingerprint import digest, text_digest

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


def identity(config: DatasetConfig, ours: Sequence[str]) -> dict[str, Any]:
    """What identifies the data beyond the configuration's other words: the content of the demo or of local files.

    Remote data are identified by name: the store keeps the tokens, so that a resume never reads the dataset again.
    ours: folders that a run writes, and that are no data should they lie in the dataset's folder.
    """
    if config.path == "demo":
        return {"dataset.content": text_digest("\0".join(row["text"] for row in _demo_rows()))}
    root = Path(config.path).expanduser()
    base = root if root.is_dir() else Path()
    files = [root] if root.is_file() else sorted(root.rglob("*"))
    remote = [] if files else [config.path]
    for pattern in [config.data_files] if isinstance(config.data_files, str) else config.data_files or []:
        found = [base / name for name in sorted(glob.glob(pattern, root_dir=base, recursive=True))]
        files += found
        remote += [] if found else [pattern]
    written = [Path(folder).absolute() for folder in ours]
    try:
        content = digest(
            file
            for file in files
            if file.is_file()
            and not file.name.startswith("cache-")  # datasets' own, beside saved datasets
            and not any(file.absolute().is_relative_to(folder) for folder in written)
        )
    except OSError as error:
        raise DataError(f"dataset.path: cannot read {error.filename}: {error.strerror}") from error
    return {"dataset.content": content} if not remote else {"dataset.content": content, "dataset.remote": remote}


def tokenize(config: DatasetConfig, tokenizer: Any, context_length: int | None) -> Samples:
    """Load the dataset and tokenize it into samples.

    Raises DataError for a dataset that cannot be loaded, a missing column, values that are neither text nor chat, a
    tokenizer without chat template, samples beyond `context_length`, or no tokens at all.
    """
    import datasets

    raw = _load(config)
    column = config.messages_column or config.text_column
    with _as_data_error(config):
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
    if config.messages_column and not tokenizer.is_fast:
        raise DataError(
            "dataset.messages_column: expected a fast tokenizer, which knows where its tokens lie in a text"
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
    with _as_data_error(config):
        if config.streaming:
            spool = tempfile.mkdtemp(prefix="distill-stream-")
            encoded = datasets.Dataset.from_generator(
                _Rows(raw.map(**arguments)), features=arguments["features"], cache_dir=spool
            )
            weakref.finalize(encoded, shutil.rmtree, spool, ignore_errors=True)
        else:  # never from datasets' cache, which does not know when our code or the tokenizer's changed
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
        self._prefix = with_specials[: _find(with_specials, bare)]

    def __call__(self, examples: Any, indices: list[int]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {"tokens": [], "source": []}
        if self._chat:
            columns["loss_mask"] = []
        values = list(examples[self._column])
        encoded = self._encode_chats(values, indices) if self._chat else self._encode_texts(values, indices)
        for (tokens, from_assistant), index in zip(encoded, indices, strict=True):
            prefix = self._prefix if tokens[: len(self._prefix)] == self._prefix else []  # a template may have none
            for window in _windows(len(tokens), self._max_length, self._long, len(prefix)):
                repeated = prefix if window.start else []
                columns["tokens"].append(repeated + tokens[window])
                columns["source"].append(index)
                if self._chat:  # the mask speaks of the next token, which the last row of a window has not
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
    """How a sequence is cut; later windows leave room for the `prefix` special tokens put in front of each."""
    if not length:
        return []
    if max_length is None or length <= max_length:
        return [slice(0, length)]
    if long == "truncate":
        return [slice(0, max_length)]
    step = max(1, max_length - prefix)
    return [slice(0, max_length), *(slice(at, at + step) for at in range(max_length, length, step))]


def _load(config: DatasetConfig) -> Any:
    """The raw dataset, map-style or streaming. Raises DataError where it cannot be loaded."""
    import datasets

    if config.path == "demo":
        demo = datasets.Dataset.from_list(_demo_rows())
        return demo.to_iterable_dataset() if config.streaming else demo
    path = Path(config.path).expanduser()
    if path.is_file() and path.suffix not in _BUILDERS:
        raise DataError(f"dataset.path: expected a file named {' '.join(_BUILDERS)}, found {path.name}")
    if config.path.startswith(("/", "./", "../", "~")) and not path.exists():
        raise DataError(f"dataset.path: found no file or folder {config.path}")
    with _as_data_error(config):
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(path))
            splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
            if config.split not in splits:
                raise DataError(f"dataset.split: expected {' or '.join(splits)}, found {config.split}")
            chosen = splits[config.split]
            return chosen.to_iterable_dataset() if config.streaming else chosen
        builder, files = config.path, config.data_files
        if path.is_file():
            builder, files = _BUILDERS[path.suffix], str(path)
        elif path.is_dir():
            builder = str(path)
        return datasets.load_dataset(
            builder, config.name, data_files=files, split=config.split, streaming=config.streaming
        )


@contextmanager
def _as_data_error(config: DatasetConfig) -> Iterator[None]:
    """`datasets` raises several dozen kinds, its parsers' and the network's among them, and wraps even ours."""
    try:
        yield
    except Exception as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
            causes.append(cause)
        for cause in causes:
            if isinstance(cause, UserError):
                raise cause from None
        if any(isinstance(cause, StopIteration) for cause in causes):
            raise DataError(f"dataset.path: found no rows in {config.path} (split {config.split})") from error
        line = first_line(error) if len(causes) == 1 else f"{first_line(error)} ({first_line(causes[-1])})"
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
