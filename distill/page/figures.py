"""The plots of a report, as SVG without colours of their own: they take those of the page, light or dark.

matplotlib draws in placeholder colours; each is replaced by a variable of the style sheet.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from distill.errors import ConfigError
from distill.page.look import Look

_COLOURS = {"#010101": "var(--ink)", "#020202": "var(--muted)", "#030303": "var(--rule)"}
_COLOURS |= {f"#0{i}0{i}0{i}": f"var(--line{i - 4})" for i in range(4, 10)}
INK, MUTED, RULE, *LINES = _COLOURS
_SIZE = (4.6, 2.7)


def check_installed() -> None:
    """Raise ConfigError where matplotlib is missing."""
    try:
        import matplotlib as _  # noqa: F401
    except ImportError as error:
        raise ConfigError("a report needs matplotlib: pip install 'distill[report]'") from error


def of_store(look: Look, method: str) -> dict[str, str]:
    """The plots of a store, by their captions."""
    found, least = {}, "at least " if method == "sample" else ""
    if len(look.entropy):
        found[f"What is kept: the mean probability of the k most probable ids ({least}{look.mass[-1]:.2f})"] = _plot(
            "kept mass against k", "k", "probability", lambda axes: _mass(axes, look)
        )
        mean = look.entropy.mean()
        found[f"How sure the teacher is: entropy of its distributions, at least (mean {mean:.2f} nats)"] = _plot(
            "histogram of entropy", "nats", "tokens", lambda axes: _histogram(axes, look.entropy, 40)
        )
    found[f"How long the samples are: {len(look.lengths):,}, {look.lengths.mean():.0f} tokens on average"] = _plot(
        "histogram of lengths", "tokens", "samples", lambda axes: _histogram(axes, look.lengths, 30)
    )
    if len(look.positions):
        found["What the teacher makes of the text: its loss by position in the sample, with standard errors"] = _plot(
            "the teacher's loss by position", "position", "nats", lambda axes: _positions(axes, look)
        )
    return found


def of_students(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """The held-out curves of students, by their captions: from a student's name to the lines of its metrics."""
    figures = {"cross_entropy": "cross-entropy with the text", "kl": "KL to the teacher"}
    return {
        f"Held out: {words}": _plot(f"held-out {words}", "step", "nats", partial(_curves, curves=curves, figure=figure))
        for figure, words in figures.items()
    }


def _mass(axes: Any, look: Look) -> None:
    k = np.arange(1, len(look.mass) + 1)
    axes.plot(k, look.mass, color=LINES[0], linewidth=1.8)
    axes.set_xscale("log", base=2)
    ticks = sorted({*(1 << i for i in range(len(look.mass).bit_length())), len(look.mass)})
    ticks = [tick for tick in ticks if tick == len(look.mass) or tick * 1.3 < len(look.mass)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)


def _histogram(axes: Any, values: Any, bins: int) -> None:
    axes.hist(values, bins=bins, color=LINES[0], linewidth=0)


def _positions(axes: Any, look: Look) -> None:
    at, _, mean, error = look.positions.T
    axes.fill_between(at, mean - error, mean + error, color=LINES[0], alpha=0.25, linewidth=0)
    axes.plot(at, mean, color=LINES[0], linewidth=1.8)
    axes.set_ylim(bottom=0)


def _curves(axes: Any, curves: Mapping[str, Sequence[Mapping[str, Any]]], figure: str) -> None:
    handles: list[Any] = []
    for i, lines in enumerate(curves.values()):
        points = [(line["step"], line["held_out"].get(figure)) for line in lines]
        known = [(step, value) for step, value in points if value is not None]
        colour, mark = LINES[i % len(LINES)], "osD^vP"[i % 6]
        steps, values = [step for step, _ in known], [value for _, value in known]
        handles += axes.plot(steps, values, f"{mark}-", color=colour, ms=4)
    legend = axes.legend(handles, [" ".join(name.split()) for name in curves], frameon=False)
    for text in legend.get_texts():
        text.set_color(INK)
        text.set_parse_math(False)  # a folder may be named a$b


def _plot(title: str, across: str, up: str, draw: Callable[[Any], object]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), MUTED),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), RULE),
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "ytick.major.size": 0,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Title": title})
    return _as_part(file.getvalue(), title)


def _as_part(svg: str, title: str) -> str:
    """An SVG file as a part of a page: in the page's font and colours, as wide as its place, with a name."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    for placeholder, colour in _COLOURS.items():
        svg = svg.replace(placeholder, colour)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg.replace("xlink:href", "href"))
    size = re.search(r'viewBox="[^"]*"', svg)
    return re.sub(r"<svg[^>]*>", f'<svg role="img" aria-label="{title}" {size.group() if size else ""}>', svg, count=1)
