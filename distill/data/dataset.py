"""Find a dataset and open it: the demo, local files and folders, or a dataset of the hub."""

import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill.config import DatasetConfig
from distill.errors import DataError, UserError, first_line
from distill.store.fingerprint import digest, text_digest

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text", ".csv": "csv"}
_DEMO_LONGEST_CHARACTERS = 4000


def identity(config: DatasetConfig, ours: Sequence[str]) -> dict[str, Any]:
    """What identifies the data beside the settings: the content of the demo or of local files.

    Remote data are identified by name. A resumed run does not read them again, since the store has their tokens.
    ours: folders that this run writes. They are not data, even if they lie in the dataset's folder.
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


def load(config: DatasetConfig) -> Any:
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
    with as_data_error(config):
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
        if any(isinstance(cause, StopIteration) for cause in causes):
            raise DataError(f"dataset.path: found no rows in {config.path} (split {config.split})") from error
        line = first_line(error) if len(causes) == 1 else f"{first_line(error)} ({first_line(causes[-1])})"
        raise DataError(f"dataset.path: cannot load {config.path} (split {config.split}): {line}") from error


def _demo_rows() -> list[dict[str, str]]:
    """The short ones of CPython's help topics: real text on every machine, and little enough for a CPU."""
    from pydoc_data.topics import topics

    return [{"text": text} for _, text in sorted(topics.items()) if len(text) <= _DEMO_LONGEST_CHARACTERS]
