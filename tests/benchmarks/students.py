"""What distillation brings: the demo's student, from the text alone and from what the teacher said, for equal steps.

    python -m tests.benchmarks.students outputs/demo.zarr [seeds=3] [key=value ...]        # keys as for distill.train

Each seed holds out other samples and reads the rest in another order. Held-out figures, then medians.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from distill.student.metrics import evaluations, table

CONFIG = Path(__file__).parent.parent.parent / "configs" / "train_demo.yaml"
WAYS = {"text only": 0.0, "distilled": 0.5}


def held_out(store: str, seed: int, alpha: float, arguments: list[str], output: Path) -> tuple[dict[str, float], ...]:
    """The figures of a student before and after its training."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "distill.train"]
    settings = [f"store.path={store}", f"seed={seed}", f"loss.alpha={alpha}"]
    settings += [f"output={output}", f"log_dir={output}_logs"]
    subprocess.run([*launcher, str(CONFIG), *settings, *arguments], check=True, stderr=subprocess.DEVNULL)
    found = evaluations(output / "metrics.jsonl")
    return found[0]["held_out"], found[-1]["held_out"]


def main(arguments: list[str]) -> None:
    """Run all, print the tables."""
    store, *rest = arguments
    seeds = int(next((argument.split("=")[1] for argument in rest if argument.startswith("seeds=")), "3"))
    rest = [argument for argument in rest if not argument.startswith("seeds=")]
    every: dict[str, list[dict[str, float]]] = {"before": [], **{way: [] for way in WAYS}}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(seeds):
            for way, alpha in WAYS.items():
                before, after = held_out(store, seed, alpha, rest, Path(scratch) / f"{seed}_{alpha}")
                every[way].append(after)
            every["before"].append(before)
            print(f"seed {seed}\n{table({way: found[-1] for way, found in every.items()})}\n", flush=True)
    medians = {
        way: {figure: statistics.median(one[figure] for one in found) for figure in found[0]}
        for way, found in every.items()
    }
    print(f"medians of {seeds} seeds\n{table(medians)}")


if __name__ == "__main__":
    main(sys.argv[1:])
