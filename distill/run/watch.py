"""Notice a worker that hangs, and say which one.

Every few seconds each worker notes on the board that it is alive, and for how long it has made no progress. Worker 0
reads the notes of all workers; the others read worker 0's. A worker that writes no more notes, or makes no progress,
for `timeout_seconds` ends the run. Work of unknown length, such as loading a model, is done before the first `beat` or
after `rest`: nobody expects progress then.
"""

import contextlib
import json
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from distill.errors import PeerError
from distill.run.board import Board
from distill.run.grid import Grid

logger = logging.getLogger(__name__)

_FRAMES = 4
_LOOKS = 3
_LEFT = "left"


class Watch:
    """The watch that one worker keeps, in a thread, during a ``with`` block.

    grid:  the workers of one of its replicas wait for each other. Where one hangs all stand still, and those with the
           fewest beats are named
    alarm: called in that thread with the PeerError that names who hangs; has to end this process
    """

    def __init__(self, board: Board, grid: Grid, timeout_seconds: float, alarm: Callable[[PeerError], None]) -> None:
        self._board, self._grid, self._alarm = board, grid, alarm
        self._timeout, self._period = timeout_seconds, min(5.0, timeout_seconds / 10)
        self._beats = 0
        self._last: float | None = None  # when the last beat was; None: at rest
        self._over, self._watched = threading.Event(), threading.get_ident()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if kind is None:
            with contextlib.suppress(PeerError):  # nobody reads it any more
                self._board.note(self._key(self._grid.rank), _LEFT)

    def beat(self) -> None:
        """There was progress, and the next is expected within the time-out."""
        self._beats += 1
        self._last = time.monotonic()

    def rest(self) -> None:
        """No progress is expected until the next `beat`."""
        self._last = None

    def follow(self, model: Any) -> None:
        """Count every layer that `model` begins as progress: a whole batch may take long on a slow device."""
        for part in model.modules():
            for layer in part if type(part).__name__ == "ModuleList" else ():
                layer.register_forward_pre_hook(lambda *_: self.beat())

    @staticmethod
    def _key(rank: int) -> str:
        return f"watch of {rank}"

    def _keep(self) -> None:
        rank = self._grid.rank
        peers = range(self._grid.world_size) if rank == 0 else (0,)
        shown = {peer: ("", time.monotonic()) for peer in peers}  # the last note of each, and since when
        told, tick, looks = False, 0, 0
        try:
            while not self._over.wait(self._period):
                tick, last = tick + 1, self._last
                idle = None if last is None else time.monotonic() - last
                self._board.note(self._key(rank), json.dumps([tick, idle, self._beats]))
                stands = idle is not None and idle >= self._timeout
                if stands and not told:
                    self._tell_where()
                told = stands
                for peer, (before, _) in shown.items():
                    if self._board.has(self._key(peer)) and (note := self._board.wait(self._key(peer))) != before:
                        shown[peer] = note, time.monotonic()
                hanging = self._hanging(shown)
                looks = looks + 1 if hanging else 0  # all processes, this one too, may have been stopped for a while
                if looks >= _LOOKS and self._board.add("alarms", 1) == 1:
                    several = (
                        f"workers {', '.join(map(str, hanging))} have" if hanging[1:] else f"worker {hanging[0]} has"
                    )
                    said = f"{several} made no progress for {self._timeout:g} s (timeout_seconds)"
                    self._alarm(PeerError(said, hanging))
        except PeerError:  # the board is gone: the run is ending
            return

    def _tell_where(self) -> None:
        stack = traceback.format_stack(sys._current_frames()[self._watched])
        where = "".join(stack[-_FRAMES:]).rstrip()
        logger.warning("no progress for %g s, at:\n%s", self._timeout, where, extra={"console": False})

    def _hanging(self, shown: dict[int, tuple[str, float]]) -> list[int]:
        """The ranks whose process is frozen; if there are none and this is worker 0, those without progress."""
        there = {peer: found for peer, found in shown.items() if found[0] != _LEFT}
        frozen = [peer for peer, (_, since) in there.items() if time.monotonic() - since >= self._timeout]
        if frozen or self._grid.rank > 0:
            return frozen
        states = {peer: json.loads(note)[1:] for peer, (note, _) in there.items() if note}
        working = {peer: (idle, beats) for peer, (idle, beats) in states.items() if idle is not None}
        found: list[int] = []
        for first in range(0, self._grid.world_size, self._grid.shard_size):
            members = [peer for peer in range(first, first + self._grid.shard_size) if peer in working]
            if all(working[peer][0] >= self._timeout for peer in members):  # else they wait for a slow one
                fewest = min((working[peer][1] for peer in members), default=0)
                found += [peer for peer in members if working[peer][1] == fewest]
        return found
