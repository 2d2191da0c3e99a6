"""A folder of numbered parts, each one file, and a manifest that says how many there will be, and of what.

A file gets its name when it is whole and on disk, and the manifest is there from the beginning on. So a part that is
there is never written again, and a run that was killed goes on where it was.
"""

import contextlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from distill.errors import ConfigError, StorageError, disk_failure
from distill.run.nodes import PROBE
from distill.store.fingerprint import differences
from distill.store.location import fsync


@dataclass(frozen=True)
class PartsKind:
    """What a folder of parts is called, and how its files are.

    manifest, part: names of files; part with {} for the number. needed: keys of the manifest beside format, version,
    parts and config. things: what the parts have, in words. folder: what may be there before the manifest
    """

    format: str
    version: int
    manifest: str
    part: str
    things: str
    needed: Collection[str] = ()
    folder: str = ""


class PartsFolder:
    """The folder of one run. manifest: what its manifest says; None where nothing was begun."""

    def __init__(self, folder: Path, kind: PartsKind) -> None:
        """Raises ConfigError for a folder with other content, and for another format."""
        self.folder, self.kind, self.manifest = folder, kind, None
        file = folder / kind.manifest
        try:
            self.manifest = json.loads(file.read_text())
        except FileNotFoundError:
            names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
            if any(
                name != kind.folder and not name.endswith(".partial") and not name.startswith(PROBE) for name in names
            ):
                raise ConfigError(
                    f"output: expected a new or empty folder, or one of an earlier run, found other files in {folder}"
                ) from None
            return
        except (OSError, ValueError) as error:
            raise ConfigError(f"output: cannot read {file}: {error}") from error
        made: Any = self.manifest if isinstance(self.manifest, dict) else {}
        found = made.get("format"), made.get("version")
        if found != (kind.format, kind.version):
            raise ConfigError(
                f"output: expected {kind.format}, version {kind.version}, in {file}, found {found[0]}, {found[1]}"
            )
        if lacking := {"parts", "config", *kind.needed} - made.keys():
            raise ConfigError(f"output: expected {min(lacking)!r} in {file}, found none")

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise ConfigError where the parts that are there follow from other settings, naming each."""
        assert self.manifest is not None
        if differing := differences(self.manifest["config"], settings, "the folder"):
            raise ConfigError(
                f"output: {self.folder} has another run's {self.kind.things}; choose another folder, or delete it:\n  "
                + "\n  ".join(differing)
            )

    def begin(self, parts: int, **facts: Any) -> None:
        """Write the manifest, with these facts beside the number of parts."""
        self.manifest = {"format": self.kind.format, "version": self.kind.version, "parts": parts, **facts}
        text = json.dumps(self.manifest, indent=1) + "\n"
        self.write(self.folder / self.kind.manifest, lambda file: file.write(text.encode()))

    def missing(self) -> list[int]:
        """The parts that are not there."""
        assert self.manifest is not None
        return [part for part in range(self.manifest["parts"]) if not self.file(part).exists()]

    def clean(self) -> None:
        """Delete what runs that were killed have left of unfinished files."""
        for stale in [*self.folder.glob("*.partial"), *self.folder.glob(f"{self.kind.folder or '.'}/*.partial")]:
            stale.unlink(missing_ok=True)

    def file(self, part: int) -> Path:
        """The file of a part."""
        return self.folder / self.kind.part.format(f"{part:06d}")

    def write(self, path: Path, write: Callable[[IO[bytes]], object]) -> None:
        """Let `write` fill a file, which gets its name last. Raises StorageError where the disk is full, or fails."""
        unfinished = path.with_name(f"{path.name}.partial")
        try:
            with unfinished.open("wb") as file:
                write(file)
            fsync(unfinished)
        except Exception as error:
            with contextlib.suppress(OSError):  # what is there of it would fill a full disk
                unfinished.unlink()
            if not (failure := disk_failure(error)):
                raise
            raise StorageError(f"output: cannot write {path}: {failure}") from error
        unfinished.rename(path)
        fsync(path.parent)
