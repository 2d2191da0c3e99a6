"""Rank-aware logging, progress and failure reports.

Worker 0 owns the console: plain lines that do not tear the progress bar. Every worker writes a log of its own in
``log_dir``, ``worker_<rank>.log``; workers 1+ write nothing else, their stdout and stderr end there too.

When a worker dies, the console ends with its rank, its log's path and the last lines of that log, once. torchrun
reads what a failed worker left in TORCHELASTIC_ERROR_FILE and prints it last. So each worker keeps that file up to
date with every log line: even after SIGKILL, when nobody is left to explain, it is there. Workers that torchrun
stops because another one failed leave with status 0, so that only the culprit is listed.
"""

import contextlib
import json
import logging
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tqdm import tqdm

from distill import progress
from distill.errors import PeerError, UserError
from distill.processes import STOPS, is_ready, siblings
from distill.progress import TokenBar

TAIL_LINES = 10
_TAIL_BYTES = 1 << 14
_PATIENCE_SECONDS = 3.0
_STARTING_SECONDS = 10.0
_GRACEFUL_SECONDS = 20.0  # torchrun kills after 30
_UNITS = {"tok": "tokens", "step": "steps"}
_LINE = "%(asctime)s rank %(rank)s %(levelname)s %(name)s: %(message)s"


class Session:
    """The logs of one worker and the way it ends.

    log:           the file of this worker, once opened
    how_to_go_on:  what to tell the user when the run is stopped before its end; set when there is something to say
    role:          what this worker is beside its rank, in words; set when there is something to say
    graceful:      on a signal, only note it in `stopping`: the program leaves by itself, or is made to after 20 s
    stopping:      the signal that came, if one did
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.log: Path | None = None
        self.how_to_go_on = self.role = ""
        self.graceful = self._over = self._said = self._leaving = False
        self._reporting = threading.Lock()
        self.stopping: int | None = None
        self._log_start = 0
        self._error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        self._bars: list[TokenBar | tqdm[NoReturn]] = []
        for name in STOPS:
            signal.signal(name, self._stopped)
        self._stop_even_if_blocked()

    def open(self, log_dir: str, name: str) -> None:
        """Send log records, warnings and, for workers 1+, everything printed, to the file `name` in `log_dir`."""
        from transformers.utils import logging as transformers_logging  # takes a second

        self.log = Path(log_dir) / name
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            file = _ReportingHandler(self, self.log)
        except OSError as error:
            raise UserError(f"log_dir: cannot write to {log_dir}: {error.strerror}") from error
        self._log_start = self.log.stat().st_size  # what an earlier run logged is not ours to report
        file.setFormatter(logging.Formatter(_LINE, defaults={"rank": self.rank}))
        root = logging.getLogger()
        root.setLevel(logging.INFO)
        root.addHandler(file)
        logging.captureWarnings(True)
        for noisy in ("httpx", "httpcore", "urllib3", "filelock", "fsspec", "asyncio"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        transformers_logging.disable_default_handler()  # its own prints would tear the bar
        transformers_logging.enable_propagation()
        if self.rank == 0:
            root.addHandler(_ConsoleHandler())
        else:
            transformers_logging.disable_progress_bar()
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor in (1, 2):
                os.dup2(file.descriptor(), descriptor)

    def bar(self, total: int, initial: int, read: Callable[[], tuple[int, str]]) -> TokenBar:
        """A progress bar over tokens that shows itself on worker 0 only; see TokenBar."""
        bar = TokenBar(total, initial, read, visible=self.rank == 0)
        self._bars.append(bar)
        return bar

    def step_bar(self, total: int, initial: int, name: str) -> "tqdm[NoReturn]":
        """A progress bar over steps, for the caller to update; visible on worker 0 only."""
        bar = progress.bar(total, initial, name, "step", visible=self.rank == 0)
        self._bars.append(bar)
        return bar

    def run(self, body: Callable[[], None]) -> int:
        """Run the program; return its exit status: 0 done, 1 failed, 2 bad usage or input."""
        try:
            body()
            return 0
        except UserError as error:
            self._await_siblings()
            if self.rank > 0:  # worker 0 has very likely met the same error; let it speak first, and alone
                time.sleep(5)
            self._close_bars()
            self._say(f"error: {error}")
            return 2
        except PeerError as error:
            if self.stopping:  # so are they
                self.leave(self.stopping)
            self._blame(error)
            return 1
        except Exception:
            if self.stopping and self._a_sibling_is_gone():  # which is why this one failed
                self.leave(self.stopping)
            self._close_bars()
            logging.getLogger("distill").critical("this worker failed", exc_info=True, extra={"console": False})
            self._say(self.report())
            return 1
        finally:  # a SIGTERM while the interpreter ends, which resets handlers but not this, is no failure
            self._over = True
            for name in STOPS:
                signal.signal(name, signal.SIG_IGN)

    def abort(self, error: PeerError) -> NoReturn:
        """End this worker, from any thread, because of what others do."""
        self._blame(error)
        os._exit(1)

    def _blame(self, error: PeerError) -> None:
        """Say which workers are at fault, and how their logs end: those explain it, not this worker's."""
        self._close_bars()
        logging.getLogger("distill").critical("%s", error, extra={"console": False})
        assert self.log is not None
        found = {rank: [*self.log.parent.glob(f"worker_{rank}.*log")] for rank in error.ranks}
        logs = [max(paths, key=lambda path: path.stat().st_mtime) for paths in found.values() if paths]
        self._say("\n".join([str(error), *(_end_of(log) for log in logs)]))

    def report(self) -> str:
        """Who failed, where its log is, and how that log ends."""
        if self.log is None:
            return f"worker {self.rank} failed before it had a log:\n{traceback.format_exc()}"
        return f"worker {self.rank}{self.role and f' ({self.role})'} failed; {_end_of(self.log, self._log_start)}"

    def leave_report(self) -> None:
        """Keep the report where torchrun will look for it, should this worker die without a word."""
        if self._error_file:
            with contextlib.suppress(OSError), self._reporting:  # a full disk must not end the run
                if not self._said:
                    self._leave(self.report())

    def _say(self, text: str) -> None:
        """On the console, once: through torchrun, which prints it last, or directly."""
        if self._error_file:
            with self._reporting:
                self._said = True  # other threads may still log
                self._leave(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def _leave(self, text: str) -> None:
        assert self._error_file is not None
        stack = {"py_callstack": text, "timestamp": str(int(time.time()))}
        partial = Path(f"{self._error_file}.partial")
        partial.write_text(json.dumps({"message": {"message": text, "extraInfo": stack}}))
        partial.replace(self._error_file)

    def leave(self, number: int = signal.SIGTERM) -> NoReturn:
        """Stop, by the signal `number`. What is committed stays; a block half written is written again."""
        self._leaving = True
        try:
            if self.rank == 0:
                for token_bar in (bar for bar in self._bars if isinstance(bar, TokenBar)):
                    with contextlib.suppress(RuntimeError):  # the workers' shared store may be gone
                        token_bar.show()
            self._close_bars()
            if self.rank == 0 and self.how_to_go_on:
                bars = [bar.bar if isinstance(bar, TokenBar) else bar for bar in self._bars]
                at = "".join(f" at {bar.n:,} of {bar.total:,} {_UNITS[bar.unit]}" for bar in bars)
                os.write(2, f"stopped by {signal.Signals(number).name}{at}; {self.how_to_go_on}\n".encode())
        finally:  # whatever became of the console
            os._exit(0 if self._a_sibling_is_gone() else 128 + number)

    def _stopped(self, number: int, _frame: FrameType | None) -> None:
        if self._leaving:  # a second signal, which came in the middle of what the first one does, under its locks
            return
        if self.graceful and not self._a_sibling_is_gone():  # else nobody is left to wait for
            if self.stopping is None:
                self.stopping = number
                last_moment = threading.Timer(_GRACEFUL_SECONDS, self.leave, [number])
                last_moment.daemon = True
                last_moment.start()
        else:
            self.leave(number)

    def _stop_even_if_blocked(self) -> None:
        """See to it that a signal stops this worker while its main thread, which handles signals, waits for a GPU."""

        def watch() -> None:
            number = 0
            while number not in STOPS:
                if select.select([received], [], [], 1.0)[0]:
                    number = os.read(received, 1)[0]  # of every signal that has a handler: a DataLoader's SIGCHLD too
                elif self._error_file and os.getppid() != parent:  # torchrun was killed: others may have our blocks
                    self.leave()
            time.sleep(_PATIENCE_SECONDS)
            if not (self._leaving or self._over or self.stopping):
                threading.Thread(target=self._stopped, args=(number, None), daemon=True).start()
            time.sleep(_PATIENCE_SECONDS)
            if not (self._over or self.stopping):  # a lock is held by the thread that is blocked
                os._exit(128 + number)

        parent = os.getppid()
        received, sent = os.pipe()
        os.set_blocking(sent, False)
        signal.set_wakeup_fd(sent, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a reader's signals are not ours
        threading.Thread(target=watch, daemon=True).start()

    def _a_sibling_is_gone(self) -> bool:
        """Whether torchrun stops this worker because of another's failure, rather than somebody this worker alone."""
        pids = siblings() if self._error_file else None
        return pids is not None and len(pids) < int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def _await_siblings(self) -> None:
        """Let those that still start get ready for SIGTERM, or torchrun, which sends it next, lists them as failed."""
        limit = time.monotonic() + _STARTING_SECONDS
        while self._error_file and time.monotonic() < limit and not all(map(is_ready, siblings() or ())):
            time.sleep(0.1)

    def _close_bars(self) -> None:
        for bar in self._bars:
            bar.close()


def _end_of(log: Path, start: int = 0) -> str:
    """Where a log is, and its last lines from the byte `start` on."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            tail = file.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
    except OSError as error:
        tail = [f"(unreadable: {error.strerror})"]
    return "\n".join([f"the end of its log, {log.absolute()}:", *(f"  {line}" for line in tail or ["(empty)"])])


class _ReportingHandler(logging.FileHandler):
    """A worker's log file; each line also refreshes the report that is left for torchrun."""

    def __init__(self, session: Session, file: Path) -> None:
        super().__init__(file)
        self._session = session

    def descriptor(self) -> int:
        """The open file, for what is printed past logging."""
        assert self.stream is not None
        return self.stream.fileno()

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        self._session.leave_report()


class _ConsoleHandler(logging.Handler):
    """Lines on stderr that step aside for a progress bar: ours, and others' from WARNING up."""

    def emit(self, record: logging.LogRecord) -> None:
        ours = record.name.startswith("distill") and getattr(record, "console", True)
        if ours or (
            record.levelno >= logging.WARNING and record.name != "py.warnings" and not record.name.startswith("distill")
        ):
            prefix = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
            tqdm.write(prefix + record.getMessage(), file=sys.stderr)
