"""What makes two runs the same run: the settings and contents that determine the store's bytes.

A fingerprint is a flat mapping of dotted names to plain values. It holds no paths of models, outputs or logs, no
worker counts and no devices, so that a run may go on elsewhere, with other workers, or after its model has moved.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_SAMPLED_BYTES = 1 << 20
_SAMPLED_PIECES = 64


def digest(files: Iterable[Path]) -> str:
    """A hash of files by name and content. Of a large file, its size and 64 evenly spaced MiB are read."""
    total = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        total.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            if size <= _SAMPLED_BYTES * _SAMPLED_PIECES:
                total.update(file.read())
            else:
                for piece in range(_SAMPLED_PIECES):
                    file.seek(piece * (size - _SAMPLED_BYTES) // (_SAMPLED_PIECES - 1))
                    total.update(file.read(_SAMPLED_BYTES))
    return total.hexdigest()[:16]


def text_digest(text: str) -> str:
    """A hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def summarize(settings: Mapping[str, Any]) -> str:
    """The one value that stands for all settings."""
    return text_digest(json.dumps(settings, sort_keys=True))


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], whose: str) -> list[str]:
    """One line per key that differs, with both values. whose: what `theirs` belongs to."""
    keys = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
    return [f"{key}: {whose} has {theirs.get(key)!r}, this run {ours.get(key)!r}" for key in keys]
