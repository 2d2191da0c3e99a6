"""Progress bars on stderr: of the tokens of all workers, or of the steps of a training. Visible on worker 0 only."""

import contextlib
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from tqdm import tqdm

_UNITS = {"tok": "tokens", "step": "steps", "rollout": "rollouts"}


class Bar:
    """A progress bar: stepped by its owner, or, with `read`, polled twice a second for what all workers have done.

    unit: tok, step or rollout
    read: returns how much was done in this run, and a postfix
    """

    def __init__(
        self,
        total: int,
        initial: int,
        name: str,
        unit: str,
        visible: bool,
        read: Callable[[], tuple[int, str]] | None = None,
    ) -> None:
        self._bar: tqdm[NoReturn] = tqdm(
            total=total,
            initial=initial,
            desc=name,
            unit=unit,
            unit_scale=unit == "tok",
            disable=not visible,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,  # in a file, each change is one more line
            file=sys.stderr,
            dynamic_ncols=True,
        )
        self._total, self._initial, self._unit, self._read = total, initial, unit, read
        self._closed = threading.Event()
        if read is not None and visible:
            threading.Thread(target=self._poll, daemon=True).start()

    def _poll(self) -> None:
        with contextlib.suppress(RuntimeError):  # torchrun and its store are gone: the run is ending
            while not self._closed.wait(0.5):
                self.show()

    def step(self, postfix: str) -> None:
        """One more is done."""
        self._bar.set_postfix_str(postfix, refresh=False)
        self._bar.update()

    def show(self) -> None:
        """Show what `read` returns now. Raises PeerError where the workers' shared store is gone."""
        if self._read is not None and not self._bar.disable:
            done, postfix = self._read()
            self._bar.set_postfix_str(postfix, refresh=False)
            self._bar.update(self._initial + done - self._bar.n)

    def close(self) -> None:
        """Close, and leave on the screen what is shown. May be called twice."""
        self._closed.set()
        self._bar.close()

    def __str__(self) -> str:
        """How far it is, as in "1,477 of 32,758 tokens"."""
        return f"{self._bar.n:,} of {self._total:,} {_UNITS[self._unit]}"
