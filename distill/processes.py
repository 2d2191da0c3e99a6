"""The processes beside and below a worker: torchrun's other workers on the node, and the readers of its DataLoader."""

import contextlib
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the signals that stop a run


def siblings() -> list[str] | None:
    """The process ids of torchrun's workers on this node, this one's among them; None where /proc does not tell."""
    parent = os.getppid()
    try:
        return Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:
        return None


def is_ready(pid: str) -> bool:
    """Whether a process catches or ignores SIGTERM, or is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    masks = re.findall(r"^Sig(?:Cgt|Ign):\s*(\w+)", status, re.MULTILINE)
    return any(int(mask, 16) >> (signal.SIGTERM - 1) & 1 for mask in masks)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Start a DataLoader's processes in this, with `obey_parent_only`: a signal does not reach them before that."""
    resource_tracker.ensure_running()  # its start unblocks
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_parent_only(_reader: int) -> None:
    """For a DataLoader's processes: SLURM and torchrun signal them too, but only their parent is to stop them."""
    if not hasattr(signal, "sigtimedwait"):  # macOS
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        return

    parent = multiprocessing.parent_process()
    assert parent is not None

    def listen(parent: BaseProcess) -> None:
        while parent.is_alive():  # torch asks for the process above it, which, of a forkserver, lives on
            came = signal.sigtimedwait(STOPS, 1.0)
            if came is not None and came.si_pid == parent.pid:
                break
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    threading.Thread(target=listen, args=[parent], daemon=True).start()
