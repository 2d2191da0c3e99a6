"""How a worker stops."""

import signal
import subprocess
import sys
import time

import pytest

from tests.support import environment

BLOCKED = """
import ctypes, sys
from distill.run.session import Session
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)

def body():
    libc.pthread_mutex_lock(mutex)
    print("blocked", flush=True)
    libc.pthread_mutex_lock(mutex)  # never returns, and no signal interrupts it

Session(0).run(body)
"""
WAITING = """
import time
from distill.run.session import Session
Session(0).run(lambda: print("blocked", flush=True) or time.sleep(60))
"""
GRACEFUL = """
import time
from distill.run import session as module
module._GRACEFUL_SECONDS = 1
session = module.Session(0)
session.graceful = True
session.run(lambda: print("blocked", flush=True) or time.sleep(60))
"""
AGAIN = """
import os, signal, time
from distill.run.session import Session
session = Session(0)
session.how_to_go_on = "go on"

def read():  # a second signal arrives while the first is answered
    os.kill(os.getpid(), signal.SIGUSR1)
    return 1, ""

def body():
    session.bar(10, 0, "teacher", "tok", lambda: (0, ""))
    session._bars[0]._read = read
    print("blocked", flush=True)
    time.sleep(60)

session.run(body)
"""
LOCKED = """
import time
from distill.run.session import Session
session = Session(0)

def body():
    bar = session.bar(10, 0, "teacher", "tok", lambda: (0, ""))
    with bar._closed._cond:  # what leaving needs
        print("blocked", flush=True)
        time.sleep(60)

session.run(body)
"""


@pytest.mark.parametrize(("program", "most"), [(BLOCKED, 10), (WAITING, 3), (GRACEFUL, 10), (AGAIN, 5), (LOCKED, 10)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_worker_whatever_it_does(program: str, most: float, number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", program], env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "blocked\n"
    sent = time.monotonic()
    process.send_signal(number)
    assert process.wait(timeout=30) == 128 + number
    assert time.monotonic() - sent < most
    process.stdout.close()


ENDING = """
import ctypes, time
from distill.run.session import Session
libc, key = ctypes.CDLL(None), ctypes.c_uint()

@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def free(_):
    time.sleep(0.5)
    print("freed", flush=True)

libc.pthread_key_create(ctypes.byref(key), free)
Session(0).run(lambda: libc.pthread_setspecific(key, ctypes.c_void_p(1)))
print("the end", flush=True)
"""


def test_the_end_waits_for_what_a_thread_frees_last() -> None:
    """As torch does with what DTensor caches: without an interpreter that would abort."""
    ran = subprocess.run([sys.executable, "-c", ENDING], env=environment(), capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "freed\nthe end\n"), ran.stderr


def test_a_child_that_ends_is_no_signal_to_stop() -> None:
    """A DataLoader's reader, say."""
    program = "import signal, subprocess, time; from distill.run.session import Session; session = Session(0); "
    program += "signal.signal(signal.SIGCHLD, lambda *_: None); "
    program += "session.run(lambda: subprocess.run(['true']) and time.sleep(2)); print('there')"
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, "there\n")
