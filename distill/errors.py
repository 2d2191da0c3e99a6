"""The errors that distill raises for what users do, and for what happens to workers.

DistillError
├── UserError          bad usage or input: one message, no traceback, exit status 2
│   ├── ConfigError    a key, a type or a combination in the configuration
│   ├── DataError      the dataset
│   ├── TeacherError   the model, its tokenizer or its device
│   └── StoreError     the store: not one, another run's, damaged, unwritable
├── NumericalError     NaN or infinite: a teacher's logits, a student's loss, gradient or weights: exit status 1
├── StorageError       a disk is full or read-only, a server is gone: one message, no traceback, exit status 1
├── ReaderError        a process that reads batches is gone: exit status 1
└── PeerError          other workers hang or are gone: exit status 1

A message says what was expected, what was found, and where: key, file, sample or block. No credential is in it.
"""

import errno
import os
import re
from typing import Any

from distill.credentials import hide

_DISK = {errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EROFS, errno.ESTALE}
_ADVICE = re.compile("pip install|You need to|must have access|is restricted|log in|trust_remote_code", re.IGNORECASE)


class DistillError(Exception):
    """Base of the errors below."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*(hide(arg) if isinstance(arg, str) else arg for arg in args))


class UserError(DistillError, ValueError):
    """Something that the user can put right."""


class ConfigError(UserError):
    """The configuration."""


class DataError(UserError):
    """The dataset."""


class TeacherError(UserError):
    """The model, its tokenizer or its device."""


class StoreError(UserError):
    """The store."""


class NumericalError(DistillError, ArithmeticError):
    """A teacher's logits are NaN or infinite, or a student's loss, gradient or weights."""


class StorageError(DistillError, OSError):
    """The disk or the server that holds what is written or read fails: full, read-only, gone."""


class ReaderError(DistillError, RuntimeError):
    """A process that reads batches is gone."""


class PeerError(DistillError, RuntimeError):
    """Other workers hang or are gone. ranks: theirs."""

    def __init__(self, message: str, ranks: list[int]) -> None:
        super().__init__(message)
        self.ranks = ranks


def hide_in(error: BaseException) -> None:
    """Hide credentials in another library's error, which a traceback shows as the cause of ours."""
    error.args = tuple(hide(arg) if isinstance(arg, str) else arg for arg in error.args)


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line: its first line, and the sentence that says what to do.

    That is one about a package, a permission or a login. An error without text, or with a bare key, is named.
    Credentials are hidden, in `error` itself too.
    """
    hide_in(error)
    lines = [line.strip() for line in hide(str(error)).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    first = f"{type(error).__name__}: {lines[0]}" if isinstance(error, LookupError) else lines[0]
    sentences = [sentence for line in lines[1:] for sentence in line.split(". ") if _ADVICE.search(sentence)]
    return f"{first.rstrip(' :.')}: {sentences[0]}" if sentences and not _ADVICE.search(first) else first


def disk_failure(error: BaseException | None) -> str:
    """What a disk that fails has said, where that is what led to `error`: "No space left on device"; else nothing."""
    while error is not None:
        rust = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(rust[1]) if rust else None
        if number in _DISK:
            named = getattr(error, "filename", None)
            return f"{os.strerror(number)}: {named}" if named else os.strerror(number)
        error = error.__cause__ or error.__context__
    return ""
