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

The values below a secret key are never shown. What may be a credential is refused on a command line, which everybody on
the machine can read.
"""

import difflib
import functools
import hashlib
import json
import operator
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf

from distill.credentials import has_password, is_credential, leaves
from distill.errors import ConfigError
from distill.values import Dumper, Loader, Typed, problem, read, type_name

Config = TypeVar("Config")

_WHERE = "set it in the environment (as AWS_SECRET_ACCESS_KEY is), or below store.options in a YAML file"


def key(
    default: Any, help: str, choices: Sequence[str] = (), least: int | None = None, path: bool = False,
    local: bool = False, secret: bool = False,
) -> Any:  # fmt: skip
    """A configuration key: its default and its line of --help.

    choices: the values it may have, if they can be listed. least: the least number it may be, beside the choices.
    path: whether it holds a path, or a list of them. local: whether that is never a URL.
    secret: whether it is a mapping whose values are never shown.
    """
    metadata = {"help": help, "choices": tuple(choices), "least": least, "path": path, "local": local}
    metadata["secret"] = secret
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata, repr=not secret)
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
            found.append(_value(known, *_nested(name, Typed(text), known), origin=""))
    values = typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.merge({}, *found), resolve=True))
    for name, value in values.items():
        _check(name, value, **known[name].metadata)
    return typing.cast(Config, _build(kind, values))


def split(arguments: Sequence[str], *keys: str) -> tuple[list[str], list[str]]:
    """What `load` takes among the arguments of a command that names a store, and the others.

    That is YAML files, and key=value for keys that begin with one of `keys`.
    """
    settings = [
        argument
        for argument in arguments
        if argument.startswith(keys)
        or (argument.endswith((".yaml", ".yml")) and "://" not in argument and not Path(argument).is_dir())
    ]
    return settings, [argument for argument in arguments if argument not in settings]


def named(kind: type, arguments: Sequence[str], *keys: str) -> list[str]:
    """The arguments of a command, where those that stand alone, and are no YAML files, are the values of `keys`.

    What is there under a name with a = in it stands alone too, unless it begins with a key of `kind`.
    Raises ConfigError where there are more of them than keys.
    """
    known = dict(_leaves(kind))
    alone = [
        argument
        for argument in arguments
        if not (re.match(r"[\w.]+=", argument) and (_is_key(argument, known) or not os.path.exists(argument)))  # noqa: PTH110
        and ("://" in argument or not argument.endswith((".yaml", ".yml")))
    ]
    if strange := [argument for argument in alone if argument.startswith("-")]:
        raise ConfigError(f"unknown option {strange[0]}; --help lists the keys")
    if len(alone) > len(keys):
        raise ConfigError(
            f"expected at most {len(keys)} arguments without a key ({', '.join(keys)}), found {' '.join(alone)}"
        )
    values = [f"{key}={value}" for key, value in zip(keys, alone, strict=False)]
    return [*(argument for argument in arguments if argument not in alone), *values]


def expand(path: str, name: str) -> str:
    """The path with a home folder in place of a leading ~ or ~user. A URL, or an id of the hub, is as it was.

    name: of the key. Raises ConfigError where there is no such home folder: no folder named ~ should be made. It raises
    it for a URL with a password too: paths are shown and logged.
    """
    if has_password(path):
        raise ConfigError(f"{name}: expected a URL without user:password@, found one; {_WHERE}")
    expanded = os.path.expanduser(path) if path.startswith("~") else path  # noqa: PTH111 (Path raises RuntimeError)
    if expanded.startswith("~"):
        raise ConfigError(f"{name}: expected a home folder for {path.partition('/')[0]}, found none (in {path})")
    return expanded


def to_yaml(config: Any) -> str:
    """The configuration as YAML that `load` reads back, but for secret keys: a comment names what is left out."""
    content, comment = asdict(config), ""
    for name, value in _values(config, secret=True):
        *sections, last = name.split(".")
        functools.reduce(operator.getitem, sections, content).pop(last)
        if value:
            names = json.dumps([below for below, _ in leaves(value)])
            comment += f"# {name} is left out, as its values may be credentials: {names}\n"
    return comment + str(yaml.dump(content, Dumper=Dumper, sort_keys=False))


def flat(config: Any) -> dict[str, str]:
    """Every key of a configuration that is not secret, with its value as text."""
    return {name: str(value) for name, value in _values(config, secret=False)}


def secret_digests(config: Any, salt: str) -> dict[str, str]:
    """Every value below the secret keys of a configuration, as a hash with `salt`: to be compared, not to be shown."""
    return {
        f"{name}.{below}": hashlib.sha256(f"{salt} {part!r}".encode()).hexdigest()
        for name, value in _values(config, secret=True)
        for below, part in leaves(value)
    }


def _values(config: Any, secret: bool) -> Iterator[tuple[str, Any]]:
    """The dotted names and the values of the keys that are secret, or of those that are not."""
    for name, leaf in _leaves(type(config)):
        if leaf.metadata["secret"] == secret:
            yield name, functools.reduce(getattr, name.split("."), config)


def help_text(kind: type, command: str) -> str:
    """What --help prints: the usage, then every key with its default and its meaning."""
    lines = [
        f"usage: {command} [CONFIG.yaml ...] [key=value ...]",
        "",
        "key=value wins over YAML, later over earlier. Keys, and what they are where nothing is said:",
        "",
    ]
    for name, leaf in _leaves(kind):
        default = leaf.default_factory() if callable(leaf.default_factory) else leaf.default
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
        lines.append(f"  {f'{name}={shown}':38s} {leaf.metadata['help']}")
        if leaf.metadata["choices"]:
            lines[-1] += f" [{' | '.join(leaf.metadata['choices'])}]"
    return "\n".join(lines)


def _is_file(argument: str, known: Mapping[str, Any]) -> bool:
    """Whether an argument names a YAML file, whose folders may have a = in their names, and is no key=value."""
    name, equals, _ = argument.partition("=")
    named_so = "/" in name or (argument.endswith((".yaml", ".yml")) and not _is_key(argument, known))
    return not equals or named_so or os.path.isfile(argument)  # noqa: PTH113 (Path raises for a long argument)


def _is_key(argument: str, known: Mapping[str, Any]) -> bool:
    """Whether what is before the = of an argument is a key, or is meant as one."""
    name = argument.partition("=")[0]
    return name in known or "." in name


def _read_file(file: str) -> Mapping[Any, Any]:
    path = Path(expand(file, "CONFIG.yaml"))
    if not path.is_file():
        raise ConfigError(f"{file}: no such file (expected CONFIG.yaml or key=value; --help lists the keys)")
    try:
        content = yaml.load(path.read_bytes(), Loader)
    except Exception as error:  # whatever the YAML parser or the file system raises
        raise ConfigError(f"{file}: not readable as YAML: {problem(error)}") from None  # it quotes the file
    if not isinstance(content, Mapping | None):
        raise ConfigError(f"{file}: expected a mapping of keys to values, found a {type(content).__name__}")
    return content or {}


def _value(known: Mapping[str, Any], name: str, found: Any, origin: str) -> dict[str, Any]:
    """{name: value} of a key, for OmegaConf to merge: mappings key by key. origin: of the value, for messages."""
    if any(key.startswith(f"{name}.") for key in known):
        raise ConfigError(f"{origin}{name}: expected keys below it ({name}.<key>), found a value")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6) or [
            key for key in known if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]
        ]
        hint = f"did you mean {near[0]}?" if near else "--help lists the keys"
        raise ConfigError(f"{origin}unknown key {name}; {hint}")
    read_as = _read_secret if known[name].metadata["secret"] else read
    value = read_as(f"{origin}{name}", known[name].type, found)
    if not origin and known[name].metadata["secret"]:
        for below in (below for below, part in leaves(value) if is_credential(below, part)):
            raise ConfigError(f"{name}.{below}: expected no credential on a command line, found one; {_WHERE}")
    if value == "":
        raise ConfigError(f"{origin}{name}: expected {type_name(known[name].type)}, found nothing")
    if known[name].metadata["path"] and value is not None:
        paths = [expand(path, f"{origin}{name}") for path in ([value] if isinstance(value, str) else value)]
        if known[name].metadata["local"] and (url := next((path for path in paths if "://" in path), None)):
            raise ConfigError(f"{origin}{name}: expected a local folder, found the URL {url}")
        value = paths[0] if isinstance(value, str) else paths
    return {name: _escaped(value)}


def _read_secret(name: str, kind: Any, found: Any) -> Any:
    """As `read`, with errors that do not show the value."""
    try:
        return read(name, kind, found)
    except ConfigError as error:
        expected = str(error).partition(", found ")[0]
        hint = "text that YAML takes for a number, a boolean or a date has to be quoted"
        raise ConfigError(f"{expected}, found another value (hidden); {hint}") from None


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
