"""Read local files as they are: each row a dict, from the file itself at every run, never from a library's cache.

Rows of JSON are what Python's json module makes of them, so that a column may have another type in every row. Only the
columns that are asked for are read where the format allows it (Parquet, Arrow).
"""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet

from distill.errors import DataError, first_line

Row = dict[str, Any]

_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda file: pa.input_stream(str(file), compression="zstd"),
}
_LISTS_OF_A_RECORD = {"messages", "conversations", "prompt", "completion", "tools"}
_BATCH_ROWS, _BATCH_BYTES = 256, 1 << 20


def kind(file: Path) -> str | None:
    """The ending that tells how a file is read, without that of its compression: .jsonl; None where it cannot be."""
    plain = file.with_suffix("") if file.suffix in _OPENERS else file
    if plain.suffix in (".parquet", ".arrow") and plain != file:
        return None
    return plain.suffix if plain.suffix in _READERS else None


def kinds() -> str:
    """All endings of files that can be read, in words."""
    return f"{' '.join(_READERS)}, and the first five also with {' '.join(_OPENERS)}"


def read(file: Path, columns: Sequence[str] | None, split: str) -> Iterator[Row]:
    """The rows of a file. columns: those that are needed; None = all. split: takes a list out of a JSON object.

    Raises DataError, with the file and the line, for what is not of the format that the file's name tells.
    """
    reader = _READERS[kind(file) or ""]
    try:
        yield from reader(file, columns, split)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"dataset.path: {file}: expected UTF-8, found another encoding: {error}") from error
    except (OSError, EOFError, lzma.LZMAError, ValueError, pa.ArrowException) as error:
        raise DataError(f"dataset.path: cannot read {file}: {first_line(error)}") from error


def without_nulls(value: Any) -> Any:
    """A value as it was before Arrow gave all dicts of a column the same keys: no entry is null, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list) and not (value and isinstance(value[0], int | float | str)):  # Arrow's have one type
        return [without_nulls(entry) for entry in value]
    return value


def _bytes(file: Path) -> Any:
    return _OPENERS[file.suffix](file) if file.suffix in _OPENERS else file.open("rb")


def _text(file: Path, newline: str | None) -> IO[str]:
    """A text file of UTF-8, without the mark that some editors put at its beginning."""
    return io.TextIOWrapper(_bytes(file), encoding="utf-8-sig", newline=newline)


def _lines(file: Path, _columns: Any, _split: str) -> Iterator[Row]:
    with _text(file, newline=None) as lines:
        for line in lines:
            yield {"text": line.removesuffix("\n")}


def _json_lines(file: Path, _columns: Any, _split: str) -> Iterator[Row]:
    with _text(file, newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"dataset.path: {file} line {number}: expected JSON, found none: {error}") from error
            yield _object(row, f"{file} line {number}")


def _json(file: Path, columns: Any, split: str) -> Iterator[Row]:
    """A list of rows, an object with such a list, or JSON lines under the wrong name."""
    with _text(file, newline="\n") as lines:
        filled = (line for line in lines if line.strip())
        first, second = next(filled, ""), next(filled, "")
    try:
        alone = json.loads(first)
    except ValueError:
        alone = None
    if not first.strip():
        return
    if isinstance(alone, dict) and (second or not _lists_in(alone) or _LISTS_OF_A_RECORD & {*alone}):
        yield from _json_lines(file, columns, split)
        return
    with _text(file, newline="\n") as whole:
        try:
            content = json.load(whole)
        except ValueError as error:
            raise DataError(f"dataset.path: {file}: expected JSON, found none: {error}") from error
    if isinstance(content, dict) and _LISTS_OF_A_RECORD & {*content}:
        content = [content]
    if isinstance(content, dict):
        lists = _lists_in(content)
        name = split if split in lists else next(iter(lists), "")
        if name not in lists or (len(lists) > 1 and name != split):
            found = " and ".join(lists) or "none"
            raise DataError(f"dataset.path: {file}: expected a list of objects in its object, found {found}")
        content = lists[name]
    if not isinstance(content, list):
        raise DataError(f"dataset.path: {file}: expected a list of objects, found a {type(content).__name__}")
    yield from (_object(row, f"{file} entry {number}") for number, row in enumerate(content))


def _lists_in(content: Row) -> dict[str, list[Any]]:
    """The entries of an object that are lists of objects."""
    return {
        name: entry
        for name, entry in content.items()
        if isinstance(entry, list) and entry and all(isinstance(row, dict) for row in entry)
    }


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"dataset.path: {where}: expected an object of columns, found {repr(row)[:40]}")
    return row


def _csv(file: Path, _columns: Any, _split: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    with _text(file, newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t" if kind(file) == ".tsv" else ",", strict=True)
        try:
            names = list(reader.fieldnames or [])
            if twice := [name for name in names if names.count(name) > 1]:
                raise DataError(f"dataset.path: {file} line 1: expected different columns, found {twice[0]} twice")
            for row in reader:
                if None in row:
                    found = len(reader.fieldnames or []) + len(row[None])
                    expected = f"expected {len(reader.fieldnames or [])} fields, found {found}"
                    raise DataError(f"dataset.path: {file} line {reader.line_num}: {expected}")
                yield row
        except csv.Error as error:
            raise DataError(f"dataset.path: {file} line {reader.line_num}: {error}") from error


def _parquet(file: Path, columns: Sequence[str] | None, _split: str) -> Iterator[Row]:
    with pa.parquet.ParquetFile(file) as opened:
        there = [name for name in opened.schema_arrow.names if columns is None or name in columns]
        for batch in opened.iter_batches(_BATCH_ROWS, columns=there):
            step = max(1, _BATCH_BYTES * batch.num_rows // max(1, batch.nbytes))  # as Python's objects they are larger
            for at in range(0, batch.num_rows, step):
                yield from map(without_nulls_below, batch.slice(at, step).to_pylist())


def _arrow(file: Path, columns: Sequence[str] | None, _split: str) -> Iterator[Row]:
    import datasets

    return saved_rows(datasets.Dataset.from_file(str(file)), columns)


def saved_rows(dataset: Any, columns: Sequence[str] | None) -> Iterator[Row]:
    """The rows of a dataset of the library `datasets`, map-style or streaming."""
    there = dataset.column_names
    if there is not None and columns is not None:
        dataset = dataset.select_columns([name for name in there if name in columns])
    return map(without_nulls_below, dataset)


def without_nulls_below(row: Row) -> Row:
    """A row whose columns may be null, and nothing in them."""
    return {name: without_nulls(value) for name, value in row.items()}


def first_rows(rows: Iterator[Row], count: int) -> tuple[list[Row], Iterator[Row]]:
    """The first rows, and all rows."""
    first = list(itertools.islice(rows, count))
    return first, itertools.chain(first, rows)


_READERS: dict[str, Callable[[Path, Sequence[str] | None, str], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".txt": _lines,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
