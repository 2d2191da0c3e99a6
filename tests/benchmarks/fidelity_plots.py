"""The figures of fidelity.json as SVG files, for light and dark pages.

Students are shown beside that of the whole distribution of their seed. Every method is named where it is; top-k has the
colour of its tail. Bars go from the least to the largest seed.
"""

import itertools
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from tests.benchmarks.fidelity_rows import METHODS, Method
from tests.benchmarks.fidelity_tables import excess

GREY = "#888888"
PLACE = ("axes fraction", "data")
TICKS = [10, 20, 30, 50, 100, 200]
COLOURS = {
    "bucket": "#d9822b",
    "renormalize": "#c8553d",
    "ground_truth": "#9a7b4f",
    "draws": "#3f8fd2",
    "varopt": "#2e9e6b",
}
GRADIENTS = {
    "error": "squared error of a token's gradient, relative",
    "degrees_2048": "mean gradient of 2,048 tokens off by, degrees",
    "degrees": "mean gradient of all tokens off by, degrees",
}
STUDENTS = {
    "kl": "held-out KL to the teacher, nats more",
    "cross_entropy": "held-out cross-entropy, nats more",
    "overconfidence": "confidence less accuracy, more",
}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "distill",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
}


def draw(results: Mapping[str, Any], file: Path) -> None:
    """Write NAME_gradients.svg and NAME_students.svg beside NAME.json, each where its part is there."""
    kept = results["bytes"]["figures"]
    if "gradients" in results:
        found = results["gradients"]["figures"]
        panels(found, kept, GRADIENTS, file.with_name(f"{file.stem}_gradients.svg"), log=True)
    if "students" in results:
        students = results["students"]["figures"]
        found = {}
        for name in students:
            more = {key: excess(students, name, key) for key in STUDENTS}
            found[name] = [{key: more[key][i] for key in more} for i in range(len(more["kl"]))]
        panels(found, kept, STUDENTS, file.with_name(f"{file.stem}_students.svg"), log=False)


def panels(
    found: Mapping[str, list[dict[str, float]]], kept: Mapping[str, Any], what: Mapping[str, str], file: Path, log: bool
) -> None:
    """One panel for each of `what`: bytes a token across, the figure up."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * len(what), 4.2), layout="constrained")
        for place, (key, title) in enumerate(what.items()):
            axes = figure.add_subplot(1, len(what), place + 1)
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("bytes a token, compact")
            axes.set_xscale("log")
            if log:
                axes.set_yscale("log")
            axes.patch.set_alpha(0)
            axes.set_xlim(8, 700)
            axes.set_xticks(TICKS, [str(tick) for tick in TICKS])
            axes.xaxis.minorticks_off()
            axes.margins(y=0.15)
            if log:
                axes.yaxis.set_major_formatter("{x:g}")
            labels = [
                add(axes, method, [seed[key] for seed in found[method.name]], kept)
                for method in METHODS
                if method.name in found
            ]
            figure.draw_without_rendering()  # now it is known where the labels are
            spread([label for label in labels if label is not None])
        figure.savefig(file, transparent=True, metadata={"Date": None})


def spread(labels: list[Any]) -> None:
    """Move labels that lie on each other apart, up and down."""
    for _ in range(50):
        ordered = sorted(labels, key=lambda one: one.get_window_extent().y0)
        for low, high in itertools.combinations(ordered, 2):
            a, b = low.get_window_extent(), high.get_window_extent()
            if a.x0 < b.x1 and b.x0 < a.x1 and (over := a.y1 - b.y0) > 0:
                for one, by in ((low, -over / 2), (high, over / 2)):
                    x, y = one.xyann
                    one.xyann = x, y + by * 72 / one.figure.dpi


def add(axes: Any, method: Method, values: list[float], kept: Mapping[str, Any]) -> Any:
    """One method in a panel: a point with its bar, and its label; or what has no bytes, and None."""
    middle = statistics.median(values)
    if method.kind == "full":
        axes.axhline(middle, color=GREY, linestyle="--", linewidth=1)
        axes.annotate("whole distribution", (0.99, middle), xycoords=PLACE, va="top", ha="right", fontsize=8)
        return None
    if method.kind == "text":  # far from all others: in words
        axes.set_title(f"text alone: {middle:.3g}", fontsize=8, loc="right", y=0.94)
        return None
    colour = COLOURS[method.tail if method.kind == "topk" else method.kind]
    at = kept[method.kept]["bytes"]
    bars = [[middle - min(values)], [max(values) - middle]]
    axes.errorbar([at], [middle], yerr=bars, color=colour, marker="o", markersize=4, capsize=2, linewidth=1)
    left = method.kind == "draws" or method.kept == "top-16"
    return axes.annotate(
        method.name, (at, middle), xytext=(-6 if left else 6, 0), textcoords="offset points", color=colour,
        ha="right" if left else "left", va="center", fontsize=8,
    )  # fmt: skip
