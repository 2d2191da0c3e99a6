"""The processes around a worker: torchrun above it, torchrun's other workers beside it, a DataLoader's readers below.

A sibling is a worker of the same torchrun, which is the parent of all of them.
"""

import contextlib
import multiprocessing
import multiprocessing.util
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from distill.errors import ReaderError

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""The signals that stop a run."""

_STARTING_SECONDS = 10.0
_SOCKET_FOLDER = 60  # bytes; multiprocessing adds the names of a folder and a socket
_WHY = {
    "SIGKILL": "; where nobody did that, it was the system, for want of memory: fewer batch.readers, a smaller "
    "batch.window_blocks, or batch.readers=0",
    "SIGBUS": "; /dev/shm may be full, as it is small in containers: docker's --shm-size, or batch.readers=0",
}


def a_sibling_is_gone() -> bool:
    """Whether fewer workers run on this node than torchrun started; False where that cannot be known."""
    pids = _siblings()
    return pids is not None and len(pids) < int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def await_siblings() -> None:
    """Wait until workers that still start are ready for SIGTERM, which torchrun sends when this one has failed.

    SIGTERM kills those that are not, and torchrun then lists them as failed too.
    """
    limit = time.monotonic() + _STARTING_SECONDS
    while time.monotonic() < limit and not all(map(_is_ready, _siblings() or ())):
        time.sleep(0.1)


def _siblings() -> list[str] | None:
    """The process ids of torchrun's workers on this node, with this one; None where /proc does not tell."""
    parent = os.getppid()
    try:
        return Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:
        return None


def _is_ready(pid: str) -> bool:
    """Whether a process catches or ignores SIGTERM, or is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    masks = re.findall(r"^Sig(?:Cgt|Ign):\s*(\w+)", status, re.MULTILINE)
    return any(int(mask, 16) >> (signal.SIGTERM - 1) & 1 for mask in masks)


@contextlib.contextmanager
def short_socket_paths() -> Iterator[None]:
    """Start processes with forkserver in this context: its sockets are in /tmp where TMPDIR's path is too long.

    The path of a UNIX socket has at most 107 bytes. multiprocessing makes one folder for all of a process's sockets.
    """
    usual = tempfile.gettempdir()
    try:
        if len(usual) > _SOCKET_FOLDER:
            tempfile.tempdir = "/tmp"
            multiprocessing.util.get_temp_dir()
        yield
    finally:
        tempfile.tempdir = usual


def check_readers(readers: Iterable[Any]) -> None:
    """Raise ReaderError where one of a DataLoader's processes has ended by itself, with what ended it."""
    for reader in readers:
        reader.join(0)
        if reader.exitcode:
            how = f"exit status {reader.exitcode}" if reader.exitcode > 0 else signal.Signals(-reader.exitcode).name
            why = _WHY.get(how, "")
            raise ReaderError(f"a reader (process {reader.pid}) was ended by {how}{why}")


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Start a DataLoader's readers in this context: no signal reaches one before its `obey_parent_only`."""
    resource_tracker.ensure_running()  # its start would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_parent_only(_reader: int) -> None:
    """A DataLoader's worker_init_fn: only its parent may stop a reader, although SLURM and torchrun signal it too."""
    if not hasattr(signal, "sigtimedwait"):  # macOS
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        return

    parent = multiprocessing.parent_process()
    assert parent is not None

    def listen(parent: BaseProcess) -> None:
        while parent.is_alive():  # torch checks the parent only: with forkserver that is the server, which lives on
            came = signal.sigtimedwait(STOPS, 1.0)
            if came is not None and came.si_pid == parent.pid:
                break
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    threading.Thread(target=listen, args=[parent], daemon=True).start()
