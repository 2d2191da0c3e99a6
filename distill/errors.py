"""The errors that distill raises for what users do, and for what happens to workers.

DistillError
├── UserError          bad usage or input: one message, no traceback, exit status 2
│   ├── ConfigError    a key, a type or a combination in the configuration
│   ├── DataError      the dataset
│   ├── TeacherError   the model, its tokenizer or its device
│   └── StoreError     the store: not one, another run's, damaged, unwritable
├── NumericalError     the teacher produced NaN or infinite logits: exit status 1
└── PeerError          other workers hang or are gone: exit status 1

A message says what was expected, what was found, and where: key, file, sample or block.
"""


class DistillError(Exception):
    """Base of the errors below."""


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
    """The teacher's logits are NaN or infinite."""


class PeerError(DistillError, RuntimeError):
    """Other workers hang or are gone. ranks: theirs."""

    def __init__(self, message: str, ranks: list[int]) -> None:
        super().__init__(message)
        self.ranks = ranks


def first_line(error: BaseException) -> str:
    """The first line of another library's error, or the name of its class where it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
