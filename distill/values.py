"""What a value means for a key of some type, in a YAML file or as it was typed. The rules are in settings.py."""

import contextlib
import math
import re
import types
import typing
from typing import Any

import yaml

from distill.errors import ConfigError, first_line

_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})")
_NUMBER = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


class _Unquoted(str):
    """A word of a YAML file that YAML takes for a number, a boolean or a date, as it is written there."""

    hint = ""
    """What YAML takes it for, and what to do if it is meant as text."""


class Typed(str):
    """What was typed on a command line: text, unless its key says otherwise."""


class Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads YAML, and leaves to the type of a key what a word means."""

    typed = False

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping, in which no name is there twice."""
        names = [key.value for key, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is there twice", node.start_mark)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found

    def word(self, node: Any) -> str:
        """A plain word that is not simply text."""
        if self.typed:
            return Typed(node.value)
        found = _Unquoted(node.value)
        with contextlib.suppress(ValueError):  # no such date
            meaning = yaml.SafeLoader.yaml_constructors[node.tag](self, node)
            found.hint = f", which YAML takes for the {type(meaning).__name__} {meaning}: quote it, '{found}'"
        return found


class _TypedLoader(Loader):
    """The same for what was typed on a command line."""

    typed = True


class Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes YAML, and quotes what `Loader` would not take for text."""


for _tag in ("int", "float", "bool", "timestamp"):
    Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", Loader.word)
for _handler in (Loader, Dumper):  # 3e-4 and 1e10 are numbers, though not in YAML 1.1
    _handler.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^{_NUMBER.pattern}$"), list("-+.0123456789"))


def read(name: str, kind: Any, found: Any) -> Any:
    """What `found` means for a key of this name and type. It comes from a YAML file, or was typed.

    Raises ConfigError for a value of another type.
    """
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    parts = {typing.get_origin(option): typing.get_args(option) for option in kinds}
    if kind is Any:
        return _read_any(name, found)
    if types.NoneType in kinds and (found is None or (isinstance(found, Typed) and found == "null")):
        return None
    if isinstance(found, list) and list in parts:
        return [read(name, parts[list][0], part) for part in found]
    if isinstance(found, dict) and dict in parts:
        return {str(below): read(f"{name}.{below}", parts[dict][1], value) for below, value in found.items()}
    is_text = str in kinds and not (list in parts and isinstance(found, str) and found[:1] + found[-1:] == "[]")
    if isinstance(found, Typed) and {list, dict} & {*parts} and not is_text:
        content = _parse(name, found, _TypedLoader)
        if isinstance(content, list | dict):
            return read(name, kind, content)
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
    raise ConfigError(f"{name}: expected {type_name(kind)}, found {shown}{hint}")


def _read_any(name: str, found: Any) -> Any:
    """A value of no particular type: what YAML makes of it, where a number or a boolean is written as in JSON."""
    if isinstance(found, Typed):
        found = _parse(name, found, Loader)
    if isinstance(found, list):
        return [_read_any(name, part) for part in found]
    if isinstance(found, dict):
        return {str(below): _read_any(f"{name}.{below}", value) for below, value in found.items()}
    if not isinstance(found, _Unquoted):
        return found
    for kind in (int, float, bool):
        with contextlib.suppress(ConfigError):
            return read(name, kind, found)
    raise ConfigError(f"{name}: expected text, a number, true or false, found {found}{found.hint}")


def _parse(name: str, text: str, loader: type[Loader]) -> Any:
    try:
        return yaml.load(text, loader)
    except Exception as error:  # whatever the YAML parser raises
        raise ConfigError(
            f"{name}: expected YAML, found {str(text)!r}: {problem(error)}"
        ) from None  # it quotes the text


def type_name(kind: Any) -> str:
    """The type of a key in words."""
    if isinstance(kind, types.UnionType):
        return " or ".join("null" if part is type(None) else type_name(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return f"a list of {type_name(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) is dict:
        return "a mapping"
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false", Any: "a value"}
    return names.get(kind, str(kind))


def problem(error: BaseException) -> str:
    """What a YAML parser says, in one line, with the place, but no value; any other error's first line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        found = re.sub(r"(alias|tag|anchor|handle) '.*", r"\1", str(error.problem))
        return f"{found} (line {error.problem_mark.line + 1})"
    return first_line(error)
