"""What may be a credential: refused on a command line, and hidden in every text that is logged, printed or raised.

Known are the options of object stores that this process has opened, the environment's variables that look like
credentials, and the places where object stores' answers and URLs repeat them.
"""

import contextlib
import functools
import html
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, quote_plus

HIDDEN = "(hidden)"

_NAMES = re.compile(
    "key|secret|token|passw|pwd|credential|signature|sas|header|cookie|proxy|auth|bearer|connection_string", re.I
)
_HARMLESS = re.compile("(_file|_path|_uri|_host|_enabled|_excludes|kms_key_id|skip_signature)$", re.IGNORECASE)
_PLAIN = re.compile(
    "region|endpoint|bucket|container|host$|ur[il]|timeout|backoff|name|file|path|arn|agent|_id$|copy|conditional|type"
    "|algorithm|encryption$",
    re.IGNORECASE,
)
_VARIABLES = re.compile("^(AWS|AZURE|GOOGLE|HF|HUGGING_FACE|HUGGINGFACE)_")
_SHORTEST = 6  # shorter ones cannot be told from words
_USERINFO = re.compile(r"(?<=://)[^\s/@:'\"]*:[^\s/@'\"]+(?=@)")
_REPEATED = re.compile(
    r"(?<=[?&;,\s])((?:(?:x-(?:amz|goog)-)?(?:credential|signature|security-token)|(?<=[?&;])(?:sig|token))=)[^&\s,'\"<]+"
    r"|(<(?:\w*AccessKeyId|StringToSign\w*|CanonicalRequest\w*|Signature\w*|AuthenticationErrorDetail|[\w-]*Token[\w-]*)>)"
    r"[^<]+",
    re.IGNORECASE,
)
_kept: set[str] = set()


def is_credential(name: str, value: Any) -> bool:
    """Whether an option of this dotted name, with this value, may be a credential."""
    text = str(value)
    if text.lower() in ("true", "false", "null", "none", ""):
        return False
    named = name + text if text.startswith("{") else name  # a mapping as text has names of its own
    return _is_named_so(named) or has_password(text)


def _is_named_so(name: str) -> bool:
    return bool(_NAMES.search(name) and not _HARMLESS.search(name))


def has_password(text: str) -> bool:
    """Whether there is a URL with user:password@ in a text."""
    return bool(_USERINFO.search(text))


def leaves(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted names of options and their values: {"a": {"b": 1}} has ("a.b", 1)."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def keep_secret(options: Mapping[str, Any]) -> None:
    """From now on `hide` hides what may be a credential among the options of an object store.

    That is the value of each, unless it is short or its name says that it is none.
    """
    for name, value in leaves(options):
        texts = value if isinstance(value, list | tuple) else [value]
        for text in (text.decode(errors="replace") if isinstance(text, bytes) else str(text) for text in texts):
            if _is_named_so(name) or not (_PLAIN.search(name) or _HARMLESS.search(name)):
                _kept.update(_lines(text))
            with contextlib.suppress(ValueError):
                keep_secret(dict(json.loads(text)) if text.startswith("{") else {})  # a service account's key


def hide(text: str) -> str:
    """The text, with "(hidden)" in place of what may be a credential."""
    named = {value for name, value in os.environ.items() if _VARIABLES.search(name) and is_credential(name, value)}
    if found := frozenset(_kept | {line for value in named for line in _lines(value)}):
        text = _pattern(found).sub(HIDDEN, text)
    return _REPEATED.sub(lambda match: f"{match[1] or match[2]}{HIDDEN}", _USERINFO.sub(HIDDEN, text))


def _lines(text: str) -> list[str]:
    """The parts of a value that may be in a text by themselves: the lines of a key, for example."""
    return [line for line in re.split(r"[\r\n]+|\\n", text.strip()) if len(line) >= _SHORTEST]


@functools.lru_cache(maxsize=8)
def _pattern(values: frozenset[str]) -> re.Pattern[str]:
    """The values, as they are and as URLs, XML, JSON and Python's repr write them; the longest first."""
    written = {form for value in values for form in _forms(value)}
    return re.compile("|".join(re.escape(value) for value in sorted(written, key=len, reverse=True)))


def _forms(value: str) -> set[str]:
    return {
        *(value, html.escape(value), repr(value)[1:-1], json.dumps(value)[1:-1]),
        *(quote(value), quote(value, safe=""), quote_plus(value)),
    }
