"""How a worker ends: done, failed, or stopped by a signal; and what the user is told then, once.

torchrun prints, last of all, what a failed worker left in the file TORCHELASTIC_ERROR_FILE. A worker keeps its report
there up to date with every line that it logs, so that the report is there even after SIGKILL. A worker that torchrun
stops because another one failed leaves with status 0: torchrun then lists only the one that failed.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from distill.credentials import hide
from distill.errors import PeerError, StorageError, UserError, disk_failure
from distill.run.grid import Grid
from distill.run.log import adapt_to_machine, end_of_log, open_log
from distill.run.processes import STOPS, a_sibling_is_gone, await_siblings
from distill.run.progress import Bar
from distill.settings import Config, help_text, load, named

_PATIENCE_SECONDS = 3.0
_GRACEFUL_SECONDS = 20.0  # torchrun kills after 30


class Session:
    """The logs and bars of one worker, and how it ends.

    how_to_go_on:  what to tell the user when the run is stopped before its end; empty while there is nothing to say
    role:          what this worker is beside its rank, in words; empty while there is nothing to say
    graceful:      a signal is only kept in `stopping`: the program ends by itself, and is made to after 20 s
    stopping:      the signal that has come, if any
    """

    def __init__(self, rank: int) -> None:
        """Take over the signals that stop a run."""
        self.rank, self.how_to_go_on, self.role = rank, "", ""
        self.graceful = self._leaving = False
        self.stopping: int | None = None
        self._log: Path | None = None
        self._log_start = 0
        self._bars: list[Bar] = []
        self._report = _Report()
        for number in STOPS:
            signal.signal(number, self._stopped)

    def open(self, log_dir: str, name: str) -> None:
        """Log to the file `name` in `log_dir` and, on worker 0, to the console. Raises UserError as `open_log` does."""
        self._log = open_log(log_dir, name, self.rank, lambda: self._report.keep(self._failure))
        self._log_start = self._log.stat().st_size  # what an earlier run logged is not part of our report

    def bar(
        self, total: int, initial: int, name: str, unit: str, read: Callable[[], tuple[int, str]] | None = None
    ) -> Bar:
        """A progress bar that shows itself on worker 0 only."""
        self._bars.append(Bar(total, initial, name, unit, visible=self.rank == 0, read=read))
        return self._bars[-1]

    def run(self, body: Callable[[], None]) -> int:
        """Run the program; return its exit status: 0 done, 1 failed, 2 bad usage or input.

        It runs in a thread of its own. Python handles signals in the main thread, which waits for nothing else: so they
        are handled at once, even while the program waits for a GPU.
        """
        status: list[int] = []
        program = threading.Thread(target=lambda: status.append(self._run(body)), daemon=True)
        threading.stack_size(64 << 20)  # as small as 2 MiB otherwise, where the system's limit is "unlimited"
        program.start()
        threading.stack_size(0)
        parent, thread = os.getppid(), Path(f"/proc/self/task/{program.native_id}")
        while program.is_alive() or thread.exists():  # torch frees Python objects of a thread after Python's part of it
            program.join(1.0)
            time.sleep(0.001)
            if self._report.through_torchrun and os.getppid() != parent:  # a new torchrun may deal our blocks to others
                self.leave()
        for number in STOPS:  # a SIGTERM at the very end is no failure; Python then resets handlers, but not SIG_IGN
            signal.signal(number, signal.SIG_IGN)
        return status[0] if status else 1

    def _run(self, body: Callable[[], None]) -> int:
        try:
            body()
            return 0
        except UserError as error:
            self._end_as_others_do(f"error: {error}")
            return 2
        except PeerError as error:
            if self.stopping:  # so are the others
                self.leave(self.stopping)
            self._blame(error)
            return 1
        except BaseException as error:
            if self.stopping and self._a_sibling_is_gone():  # which is why this one failed
                self.leave(self.stopping)
            logging.getLogger("distill").critical("this worker failed", exc_info=True, extra={"console": False})
            if failure := str(error) if isinstance(error, StorageError) else disk_failure(error):
                self._end_as_others_do("; ".join(filter(None, [f"error: {failure}", self.how_to_go_on])))
            else:
                self._end(self._failure())
            return 1
        finally:  # what this worker has to say is said: a signal changes nothing any more
            self._leaving = True

    def abort(self, error: PeerError) -> NoReturn:
        """End this worker, from any thread, because of what others do."""
        self._blame(error)
        os._exit(1)

    def leave(self, number: int = signal.SIGTERM) -> NoReturn:
        """Stop, by the signal `number`. Committed blocks stay; a block that is half written is written again."""
        self._leaving = True
        try:
            _later(_PATIENCE_SECONDS, os._exit, 128 + number)  # the program may hold a lock that is needed below
            if self.rank == 0:
                for bar in self._bars:
                    with contextlib.suppress(RuntimeError):  # the workers' shared store may be gone
                        bar.show()
            self._close_bars()
            if self.rank == 0 and self.how_to_go_on:
                at = "".join(f" at {bar}" for bar in self._bars)
                os.write(2, f"stopped by {signal.Signals(number).name}{at}; {self.how_to_go_on}\n".encode())
        finally:  # even if the console is gone
            os._exit(0 if self._a_sibling_is_gone() else 128 + number)

    def _stopped(self, number: int, _frame: FrameType | None) -> None:
        if self._leaving:  # a second signal, in the middle of the answer to the first, or one at the very end
            return
        if self.graceful and not self._a_sibling_is_gone():  # else there is nobody left to wait for
            if self.stopping is None:
                self.stopping = number
                _later(_GRACEFUL_SECONDS, self.leave, number)
        else:
            self.leave(number)

    def _blame(self, error: PeerError) -> None:
        """Say which workers are at fault, and how their logs end: those explain it, not this worker's."""
        logging.getLogger("distill").critical("%s", error, extra={"console": False})
        assert self._log is not None
        found = {rank: [*self._log.parent.glob(f"worker_{rank}.*log")] for rank in error.ranks}
        logs = [max(paths, key=lambda path: path.stat().st_mtime) for paths in found.values() if paths]
        self._end("\n".join([str(error), *(end_of_log(log) for log in logs)]))

    def _failure(self) -> str:
        """Who failed, where its log is, and how that log ends."""
        if self._log is None:
            return f"worker {self.rank} failed before it had a log:\n{traceback.format_exc()}"
        role = f" ({self.role})" if self.role else ""
        return f"worker {self.rank}{role} failed; {end_of_log(self._log, self._log_start)}"

    def _end_as_others_do(self, text: str) -> None:
        """For what all workers meet: worker 0 speaks first, and alone."""
        if self._report.through_torchrun:
            await_siblings()
        if self.rank > 0:
            time.sleep(5)
        self._end(text)

    def _end(self, text: str) -> None:
        self._close_bars()
        self._report.say(text)

    def _close_bars(self) -> None:
        for bar in self._bars:
            bar.close()

    def _a_sibling_is_gone(self) -> bool:
        """Whether torchrun stops this worker because of another's failure. Else somebody stops this one alone."""
        return self._report.through_torchrun and a_sibling_is_gone()


def _later(seconds: float, function: Callable[[int], object], number: int) -> None:
    timer = threading.Timer(seconds, function, [number])
    timer.daemon = True
    timer.start()


class _Report:
    """What a worker that fails tells the user, once: through torchrun, which prints it last, or on stderr."""

    def __init__(self) -> None:
        self._file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        self._lock, self._said = threading.Lock(), False

    @property
    def through_torchrun(self) -> bool:
        return self._file is not None

    def keep(self, make: Callable[[], str]) -> None:
        """Leave a text for torchrun, in case this worker dies without a word."""
        if self._file:
            with contextlib.suppress(OSError), self._lock:  # a full disk must not end the run
                if not self._said:
                    self._leave(make())

    def say(self, text: str) -> None:
        """The last word of this worker."""
        if self._file:
            with self._lock:
                self._said = True  # other threads may still log
                try:
                    self._leave(text)
                    return
                except OSError:  # torchrun's file is in a folder that is full
                    pass
        print(text, file=sys.stderr, flush=True)

    def _leave(self, text: str) -> None:
        text = hide(text)
        stack = {"py_callstack": text, "timestamp": str(int(time.time()))}
        partial = Path(f"{self._file}.partial")
        partial.write_text(json.dumps({"message": {"message": text, "extraInfo": stack}}))
        partial.replace(f"{self._file}")


def run_worker(
    kind: type[Config],
    usage: str,
    arguments: Sequence[str],
    body: Callable[[Config, Grid, Session], None],
    keys: Sequence[str] = (),
) -> int:
    """An entry point: print --help, or run `body` with the settings among `arguments`, as a worker of torchrun.

    keys: of the values that may stand alone among the arguments, in this order
    Returns the exit status, as `Session.run` does.
    """
    adapt_to_machine()
    if {"--help", "-h"} & {*arguments}:
        print(help_text(kind, usage))
        return 0
    grid = Grid.from_environment()
    session = Session(grid.rank)
    return session.run(lambda: body(load(kind, named(kind, arguments, *keys) if keys else arguments), grid, session))
