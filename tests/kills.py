"""Kill runs at random moments and let others, with another number of workers, go on.

    python -m tests.kills 50        # 50 kills, then the comparison with an undisturbed run; prints what happened

Each round starts the command with 1 to 4 workers and kills -9 one worker, worker 0, all workers, or torchrun with
them, at a random moment between the start and the end of a run. When the kills are used up, one more run goes to the
end, and the store's bytes are compared with those of an undisturbed run.
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
from pathlib import Path

from tests.support import WORDS, command, environment, generate, save_model, tree

VICTIMS = ("one worker", "worker 0", "all workers", "torchrun and all workers")


def children(pid: int) -> list[int]:
    """Child processes, in the order in which they were started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


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


def storm(folder: Path, arguments: list[str], kills: int, seed: int) -> Counter[str]:
    """Start and kill until `kills` runs have been killed; then run to the end. Returns how often what was killed."""
    rng = random.Random(seed)
    done: Counter[str] = Counter()
    commits = folder / "x.zarr" / "commits" / "c"
    while sum(done.values()) < kills:
        victim, workers = rng.choice(VICTIMS), rng.randint(1, 4)
        with (folder / "storm.log").open("ab") as log:
            launcher = subprocess.Popen(
                command(workers, arguments),
                cwd=folder,
                env=environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            time.sleep(rng.uniform(2, 12 + 2 * workers))
            there = len(list(commits.iterdir())) if commits.is_dir() else 0
            if kill(launcher, victim, rng):
                done[victim] += 1
                print(f"kill {sum(done.values())}: {victim} of {workers}, {there} blocks committed", flush=True)
            launcher.wait(timeout=120)
        if json.loads((folder / "x.zarr" / "zarr.json").read_text())["attributes"]["complete"] if there else False:
            done["runs that were complete before their kill"] += 1
            break
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
    ran = generate(root / "undisturbed", *arguments, workers=2)
    assert ran.returncode == 0, ran.stderr
    done = storm(root / "storm", arguments, kills, seed)
    ran = generate(root / "storm", *arguments, workers=3)
    assert ran.returncode == 0, ran.stderr
    assert tree(stores[0]) == tree(stores[1])
    return done


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(dict(compare(Path(scratch), int(sys.argv[1]), seed=int(time.time()))))
        print("the store's bytes equal those of an undisturbed run")
