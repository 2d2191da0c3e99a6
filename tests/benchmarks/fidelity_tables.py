"""The figures of fidelity.json as tables in Markdown."""

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from tests.benchmarks.fidelity_rows import METHODS

Seeds = Mapping[str, Mapping[str, float]]
FIGURES = {"kl": 4, "cross_entropy": 4, "top1_agreement": 3, "overconfidence": 3, "calibration_error": 3}


def excess(students: Mapping[str, Seeds], name: str, key: str) -> list[float]:
    """What a method's student has more than that of the whole distribution, for each seed that has both."""
    return [one[key] - students["full"][seed][key] for seed, one in students[name].items() if seed in students["full"]]


def spread(values: list[float], digits: int, signed: bool = False) -> str:
    """The median, and from the least to the largest."""
    sign = "+" if signed else ""
    middle, least, most = (f"{v:{sign}.{digits}f}" for v in (statistics.median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({least} to {most})"


def tables(results: Mapping[str, Any]) -> Iterator[str]:
    """Lines: of the gradients, then of the students."""
    kept = results["bytes"]["figures"]
    if "gradients" in results:
        found = results["gradients"]["figures"]
        yield from (
            "| method | bytes/token | ids | error | degrees, 2,048 tokens | degrees, all |",
            "|---|---|---|---|---|---|",
        )
        for method in METHODS:
            if seeds := found.get(method.name):
                bytes_, ids = (f"{kept[method.kept][key]:.1f}" for key in ("bytes", "ids"))
                cells = [spread([one[key] for one in seeds], 4 if key == "error" else 2) for key in seeds[0]]
                yield f"| {method.name} | {bytes_} | {ids} | {' | '.join(cells)} |"
    if "students" in results:
        found = results["students"]["figures"]
        yield from ("", f"| method | bytes/token | {' | '.join(FIGURES)} |", "|---|---|" + "---|" * len(FIGURES))
        for name, bytes_ in [("start", "")] + [
            (m.name, f"{kept[m.kept]['bytes']:.1f}") for m in METHODS if m.name in found
        ]:
            cells = [spread([one[key] for one in found[name].values()], digits) for key, digits in FIGURES.items()]
            yield f"| {name} | {bytes_} | {' | '.join(cells)} |"
        yield from ("", "more than the whole distribution's, same seed", "", f"| method | {' | '.join(FIGURES)} |")
        yield "|---|" + "---|" * len(FIGURES)
        for name in (method.name for method in METHODS if method.name in found and method.kind != "full"):
            cells = [spread(excess(found, name, key), digits, signed=True) for key, digits in FIGURES.items()]
            yield f"| {name} | {' | '.join(cells)} |"
