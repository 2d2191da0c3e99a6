"""How settings are read: defaults of frozen dataclasses, then YAML files, then key=value arguments. Later ones win.

A wrong value is refused, never repaired. Values follow YAML 1.1: quote text that looks like a number (``"'0012'"``).
"""

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.errors import ConfigError, first_line

Config = TypeVar("Config")


def key(default: Any, help: str, choices: Sequence[str] = (), least: int | None = None) -> Any:
    """A configuration key: its default and its line of --help.

    choices: the values it may have, if they can be listed. least: the least number it may be, beside the choices.
    """
    metadata = {"help": help, "choices": tuple(choices), "least": least}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def load(kind: type[Config], arguments: Sequence[str]) -> Config:
    """Merge the defaults of `kind`, a dataclass, the YAML files and the ``key=value`` pairs among `arguments`.

    Raises ConfigError for an unreadable file, an unknown key (with a suggestion), or a value of the wrong type.
    """
    merged = OmegaConf.structured(kind)
    _make_writable(merged)
    for file in [argument for argument in arguments if "=" not in argument]:
        merged = _merge(kind, merged, _read_yaml(file), origin=f"{file}: ")
    for pair in [argument for argument in arguments if "=" in argument]:
        try:
            parsed = OmegaConf.from_dotlist([pair])
        except Exception as error:  # whatever the YAML parser raises on the value
            raise ConfigError(f"{pair}: the value is not YAML: {first_line(error)}") from error
        merged = _merge(kind, merged, parsed, origin="")
    try:
        OmegaConf.resolve(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{first_line(error)} (write \\${{...}} for a plain dollar)") from error
    for name, leaf in _leaves(kind):
        _check(name, OmegaConf.select(merged, name), **leaf.metadata)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, kind)
    return config


def _check(name: str, value: Any, choices: tuple[str, ...], least: int | None, **_: Any) -> None:
    """Raise ConfigError for a value that is neither one of the choices nor a number of at least `least`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    good = value is None or value in choices or (is_number and least is not None and value >= least)
    if not good and (choices or least is not None):
        expected = [", ".join(choices)] * bool(choices) + [f"at least {least}"] * (least is not None)
        raise ConfigError(f"{name}: expected {' or '.join(expected)}, found {value!r}")


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML that `load` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flat(config: Any) -> dict[str, str]:
    """Every key of a configuration, with its value as text."""
    found = {}
    for name, _ in _leaves(type(config)):
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        found[name] = str(value)
    return found


def help_text(kind: type, command: str) -> str:
    """What --help prints: the usage, then every key with its default and its meaning."""
    lines = [
        f"usage: {command} [CONFIG.yaml ...] [key=value ...]",
        "",
        "key=value wins over YAML, later over earlier. Without arguments the demo runs. Keys and their defaults:",
        "",
    ]
    for name, leaf in _leaves(kind):
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


def _merge(kind: type, base: DictConfig, update: DictConfig, origin: str) -> DictConfig:
    known = dict(_leaves(kind))
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
    """{a: {b: 1}} -> [("a.b", 1)]. Stops at the known keys: the value of a key may be a mapping itself."""
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
    """Let merge write into the nodes of frozen dataclasses, which are read-only."""
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
