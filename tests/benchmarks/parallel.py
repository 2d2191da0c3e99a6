"""Speed of one teacher spread in different ways over the same devices, in one run.

    python -m tests.benchmarks.parallel [workers=2] [rounds=3] [ways=data,pipeline,tensor] [key=value ...]

Each round runs distill.generate once for every way, in turn, with a store of its own; the ratio is of the tokens per
second that the run itself reports (from the first batch to the last commit, loading left out). Settings are those of
distill.generate; without teacher.model, the teacher is a random Llama of 8 layers and 8 heads, 1,024 wide. On GPUs:

    python -m tests.benchmarks.parallel workers=8 ways=data,pipeline,tensor,device_map teacher.model=FOLDER
        dataset.path=texts.jsonl parallel.shard_size=2 store.block_rows=65536
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.support import environment, save_model

WORKERS_OF = {"device_map": 1}


def run(folder: Path, workers: int, settings: list[str]) -> tuple[float, float]:
    """Tokens per second as the run says, and its wall-clock seconds from start to end."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(workers)]
    began = time.perf_counter()
    ran = subprocess.run(
        [*launcher, "-m", "distill.generate", *settings, f"store.path={folder}/x.zarr", f"log_dir={folder}/logs"],
        env={**environment(), "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")},
        capture_output=True,
        text=True,
        check=False,
    )
    wall = time.perf_counter() - began
    assert ran.returncode == 0, ran.stderr
    found = re.search(r"speed +([\d,]+) tokens/s", ran.stderr)
    assert found is not None, ran.stderr
    return float(found[1].replace(",", "")), wall


def main(arguments: list[str]) -> None:
    """Run every way in every round and print the medians of the ratios to the first way."""
    own = dict(
        argument.split("=", 1) for argument in arguments if argument.split("=")[0] in ("workers", "rounds", "ways")
    )
    settings = [argument for argument in arguments if argument.split("=")[0] not in own]
    ways, workers = own.get("ways", "data,pipeline,tensor").split(","), int(own.get("workers", "2"))
    scratch = tempfile.TemporaryDirectory()
    if not any(setting.startswith("teacher.model=") for setting in settings):
        sizes: dict[str, Any] = {
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 8,
            "vocab_size": 16000,
        }
        model = save_model("llama", Path(scratch.name), num_attention_heads=8, num_key_value_heads=8, **sizes)
        settings.append(f"teacher.model={model}")
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(int(own.get("rounds", "3"))):
        for way in ways:
            with tempfile.TemporaryDirectory() as folder:
                these = [setting for setting in settings if way != "data" or "shard_size" not in setting]
                speed, wall = run(Path(folder), WORKERS_OF.get(way, workers), [*these, f"parallel.mode={way}"])
            speeds[way].append(speed)
            print(f"round {number + 1}: {way} {speed:,.0f} tokens/s, {wall:.0f} s from start to end", flush=True)
    for way in ways:
        ratios = [ours / first for ours, first in zip(speeds[way], speeds[ways[0]], strict=True)]
        print(f"{way}: {statistics.median(ratios):.2f}x {ways[0]} (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main(sys.argv[1:])
