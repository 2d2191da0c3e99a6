"""Where a worker writes: the console, which is worker 0's alone, and a file of its own.

Worker 0 logs plain lines to the console, which do not break its progress bar. Every worker also logs to
``<log_dir>/worker_<rank>.log``. Workers 1+ write nowhere else: even what they print goes to that file.

Credentials are hidden in all of it: in log records, tracebacks, warnings, and what Python code prints.
"""

import io
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from distill.credentials import hide
from distill.errors import ConfigError, UserError
from distill.settings import expand

TAIL_LINES = 10
_TAIL_BYTES = 1 << 14
_LINE = "%(asctime)s rank %(rank)s %(levelname)s %(name)s: %(message)s"


def open_log(folder: str, name: str, rank: int, on_record: Callable[[], None]) -> Path:
    """Send log records, warnings and, for workers 1+, everything printed, to the file `name` in `folder`.

    on_record: called after each record. Raises UserError where the file cannot be written.
    """
    from transformers.utils import logging as transformers_logging  # takes a second

    path = Path(folder) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _LogFile(path, on_record)
    except OSError as error:
        raise UserError(f"log_dir: cannot write to {folder}: {error.strerror}") from error
    file.setFormatter(_Formatter(_LINE, defaults={"rank": rank}))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(file)
    logging.captureWarnings(True)
    for noisy in ("httpx", "httpcore", "urllib3", "filelock", "fsspec", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    transformers_logging.disable_default_handler()  # its own lines would break the bar
    transformers_logging.enable_propagation()
    if rank == 0:
        root.addHandler(_Console())
    else:
        transformers_logging.disable_progress_bar()
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor in (1, 2):
            os.dup2(file.descriptor, descriptor)
    return path


def adapt_to_machine() -> None:
    """Let print escape what an ASCII console cannot show; let caches be in the temporary folder if there is no home.

    Before other libraries are imported: without a home, as containers may be, they would make a folder named ~.
    From now on what is printed, tracebacks and warnings too, has no credential.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        setattr(sys, name, stream if isinstance(stream, _Hiding) else _Hiding(stream))
    try:
        expand("~", "HOME")
    except ConfigError:
        os.environ.setdefault("XDG_CACHE_HOME", f"{tempfile.gettempdir()}/cache-{os.getuid()}")


def end_of_log(log: Path, start: int = 0) -> str:
    """Where a log is, and its last ten lines after the byte `start`."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            tail = file.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
    except OSError as error:
        tail = [f"(unreadable: {error.strerror})"]
    return "\n".join([f"the end of its log, {log.absolute()}:", *(f"  {line}" for line in tail or ["(empty)"])])


class _Hiding:
    """A text stream to which no credential is written."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return int(self._stream.write(hide(text)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Formatter(logging.Formatter):
    """Hides credentials in records, and in the tracebacks below them."""

    def format(self, record: logging.LogRecord) -> str:
        return hide(super().format(record))


class _LogFile(logging.FileHandler):
    """A worker's log file, which tells of each record."""

    def __init__(self, file: Path, on_record: Callable[[], None]) -> None:
        super().__init__(file, encoding="utf-8", errors="backslashreplace")
        assert self.stream is not None
        self.descriptor, self._on_record = self.stream.fileno(), on_record

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        self._on_record()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - as logging has it
        """A disk that is full takes no lines. It must not end the run, nor fill the console with tracebacks."""
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


class _Console(logging.Handler):
    """Records on stderr, above the progress bar: ours, and other libraries' from WARNING up."""

    def emit(self, record: logging.LogRecord) -> None:
        ours = record.name.startswith("distill")
        shown = getattr(record, "console", True) if ours else record.name != "py.warnings"
        if shown and (ours or record.levelno >= logging.WARNING):
            prefix = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
            tqdm.write(prefix + record.getMessage(), file=sys.stderr)
