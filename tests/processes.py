"""Looking at the processes of a run from outside, and what they have committed."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

from tests.support import wait_for


def children(pid: int) -> list[int]:
    """The child processes of all threads of a process; of each thread, in the order in which they were started."""
    found = []
    for thread in sorted(Path(f"/proc/{pid}/task").glob("*"), key=lambda thread: int(thread.name)):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += [int(child) for child in (thread / "children").read_text().split()]
    return found


def freeze(launcher: subprocess.Popen[bytes]) -> None:
    """Freeze the second of two workers until the first has ended because of it."""
    first, second = sorted(children(launcher.pid))
    os.kill(second, signal.SIGSTOP)
    wait_for(lambda: is_over(first))
    os.kill(second, signal.SIGCONT)  # so that torchrun may stop it, which else takes 30 s


def is_over(pid: int) -> bool:
    """Whether a process is gone, or has only to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def committed(store: Path) -> int:
    """Blocks that are committed."""
    folder = store / "commits" / "c"
    return len(list(folder.iterdir())) if folder.is_dir() else 0
