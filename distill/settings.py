"""How settings are read: defaults of frozen dataclasses, then YAML files, then key=value arguments. Later ones win.

The type of a key decides what its value means. A wrong value is refused, never repaired.

text            key=value takes what was typed, to the letter: 0123456, no, 1:30, blanks, quotes, a dollar sign. Only
                null is none, where the key may be null. In a YAML file, what YAML takes for a number, a boolean or a
                date has to be quoted; so has the text null
numbers         plain decimals: 1024, 0.5, 3e-4; integers without an exponent. No nan, no inf
booleans        true or false
lists, mappings in YAML's flow style: [1.0,2.0], {region: eu}
mappings        also key by key: store.options.region=eu
paths           a leading ~ or ~user is a home folder; URLs stay as they are

There is no interpolation: on a command line the shell fills in variables.
"""

import contextlib
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf

from distill.errors import ConfigError, first_line

Config = TypeVar("Config")

_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})")
_NUMBER = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def key(default: Any, help: str, choices: Sequence[str] = (), least: int | None = None, path: bool = False) -> Any:
    """A configuration key: its default and its line of --help.

    choices: the values it may have, if they can be listed. least: the least number it may be, beside the choices.
    path: whether it holds a path, or a list of them.
    """
    metadata = {"help": help, "choices": tuple(choices), "least": least, "path": path}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def load(kind: type[Config], arguments: Sequence[str]) -> Config:
    """Merge the defaults of `kind`, a dataclass, the YAML files and the ``key=value`` pairs among `arguments`.

    Raises ConfigError for an unreadable file, an unknown key (with a suggestion), or a value of the wrong type.
    """
    known = dict(_leaves(kind))
    found: list[dict[str, Any]] = []
    files = [argument for argument in arguments if _is_file(argument, known)]
    for file in files:
        entries = _flatten(_read_file(file), known)
        found += [_value(known, name, value, origin=f"{file}: ") for name, value in entries]
    for pair in arguments:
        if pair not in files:
            name, _, text = pair.partition("=")
            found.append(_value(known, *_nested(name, _Typed(text), known), origin=""))
    values = typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.merge({}, *found), resolve=True))
    for name, value in values.items():
        _check(name, value, **known[name].metadata)
    return typing.cast(Config, _build(kind, values))


def expand(path: str, name: str) -> str:
    """The path with a home folder in place of a leading ~ or ~user. A URL, or an id of the hub, is as it was.

    name: of the key. Raises ConfigError where there is no such home folder: no folder named ~ should be made.
    """
    expanded = os.path.expanduser(path) if path.startswith("~") else path  # noqa: PTH111 (Path raises RuntimeError)
    if expanded.startswith("~"):
        raise ConfigError(f"{name}: expected a home folder for {path.partition('/')[0]}, found none (in {path})")
    return expanded


def to_yaml(config: Any) -> str:
    """The configuration as YAML that `load` reads back."""
    return str(yaml.dump(asdict(config), Dumper=_Dumper, sort_keys=False))


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


class _Unquoted(str):
    """A word of a YAML file that YAML takes for a number, a boolean or a date, as it is written there."""

    hint = ""
    """What YAML takes it for, and what to do if it is meant as text."""


class _Typed(str):
    """What was typed on a command line: text, unless its key says otherwise."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads YAML, and leaves to the type of a key what a word means."""

    typed = False

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is there twice", node.start_mark)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found

    def word(self, node: Any) -> str:
        """A plain word that is not simply text."""
        if self.typed:
            return _Typed(node.value)
        found = _Unquoted(node.value)
        with contextlib.suppress(ValueError):  # no such date
            meaning = yaml.SafeLoader.yaml_constructors[node.tag](self, node)
            found.hint = f", which YAML takes for the {type(meaning).__name__} {meaning}: quote it, '{found}'"
        return found


class _TypedLoader(_Loader):
    """The same for what was typed on a command line."""

    typed = True


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes YAML, and quotes what `_Loader` would not take for text."""


for _tag in ("int", "float", "bool", "timestamp"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.word)
for _handler in (_Loader, _Dumper):  # 3e-4 and 1e10 are numbers, though not in YAML 1.1
    _handler.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^{_NUMBER.pattern}$"), list("-+.0123456789"))


def _is_file(argument: str, known: Mapping[str, Any]) -> bool:
    """Whether an argument names a YAML file, whose folders may have a = in their names, and is no key=value."""
    name, equals, _ = argument.partition("=")
    is_key = name in known or "." in name
    named_so = "/" in name or (argument.endswith((".yaml", ".yml")) and not is_key)
    return not equals or named_so or os.path.isfile(argument)  # noqa: PTH113 (Path raises for a long argument)


def _read_file(file: str) -> Mapping[Any, Any]:
    path = Path(expand(file, "CONFIG.yaml"))
    if not path.is_file():
        raise ConfigError(f"{file}: no such file (expected CONFIG.yaml or key=value; --help lists the keys)")
    try:
        content = yaml.load(path.read_bytes(), _Loader)
    except Exception as error:  # whatever the YAML parser or the file system raises
        raise ConfigError(f"{file}: not readable as YAML: {_problem(error)}") from error
    if not isinstance(content, Mapping | None):
        raise ConfigError(f"{file}: expected a mapping of keys to values, found a {type(content).__name__}")
    return content or {}


def _value(known: Mapping[str, Any], name: str, found: Any, origin: str) -> dict[str, Any]:
    """{name: value} of a key, for OmegaConf to merge: mappings key by key. origin: of the value, for messages."""
    if any(key.startswith(f"{name}.") for key in known):
        raise ConfigError(f"{origin}{name}: expected keys below it ({name}.<key>), found {found!r}")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6) or [
            key for key in known if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]
        ]
        hint = f"did you mean {near[0]}?" if near else "--help lists the keys"
        raise ConfigError(f"{origin}unknown key {name}; {hint}")
    value = _read(f"{origin}{name}", known[name].type, found)
    if value == "":
        raise ConfigError(f"{origin}{name}: expected {_type_name(known[name].type)}, found nothing")
    if known[name].metadata["path"] and value is not None:
        paths = [expand(path, f"{origin}{name}") for path in ([value] if isinstance(value, str) else value)]
        value = paths[0] if isinstance(value, str) else paths
    return {name: _escaped(value)}


def _nested(name: str, found: Any, known: Mapping[str, Any]) -> tuple[str, Any]:
    """("store.options.a.b", 1) -> ("store.options", {"a": {"b": 1}}) where store.options is a mapping."""
    for key, leaf in known.items():
        if name.startswith(f"{key}.") and typing.get_origin(leaf.type) is dict:
            for part in reversed(name.removeprefix(f"{key}.").split(".")):
                found = {part: found}
            return key, found
    return name, found


def _escaped(value: Any) -> Any:
    """A value in which OmegaConf finds no interpolation."""
    if isinstance(value, dict):
        return {name: _escaped(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_escaped(part) for part in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    return value


def _read(name: str, kind: Any, found: Any) -> Any:
    """What `found` means for a key of this name and type. It comes from a YAML file, or was typed.

    Raises ConfigError for a value of another type.
    """
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    parts = {typing.get_origin(option): typing.get_args(option) for option in kinds}
    if kind is Any:
        return _read_any(name, found)
    if types.NoneType in kinds and (found is None or (isinstance(found, _Typed) and found == "null")):
        return None
    if isinstance(found, list) and list in parts:
        return [_read(name, parts[list][0], part) for part in found]
    if isinstance(found, dict) and dict in parts:
        return {str(below): _read(f"{name}.{below}", parts[dict][1], value) for below, value in found.items()}
    is_text = str in kinds and not (list in parts and isinstance(found, str) and found[:1] + found[-1:] == "[]")
    if isinstance(found, _Typed) and {list, dict} & {*parts} and not is_text:
        content = _parse(name, found, _TypedLoader)
        if isinstance(content, list | dict):
            return _read(name, kind, content)
    elif isinstance(found, str):
        if int in kinds and _INTEGER.fullmatch(found):
            return int(found)
        if float in kinds and _NUMBER.fullmatch(found) and math.isfinite(float(found)):
            return float(found)
        if bool in kinds and found.lower() in ("true", "false"):
            return found.lower() == "true"
        if str in kinds and not isinstance(found, _Unquoted):
            return str(found)
    shown = "null" if found is None else found if isinstance(found, _Unquoted) else repr(found)
    hint = found.hint if isinstance(found, _Unquoted) and str in kinds else ""
    raise ConfigError(f"{name}: expected {_type_name(kind)}, found {shown}{hint}")


def _read_any(name: str, found: Any) -> Any:
    """A value of no particular type: what YAML makes of it, where a number or a boolean is written as in JSON."""
    if isinstance(found, _Typed):
        found = _parse(name, found, _Loader)
    if isinstance(found, list):
        return [_read_any(name, part) for part in found]
    if isinstance(found, dict):
        return {str(below): _read_any(f"{name}.{below}", value) for below, value in found.items()}
    if not isinstance(found, _Unquoted):
        return found
    for kind in (int, float, bool):
        with contextlib.suppress(ConfigError):
            return _read(name, kind, found)
    raise ConfigError(f"{name}: expected text, a number, true or false, found {found}{found.hint}")


def _parse(name: str, text: str, loader: type[_Loader]) -> Any:
    try:
        return yaml.load(text, loader)
    except Exception as error:  # whatever the YAML parser raises
        raise ConfigError(f"{name}: expected YAML, found {str(text)!r}: {_problem(error)}") from error


def _check(name: str, value: Any, choices: tuple[str, ...], least: int | None, **_: Any) -> None:
    """Raise ConfigError for a value that is neither one of the choices nor a number of at least `least`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    good = value is None or value in choices or (is_number and least is not None and value >= least)
    if not good and (choices or least is not None):
        expected = [", ".join(choices)] * bool(choices) + [f"at least {least}"] * (least is not None)
        raise ConfigError(f"{name}: expected {' or '.join(expected)}, found {value!r}")


def _build(kind: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """An instance of the dataclass `kind`, with its defaults for what is not among `values`."""
    parts = {}
    for entry in fields(kind):
        name = f"{prefix}{entry.name}"
        if is_dataclass(entry.type):
            parts[entry.name] = _build(entry.type, values, f"{name}.")
        elif name in values:
            parts[entry.name] = values[name]
    return kind(**parts)


def _leaves(cls: type, prefix: str = "") -> list[tuple[str, Any]]:
    """The keys of a configuration class as (dotted name, dataclass field), in order."""
    found = []
    for entry in fields(cls):
        if isinstance(entry.type, type) and is_dataclass(entry.type):
            found += _leaves(entry.type, f"{prefix}{entry.name}.")
        else:
            found.append((f"{prefix}{entry.name}", entry))
    return found


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


def _type_name(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join("null" if part is type(None) else _type_name(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return f"a list of {_type_name(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) is dict:
        return "a mapping"
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false", Any: "a value"}
    return names.get(kind, str(kind))


def _problem(error: BaseException) -> str:
    """What a YAML parser says, in one line, with the place; any other error's first line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem} (line {error.problem_mark.line + 1})"
    return first_line(error)
