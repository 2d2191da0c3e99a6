"""Progress bars: of tokens, polled for all workers together, and of steps. Visible on worker 0 only."""

import contextlib
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from tqdm import tqdm


class TokenBar:
    """Tokens of all workers together, polled twice a second from `read`, which returns (tokens, postfix)."""

    def __init__(self, total: int, initial: int, read: Callable[[], tuple[int, str]], visible: bool) -> None:
        self.bar = bar(total, initial, "teacher", "tok", visible, unit_scale=True)
        self._initial, self._read = initial, read
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        if visible:
            self._thread.start()

    def _poll(self) -> None:
        with contextlib.suppress(RuntimeError):  # torchrun and its store are gone: the run is ending
            while not self._closed.wait(0.5):
                self.show()

    def show(self) -> None:
        """Show the latest figures."""
        tokens, postfix = self._read()
        self.bar.set_postfix_str(postfix, refresh=False)
        self.bar.update(self._initial + tokens - self.bar.n)

    def finish(self) -> None:
        """Show the last figures and close."""
        if not self.bar.disable:
            self.show()
        self.close()

    def close(self) -> None:
        """Close, leaving what is shown. May be called twice."""
        self._closed.set()
        self.bar.close()


def bar(total: int, initial: int, name: str, unit: str, visible: bool, unit_scale: bool = False) -> "tqdm[NoReturn]":
    """A bar on stderr: of `total`, from `initial` on, in `unit`; a line every ten seconds where that is a file."""
    return tqdm(
        total=total,
        initial=initial,
        desc=name,
        unit=unit,
        unit_scale=unit_scale,
        disable=not visible,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
        file=sys.stderr,
        dynamic_ncols=True,
    )
