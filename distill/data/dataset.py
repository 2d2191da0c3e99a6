"""Find a dataset: the demo, local files and folders, a dataset that was saved to disk, or one of the hub.

Local files are read by files.py. The library `datasets` reads what it has saved, and what is not on this machine.
"""

import glob
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

from distill.config.data import DatasetConfig
from distill.data.files import Row, first_rows, kind, kinds, read, saved_rows
from distill.errors import DataError, UserError, first_line
from distill.store.fingerprint import digest, text_digest

_DEMO_LONGEST_CHARACTERS = 4000
_BUILDERS = ("json", "csv", "parquet", "text", "arrow")
_FIRST_ROWS = 100

MANIFEST, PART = "rollouts.json", "part_{}.parquet"
"""The files of a folder of distill.rollout: what it says of itself, and each part."""


@dataclass
class Data:
    """A dataset that was found, and is not read yet.

    files:    the local files that are read, in order, or those of a saved dataset; none where it is elsewhere
    notes:    what was decided that a user should know, in sentences
    written:  what identifies the vocabulary of the student that wrote it, if distill.rollout says so
    """

    config: DatasetConfig
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    written: Any = None

    def __post_init__(self) -> None:
        self._found = self._marks()

    @property
    def name(self) -> str:
        """What a user calls it."""
        return self.config.path if self.config.path != "demo" or not self.files else str(self.config.data_files)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What identifies the data beside the settings: the content of the demo, or of every local file.

        Remote data are identified by name. A resumed run does not read them again, since the store has their tokens.
        """
        found: dict[str, Any] = {}
        if (template := self.config.chat_template) is not None:
            found["dataset.chat_template"] = text_digest(template_of(template))
        if self.is_demo:
            return found | {"dataset.content": text_digest("\0".join(row["text"] for row in _demo_rows()))}
        try:
            found["dataset.content"] = digest(self.files, whole=True)
        except OSError as error:
            raise DataError(f"dataset.path: cannot read {error.filename}: {error.strerror}") from error
        names = self.config.data_files if isinstance(self.config.data_files, list) else [self.config.data_files]
        remote = [self.config.path, *(name for name in names if name)]
        return found if self.files else found | {"dataset.remote": remote}

    @property
    def is_demo(self) -> bool:
        """Whether it is the demo's."""
        return self.config.path == "demo" and self.config.data_files is None

    def columns(self) -> list[str]:
        """The names of the columns, in order: those of the first 100 rows, of which no one needs to have them all."""
        return list(dict.fromkeys(chain.from_iterable(islice(self.rows(), _FIRST_ROWS))))

    def rows(self, columns: Sequence[str] | None = None, needed: Sequence[str] = ()) -> Iterator[Row]:
        """The examples, in order. columns: the only ones to read. needed: those that every file must have.

        Raises DataError for what cannot be read, with the file and the line.
        """
        if self.is_demo:
            yield from _demo_rows()
        elif self._table is not None:
            with as_data_error(self.config):
                yield from saved_rows(self._table, columns)
        else:
            for file in self.files:
                first, rows = first_rows(read(file, columns, self.config.split), _FIRST_ROWS if needed else 0)
                there = {*chain.from_iterable(first)}
                if first and (missing := [name for name in needed if name not in there]):
                    raise DataError(
                        f"dataset.path: expected a column {missing[0]} in {file}, as in {self.files[0]}, found "
                        f"{', '.join(there)}; dataset.data_files names the files to read"
                    )
                yield from rows

    @cached_property
    def _table(self) -> Any:
        """The dataset where the library `datasets` reads it; None where it does not."""
        import datasets

        path, split = Path(self.config.path), self.config.split
        with as_data_error(self.config):
            if self.files and _is_saved(path):
                saved = datasets.load_from_disk(str(path))
                return choose(
                    saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}, split
                )
            if self.files:
                return None
            named = split.isidentifier() or split.replace("-", "_").replace(".", "_").isidentifier()
            loaded = datasets.load_dataset(
                self.config.path, self.config.name, data_files=self.config.data_files,
                split=None if named else split, streaming=self.config.streaming,
            )  # fmt: skip
            return choose(loaded, split) if named else loaded

    def check_unchanged(self) -> None:
        """Raise DataError where a file is not the one that was found, and whose content identifies the run."""
        changed = [str(file) for file, mark in self._marks().items() if mark != self._found[file]]
        if changed:
            raise DataError(f"dataset.path: {', '.join(changed)} changed while it was read: run again")

    def _marks(self) -> dict[Path, Any]:
        """For each file what a change cannot keep. The time of modification can be set; that of the inode cannot."""
        marks: dict[Path, Any] = {}
        for file in self.files:
            try:
                found = file.stat()
                marks[file] = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
            except OSError:
                marks[file] = None
        return marks


def find(config: DatasetConfig) -> Data:
    """The dataset that is meant. Raises DataError where there is none on this machine and the path looks like one."""
    path, notes = Path(config.path), list[str]()
    patterns = config.data_files if isinstance(config.data_files, list) else [config.data_files or ""]
    elsewhere = any("://" in str(pattern) for pattern in patterns)
    if config.path == "demo" and config.data_files is None:
        return Data(config)
    if path.is_file():
        if config.data_files is not None or config.name is not None:
            key = "name" if config.data_files is None else "data_files"
            raise DataError(f"dataset.{key}: expected none beside the file {path}, found {getattr(config, key)}")
        found = [path]
    elif config.path in ("demo", *_BUILDERS) and config.data_files is not None and not elsewhere:
        found = _matching(patterns, Path())
    elif path.is_dir() and _is_saved(path):
        kept = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith("cache-")]
        return Data(config, kept)
    elif path.is_dir():
        found = _matching(patterns, path) if config.data_files is not None else _parts_of_rollouts(path)
        found = found or _in_folder(config, notes)
    elif glob.has_magic(config.path) and "://" not in config.path:
        found = _matching([config.path], Path())
    elif config.path.startswith(("/", "./", "../", "~")) or kind(path) is not None:
        raise DataError(f"dataset.path: found no file or folder {config.path}")
    else:
        return Data(config)
    named = path.is_file() or config.data_files is not None or glob.has_magic(config.path)
    if named and config.split != "train" and not all(kind(file) == ".json" for file in found):
        raise DataError(f"dataset.split: expected train, as these files have no others, found {config.split}")
    if unknown := [file for file in found if kind(file) is None]:
        key = "path" if path.is_file() else "data_files"
        raise DataError(f"dataset.{key}: expected files named {kinds()}, found {unknown[0].name}")
    return Data(config, found, notes, _manifest(path).get("tokenizer"))


def _manifest(folder: Path) -> dict[str, Any]:
    """What distill.rollout says of its folder; nothing where it is another one."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
        return found if isinstance(found["parts"], int) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _parts_of_rollouts(folder: Path) -> list[Path]:
    """The parts that distill.rollout has written into a folder; none where it is another folder.

    Raises DataError where some are not there yet: a part of the rollouts would pass for all of them.
    """
    if not (expected := _manifest(folder).get("parts")):
        return []
    found = sorted(folder.glob(PART.format("*")))
    if len(found) != expected:
        raise DataError(
            f"dataset.path: expected {expected} parts of rollouts in {folder}, found {len(found)}: run distill.rollout "
            "again to its end, or name the parts to read with dataset.data_files"
        )
    return found


def template_of(file: str) -> str:
    """The chat template in a file. Raises DataError where it cannot be read."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"dataset.chat_template: cannot read {file}: {first_line(error)}") from error


def choose(splits: Mapping[str, Any], wanted: str) -> Any:
    """The split that is wanted, or the only one instead of train. Raises DataError, listing them."""
    if wanted in splits:
        return splits[wanted]
    if wanted == "train" and len(splits) == 1:
        return next(iter(splits.values()))
    raise DataError(f"dataset.split: expected {' or '.join(map(str, splits))}, found {wanted}")


def _matching(patterns: Sequence[str], base: Path) -> list[Path]:
    """The files that the patterns match, each once, in the order of the patterns."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        names = [base / name for name in sorted(glob.glob(pattern, root_dir=base, recursive=True))]
        if not any(file.is_file() for file in names):
            raise DataError(f"dataset.data_files: found no file {base / pattern}")
        found |= dict.fromkeys(file for file in names if file.is_file())
    return list(found)


def _in_folder(config: DatasetConfig, notes: list[str]) -> list[Path]:
    """The files of the split in a folder, as `datasets` finds them: by a card's `configs`, else by their names.

    A run's own stores in the folder are not data.
    """
    import datasets
    from datasets.data_files import DataFilesDict, get_data_patterns

    folder = Path(config.path)
    card = folder / "README.md"
    with as_data_error(config):
        if card.is_file() and "\nconfigs:" in card.read_text(encoding="utf-8", errors="replace").split("\n---")[0]:
            with tempfile.TemporaryDirectory(prefix="distill-") as scratch:
                builder = datasets.load_dataset_builder(str(folder), config.name, cache_dir=scratch)
            splits: Mapping[str, Any] = builder.config.data_files
        else:
            splits = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
    stores = [store.parent.resolve() for store in folder.rglob("zarr.json")]
    readable = {
        str(split): [
            file
            for file in map(Path, sorted(map(str, names)))
            if kind(file) and not any(file.resolve().is_relative_to(store) for store in stores)
        ]
        for split, names in splits.items()
    }
    readable = {split: names for split, names in readable.items() if names}
    if not readable:
        raise DataError(f"dataset.path: expected files named {kinds()} in {folder}, found none")
    chosen: list[Path] = choose(readable, config.split)
    if config.split not in readable:
        notes.append(f"took the only split, {next(iter(readable))}")
    of_a_split = {file.resolve() for names in readable.values() for file in names}
    left = [
        str(file.relative_to(folder))
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and kind(file)
        and file.resolve() not in of_a_split
        and not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
        and not any(file.resolve().is_relative_to(store) for store in stores)
    ]
    if left:
        notes.append(f"did not read {', '.join(left[:3])}{' ...' * (len(left) > 3)}, which the names leave out")
    return chosen


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


@contextmanager
def as_data_error(config: DatasetConfig) -> Iterator[None]:
    """Turn any error inside into DataError. A UserError, also one that `datasets` has wrapped, is raised as it is."""
    try:
        yield
    except Exception as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
            causes.append(cause)
        for cause in causes:
            if isinstance(cause, UserError):
                raise cause from None
        line = first_line(error) if len(causes) == 1 else f"{first_line(error)} ({first_line(causes[-1])})"
        raise DataError(f"dataset.path: cannot load {config.path} (split {config.split}): {line}") from error


def _demo_rows() -> list[dict[str, str]]:
    """The short ones of CPython's help topics: real text on every machine, and little enough for a CPU."""
    from pydoc_data.topics import topics

    return [{"text": text} for _, text in sorted(topics.items()) if len(text) <= _DEMO_LONGEST_CHARACTERS]
