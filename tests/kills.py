"""Kill runs at random moments, and let others continue with another number of workers.

    python -m tests.kills 50        # 50 kills, then the comparison with an undisturbed run; prints what happened

Each round starts the command with 1 to 4 workers and kills -9 one worker, worker 0, all workers, or torchrun with
them, at a random moment between the start and the end of a run. When the kills are used up, one more run goes to the
end, and the store's bytes are compared with those of a run without kills.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.support import WORDS, command, environment, generate, save_model, tree, wait_for

VICTIMS = ("one worker", "worker 0", "all workers", "torchrun and all workers")


def children(pid: int) -> list[int]:
    """The child processes of all threads of a process; of each thread, in the order in which they were started."""
    found = []
    for thread in sorted(Path(f"/proc/{pid}/task").glob("*"), key=lambda thread: int(thread.name)):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += [int(child) for child in (thread / "children").read_text().split()]
    return found


def kill(launcher: subprocess.Popen[bytes], victim: str, rng: random.Random) -> bool:
    """Kill -9 the victims of a running torchrun; False if there were none to kill."""
    workers = sorted(children(launcher.pid))
    if launcher.poll() is not None or not workers:
        return False
    chosen = {
        "one worker": [rng.choice(workers)],
        "worker 0": workers[:1],
        "all workers": workers,
        "torchrun and all workers": [launcher.pid, *workers],
    }[victim]
    for pid in chosen:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return True


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


def storm(folder: Path, arguments: list[str], kills: int, seed: int) -> Counter[str]:
    """Start and kill until `kills` runs have been killed, or all is done. Returns how often what was killed when.

    Every fourth kill is at a random moment of the first seconds: while importing, tokenizing, planning. The others are
    soon after a random number of blocks more than there were.
    """
    rng = random.Random(seed)
    done: Counter[str] = Counter()
    for number in range(kills):
        victim, workers = rng.choice(VICTIMS), rng.randint(1, 4)
        before, early = committed(folder / "x.zarr"), number % 4 == 0
        with (folder / "storm.log").open("ab") as log:
            launcher = subprocess.Popen(
                command(workers, arguments),
                cwd=folder,
                env=environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            while len(children(launcher.pid)) < workers and launcher.poll() is None:
                time.sleep(0.02)
            if early:
                time.sleep(rng.uniform(0, 8))
            wanted = before + rng.randint(1, 5)
            while not early and committed(folder / "x.zarr") < wanted and launcher.poll() is None:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.3))
            there = committed(folder / "x.zarr")
            if not kill(launcher, victim, rng):
                break
            launcher.wait(timeout=120)
        moment = "between commits" if there > before else "before the first commit"
        done[f"{victim}, {moment}"] += 1
        print(f"kill {number + 1}: {victim} of {workers}, {moment}; {there} blocks committed", flush=True)
    return done


def compare(root: Path, kills: int, seed: int) -> Counter[str]:
    """An undisturbed run and a storm, with the same arguments; raises AssertionError where their stores differ."""
    model = save_model("llama", root / "model", num_hidden_layers=8, hidden_size=256, intermediate_size=1024)
    rows = [
        {"text": " ".join(WORDS[(i * 31 + j * j) % len(WORDS)] for j in range(1 + i * 7 % 60))}
        for i in range(200 + 60 * kills)
    ]
    (root / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"teacher.model={model}", f"dataset.path={root / 'texts.jsonl'}", "dataset.max_length=256"]
    arguments += ["capture.k=16", "store.block_rows=1024", "store.path=x.zarr", "batch.max_tokens=1024"]
    stores = []
    for name in ("undisturbed", "storm"):
        (root / name).mkdir()
        stores.append(root / name / "x.zarr")
    ran = generate(root / "undisturbed", *arguments, workers=2, timeout=3600)
    assert ran.returncode == 0, ran.stderr
    done = storm(root / "storm", arguments, kills, seed)
    ran = generate(root / "storm", *arguments, workers=3, timeout=3600)
    assert ran.returncode == 0, ran.stderr
    assert tree(stores[0]) == tree(stores[1])
    return done


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(dict(compare(Path(scratch), int(sys.argv[1]), seed=int(time.time()))))
        print("the store's bytes equal those of an undisturbed run")
