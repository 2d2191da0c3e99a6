"""The fingerprint of a run: the settings and the contents of files that determine the bytes of its store.

It is a flat mapping of dotted names to plain values. It has no paths of local files, no number of workers and no
devices, so that a run may be continued elsewhere, with other workers, or after its model was moved.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_SAMPLED_BYTES = 1 << 20
_SAMPLED_PIECES = 64


def digest(files: Iterable[Path], whole: bool = False) -> str:
    """A hash of the names and contents of files. Of a larger file: its size, and 64 evenly spaced pieces of 1 MiB.

    whole: every byte of larger files too.
    """
    total = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        total.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            if size <= _SAMPLED_BYTES * _SAMPLED_PIECES:
                total.update(file.read())
            elif whole:
                total.update(hashlib.file_digest(file, "sha256").digest())
            else:
                for piece in range(_SAMPLED_PIECES):
                    file.seek(piece * (size - _SAMPLED_BYTES) // (_SAMPLED_PIECES - 1))
                    total.update(file.read(_SAMPLED_BYTES))
    return total.hexdigest()[:16]


def text_digest(text: str) -> str:
    """A hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def summarize(settings: Mapping[str, Any]) -> str:
    """A hash of all settings."""
    return text_digest(json.dumps(settings, sort_keys=True))


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], whose: str) -> list[str]:
    """A line for each key that differs, with both values. whose: what has the settings `theirs`."""
    keys = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
    return [f"{key}: {whose} has {theirs.get(key)!r}, this run {ours.get(key)!r}" for key in keys]
