"""From one KD student: more KD on text, or losses on what the student wrote itself? docs/on-policy.md.

    python -m tests.benchmarks.on_policy [part=students] [out=docs] [name=on_policy] [KEY=VALUE ...]
                                         # keys: on_policy_rows.py, and fidelity_rows.py

part=sweep      each arm at each learning rate, for one seed that is not reported
part=students   each arm from the same start, with as many tokens, at the rate of its least reverse KL in the sweep
part=tables     tables in Markdown from OUT/NAME.json
part=all        all of these, one after the other

Each part adds to OUT/NAME.json, the students one by one. Rows are what a store holds: they come from the functions that
generate uses, are rounded as it rounds them, and go through DistillationLoss. Without a sweep in the file all arms have
lr. texts=FILE.jsonl has lines with a "text".
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.fidelity import DOCS, described
from tests.benchmarks.fidelity_tables import spread
from tests.benchmarks.on_policy_rows import ARMS, Settings
from tests.benchmarks.on_policy_students import RATES, chosen, measure, sweep

PARTS = ("sweep", "students", "tables")
FIGURES = {
    "reverse_kl": 3,
    "teacher_perplexity": 1,
    "entropy": 2,
    "length": 1,
    "repetition": 3,
    "forward_kl": 3,
}


def parsed(arguments: list[str]) -> tuple[str, Path, Settings]:
    """The part, the file of the results, and the settings, from key=value words."""
    given = dict(argument.split("=", 1) for argument in arguments)
    part, file = given.pop("part", "students"), Path(given.pop("out", DOCS)) / f"{given.pop('name', 'on_policy')}.json"
    kinds = {name: type(value) for name, value in dataclasses.asdict(Settings()).items()}
    arms, asked = [arm.name for arm in ARMS], given.get("arms", Settings.arms).split(",")
    if part not in (*PARTS, "all") or given.keys() - kinds.keys() or {*asked} - {*arms}:
        wanted = f"out, name, {', '.join(kinds)}; arms of {','.join(arms)}"
        sys.exit(f"expected part={'|'.join((*PARTS, 'all'))}, {wanted}; found {arguments}")
    return part, file, Settings(**{key: kinds[key](value) for key, value in given.items()})


def run(part: str, file: Path, settings: Settings) -> None:
    """One part: its figures go to the file beside those of the other."""
    kept = json.loads(file.read_text()) if file.exists() else {}
    if part == "tables":
        print("\n".join(tables(kept)))
        return
    began = time.monotonic()
    rates = chosen(kept["sweep"]["figures"]) if "sweep" in kept else {}
    for found in sweep(settings) if part == "sweep" else measure(settings, rates):
        kept[part] = described(settings) | {"minutes": round((time.monotonic() - began) / 60, 1)} | found
        file.write_text(json.dumps(kept, indent=1) + "\n")


def tables(results: Mapping[str, Any]) -> Iterator[str]:
    """Lines: of the students, of what they have more than the start of their seed, of the sweep."""
    found = results["students"]["figures"]
    names = ["start", *(arm.name for arm in ARMS if arm.name in found)]
    heads = f"{' | '.join(FIGURES)} |"
    yield from (f"| student | {heads}", "|---|" + "---|" * len(FIGURES))
    for name in (*names, "teacher"):
        cells = [spread([one[key] for one in found[name].values()], digits) for key, digits in FIGURES.items()]
        yield f"| {name} | {' | '.join(cells)} |"
    yield from ("", "more than the start's, same seed", "", f"| student | {heads}", "|---|" + "---|" * len(FIGURES))
    for name in names[1:]:
        both = [(one, found["start"][seed]) for seed, one in found[name].items() if seed in found["start"]]
        cells = [spread([one[k] - start[k] for one, start in both], n, signed=True) for k, n in FIGURES.items()]
        yield f"| {name} | {' | '.join(cells)} |"
    if "sweep" in results:
        lr, swept = results["sweep"]["settings"]["lr"], results["sweep"]["figures"]
        yield from ("", f"| reverse_kl | {' | '.join(f'{lr * rate:.0e}' for rate in RATES)} |")
        yield "|---|" + "---|" * len(RATES)
        for name, rates in swept.items():
            cells = [f"{rates[str(rate)]['reverse_kl']:.3f}" for rate in RATES]
            yield f"| {name} | {' | '.join(cells)} |"


def main(arguments: list[str]) -> None:
    """Run the parts that are asked for."""
    part, file, settings = parsed(arguments)
    file.parent.mkdir(parents=True, exist_ok=True)
    print(settings, flush=True)
    if settings.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, where nothing is autocast
    for each in PARTS if part == "all" else (part,):
        run(each, file, settings)


if __name__ == "__main__":
    main(sys.argv[1:])
