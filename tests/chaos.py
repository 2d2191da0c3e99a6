"""Random faults at random moments, on a local disk and on S3; the runs after them have other numbers of workers.

    python -m tests.chaos 100 [seed]    # 100 faults; prints each, and a table of all

A fault comes soon after the start of a run (while it imports, tokenizes or plans), or soon after some more commits.
Where it ends the run, the next one goes on; a server comes back after seconds, and the run that waits for it goes on.
Whenever a store is complete, its bytes are compared with those of an undisturbed run, and another one is begun.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from tests.processes import children, committed
from tests.store.seaweedfs import Server
from tests.support import WORDS, command, environment, generate, remount, save_model, small_disk, tree, wait_for

KILLS = ("SIGKILL one worker", "SIGKILL worker 0", "SIGKILL all workers", "SIGKILL torchrun and all", "SIGTERM")
_ROWS = 300
_ROOM = "64m"


class Disk:
    """A small file system of its own, with one store after the other."""

    name = "disk"
    faults = (*KILLS, "disk full", "disk read-only")
    options: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        self._folder, self.number = folder, 0

    @property
    def path(self) -> str:
        return str(self._folder / f"{self.number}.zarr")

    def committed(self) -> int:
        return committed(Path(self.path))

    def files(self, _scratch: Path) -> dict[str, str]:
        return tree(Path(self.path))

    def inflict(self, fault: str, run: subprocess.Popen[bytes], rng: random.Random) -> None:
        """Until the run has ended by it."""
        if fault == "disk full":
            room = os.statvfs(self._folder)
            used = (room.f_blocks - room.f_bfree) * room.f_frsize // 1024
            remount(self._folder, f"size={used + rng.choice((4, 40, 120))}k")
        else:
            remount(self._folder, "ro")
        run.wait(timeout=300)
        remount(self._folder, "rw")
        remount(self._folder, f"size={_ROOM}")


class Bucket:
    """A server with one store after the other."""

    name = "s3"
    faults = (*KILLS, "server killed", "server frozen")

    def __init__(self, server: Server) -> None:
        self._server, self.number = server, 0
        self.options = (*server.arguments, "store.options.client_options.read_timeout=2s")

    @property
    def path(self) -> str:
        return f"s3://bucket/{self.number}.zarr"

    def committed(self) -> int:
        import obstore

        listed = obstore.list(self._server.bucket(f"{self.number}.zarr/commits"))
        return sum(found["path"].startswith("c/") for batch in listed for found in batch)

    def files(self, scratch: Path) -> dict[str, str]:
        return tree(self._server.download(f"{self.number}.zarr", scratch / f"{self.number}"))

    def inflict(self, fault: str, run: subprocess.Popen[bytes], rng: random.Random) -> None:
        """For some seconds, which the run survives."""
        if fault == "server killed":
            self._server.kill()
            time.sleep(rng.uniform(0, 8))
            self._server.restart()
        else:
            self._server.freeze()
            time.sleep(rng.uniform(1, 8))
            self._server.thaw()


def kill(launcher: subprocess.Popen[bytes], fault: str, rng: random.Random) -> None:
    """Signal those that `fault` names, and wait until the run has ended."""
    workers = sorted(children(launcher.pid))
    victims = {
        "SIGKILL one worker": [rng.choice(workers)] if workers else [],
        "SIGKILL worker 0": workers[:1],
        "SIGKILL all workers": workers,
        "SIGKILL torchrun and all": [launcher.pid, *workers],
        "SIGTERM": [launcher.pid],
    }[fault]
    for pid in victims:
        try:
            os.kill(pid, signal.SIGTERM if fault == "SIGTERM" else signal.SIGKILL)
        except ProcessLookupError:
            continue
    launcher.wait(timeout=300)


class Storm:
    """Runs at one place, and faults that come over them.

    done: how often each fault came, and when. stores: how many were complete, and equal to the undisturbed one.
    """

    def __init__(self, place: Disk | Bucket, arguments: list[str], expected: dict[str, str], folder: Path) -> None:
        self.place, self._arguments, self._expected, self._folder = place, arguments, expected, folder
        self._run: subprocess.Popen[bytes] | None = None
        self._workers, self.stores = 0, 0
        self.done: Counter[tuple[str, str, str]] = Counter()
        folder.mkdir()

    def strike(self, fault: str, early: bool, rng: random.Random) -> None:
        """Bring one fault upon a run."""
        run = self._running(rng.randint(1, 4))
        before, more = self.place.committed(), rng.randint(1, 4)
        if early:
            time.sleep(rng.uniform(0, 8))
        else:
            wait_for(lambda: self.place.committed() >= before + more or run.poll() is not None, seconds=300)
        time.sleep(rng.uniform(0, 0.3))
        there = self.place.committed()
        if run.poll() is not None:  # it was faster
            self._check(run)
            self.strike(fault, early, rng)
            return
        moment = "between commits" if there > before else "before a commit"
        if fault in KILLS:
            kill(run, fault, rng)
        else:
            self.place.inflict(fault, run, rng)
        self.done[self.place.name, fault, moment] += 1
        print(f"{self.place.name}: {fault}, {self._workers} workers, {there} blocks committed", flush=True)

    def finish(self) -> None:
        """Let the store that was begun last be completed."""
        run = self._running(3)
        run.wait(timeout=600)
        self._check(run)

    def _running(self, workers: int) -> subprocess.Popen[bytes]:
        if self._run is not None and self._run.poll() == 0:
            self._check(self._run)
        if self._run is None or self._run.poll() is not None:
            with (self._folder / "console").open("wb") as console:
                words = command(workers, [*self._arguments, f"store.path={self.place.path}", *self.place.options])
                self._run = subprocess.Popen(
                    words, cwd=self._folder, env=environment(), stdout=console, stderr=console, start_new_session=True
                )
            self._workers = workers
            run = self._run
            wait_for(lambda: len(children(run.pid)) >= workers or run.poll() is not None)
        return self._run

    def _check(self, run: subprocess.Popen[bytes]) -> None:
        """A run that has ended without a fault has completed its store; the next one begins another."""
        said = (self._folder / "console").read_text()
        assert run.returncode == 0, said
        found = self.place.files(self._folder)
        assert found == self._expected, f"{self.place.path}: {sorted({*found.items()} ^ {*self._expected.items()})}"
        if (Path(__file__).parent.parent / "distill" / "verify.py").is_file():
            words = [sys.executable, "-m", "distill.verify", self.place.path, *self.place.options]
            verified = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
            assert verified.returncode == 0, verified.stdout + verified.stderr
        print(f"{self.place.name}: store {self.place.number} has the bytes of an undisturbed run", flush=True)
        self.stores += 1
        self.place.number += 1
        self._run = None


def chaos(root: Path, faults: int, seed: int) -> tuple[Counter[tuple[str, str, str]], int]:
    """So many faults. Returns which came, and how many stores were completed; AssertionError where one differs."""
    rng = random.Random(seed)
    model = save_model("llama", root / "model", num_hidden_layers=8, hidden_size=256, intermediate_size=1024)
    rows = [
        {"text": " ".join(WORDS[(i * 31 + j * j) % len(WORDS)] for j in range(1 + i * 7 % 60))} for i in range(_ROWS)
    ]
    (root / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"teacher.model={model}", f"dataset.path={root / 'texts.jsonl'}", "dataset.max_length=256"]
    arguments += ["capture.k=16", "store.block_rows=1024", "batch.max_tokens=1024"]
    ran = generate(root, *arguments, "store.path=undisturbed.zarr", timeout=600)
    assert ran.returncode == 0, ran.stderr
    expected = tree(root / "undisturbed.zarr")
    with ExitStack() as stack:
        disk = stack.enter_context(small_disk(root / "disk", _ROOM))
        server = Server(root / "server")
        stack.callback(server.kill)
        storms = [
            Storm(place, arguments, expected, root / f"runs on {place.name}") for place in (Disk(disk), Bucket(server))
        ]
        decks: dict[str, list[str]] = {place.name: [] for place in (Disk, Bucket)}
        for number in range(faults):
            storm = storms[number % 2]
            deck = decks[storm.place.name]
            if not deck:  # every kind comes, in random order
                deck += rng.sample(storm.place.faults, len(storm.place.faults))
            fault = deck.pop()
            storm.strike(fault, early=number % 4 == rng.randint(0, 3), rng=rng)
        for storm in storms:
            storm.finish()
        return sum((storm.done for storm in storms), Counter()), sum(storm.stores for storm in storms)


if __name__ == "__main__":
    given = int(sys.argv[2]) if len(sys.argv) > 2 else int(time.time())
    print(f"seed {given}")
    with tempfile.TemporaryDirectory() as scratch:
        done, stores = chaos(Path(scratch), int(sys.argv[1]), given)
    for (place, fault, moment), count in sorted(done.items()):
        print(f"{place:6}{fault:28}{moment:18}{count:4}")
    print(f"{sum(done.values())} faults; {stores} stores were completed, each with the bytes of an undisturbed run")
