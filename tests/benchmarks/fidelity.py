"""What each way to keep the teacher costs in bytes, and what a student learns from it: docs/fidelity.md.

    python -m tests.benchmarks.fidelity [part=all] [out=docs] [name=fidelity] [KEY=VALUE ...]   # keys: fidelity_rows.py

part=bytes       the rows of each method, written with a store, bytes a token on disk
part=gradients   the gradient with respect to a student's logits, beside that with the teacher's whole distribution
part=students    students from the same start, on the same text and steps; held-out figures
part=plots       SVG files and tables from OUT/NAME.json, which may have been made elsewhere
part=all         all of these, one after the other; with device=cuda gradients and students only

Each part adds to OUT/NAME.json, the students one by one. Rows are what a store holds: they come from the functions
that generate uses, are rounded as it rounds them, and go through DistillationLoss. texts=FILE.jsonl has lines with a
"text". A GPU machine needs neither zarr nor datasets: without bytes in a file, plots take those of docs/fidelity.json.
"""

import dataclasses
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.benchmarks.fidelity_rows import METHODS, Settings

PARTS = ("bytes", "gradients", "students", "plots")
DOCS = Path(__file__).parent.parent.parent / "docs"


def parsed(arguments: list[str]) -> tuple[str, Path, Settings]:
    """The part, the file of the results, and the settings, from key=value words."""
    given = dict(argument.split("=", 1) for argument in arguments)
    part, file = given.pop("part", "all"), Path(given.pop("out", DOCS)) / f"{given.pop('name', 'fidelity')}.json"
    kinds = {name: type(value) for name, value in dataclasses.asdict(Settings()).items()}
    if part not in (*PARTS, "all") or given.keys() - kinds.keys():
        sys.exit(f"expected part={'|'.join((*PARTS, 'all'))}, out, name, {', '.join(kinds)}; found {arguments}")
    return part, file, Settings(**{key: kinds[key](value) for key, value in given.items()})


def described(settings: Settings) -> dict[str, Any]:
    """What the figures of a part belong to."""
    where = torch.cuda.get_device_name() if settings.device == "cuda" else platform.processor() or platform.machine()
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    kept = dataclasses.asdict(settings) | {name: Path(getattr(settings, name)).name for name in ("teacher", "texts")}
    return {"settings": kept, "device": where, "versions": versions}


def run(part: str, file: Path, settings: Settings) -> None:
    """One part: its figures go to the file beside those of the others."""
    if part == "plots":
        from tests.benchmarks.fidelity_plots import draw
        from tests.benchmarks.fidelity_tables import tables

        results = json.loads(file.read_text())
        if "bytes" not in results:  # a GPU machine has no zarr
            results["bytes"] = json.loads((DOCS / "fidelity.json").read_text())["bytes"]
        draw(results, file)
        print("\n".join(tables(results)))
        return
    if part == "bytes":
        from tests.benchmarks.fidelity_bytes import measure
    elif part == "gradients":
        from tests.benchmarks.fidelity_gradients import measure
    else:
        from tests.benchmarks.fidelity_students import measure
    began = time.monotonic()
    for found in measure(settings):
        results = json.loads(file.read_text()) if file.exists() else {}
        results[part] = described(settings) | {"minutes": round((time.monotonic() - began) / 60, 1)} | found
        file.write_text(json.dumps(results, indent=1) + "\n")


def main(arguments: list[str]) -> None:
    """Run the parts that are asked for."""
    part, file, settings = parsed(arguments)
    file.parent.mkdir(parents=True, exist_ok=True)
    print(f"{len(METHODS)} methods, {settings}", flush=True)
    everything = PARTS if settings.device == "cpu" else ("gradients", "students")
    for each in everything if part == "all" else (part,):
        run(each, file, settings)


if __name__ == "__main__":
    main(sys.argv[1:])
