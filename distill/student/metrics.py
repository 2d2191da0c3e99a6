"""What training runs measured: JSON lines, TensorBoard where it is installed, and tables.

Runs are comparable where they held out the same samples: the same store, seed and evaluation.samples.
"""

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.errors import ConfigError

SHOWN = {"cross_entropy": "cross-entropy", "kl": "KL to teacher", "top1_agreement": "top-1 agreement"}
SHOWN |= {"calibration_error": "calibration error", "log_ratio": "log-ratio to teacher"}
SHOWN |= {"reverse_kl": "reverse KL, estimated", "entropy": "entropy of the student"}
"""Held-out figures, in words."""


class Metrics:
    """One JSON object per line in ``<output>/metrics.jsonl``: {step, loss, ...} of a step, {step, held_out: {...}}.

    A held-out figure that is not finite is null: an infinite divergence, of a student that never says some token.
    """

    def __init__(self, output: Path, step: int, visible: bool) -> None:
        """Continue after `step`. Lines of later steps are dropped: these steps are done again."""
        self._file = output / "metrics.jsonl"
        self._visible = visible
        self._board: Any = None
        if not visible:
            return
        output.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _lines(self._file) if line["step"] <= step and step > 0]
        partial = self._file.with_suffix(".partial")  # on a full disk the lines of before stay
        partial.write_text("".join(map(_line, kept)))
        partial.replace(self._file)
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)

    def add(self, values: dict[str, Any]) -> None:
        """Write one line."""
        if not self._visible:
            return
        with self._file.open("a") as file:
            file.write(_line(values))
        if self._board is not None:
            flat = {k: v for k, v in values.items() if k not in ("step", "held_out")}
            flat |= {f"held_out/{name}": value for name, value in values.get("held_out", {}).items()}
            for name, value in flat.items():
                self._board.add_scalar(name, value, values["step"])
            self._board.flush()  # now: a run that continues after this step does not measure it again


def evaluations(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file with held-out figures, first to last."""
    return [line for line in _lines(file) if "held_out" in line]


def _line(values: dict[str, Any]) -> str:
    """A line of JSON, which has no numbers that are not finite: they are null."""

    def known(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: known(part) for name, part in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(known(values), allow_nan=False) + "\n"


def _lines(file: Path) -> list[dict[str, Any]]:
    found = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed run
            found.append(json.loads(line))
    return found


def table(columns: dict[str, dict[str, Any]]) -> str:
    """Held-out figures side by side: from a column's name to what `evaluate` returned.

    A figure that no column has is left out; a column without it shows a dash.
    """
    width = max(10, *(len(name) + 2 for name in columns))
    tokens = next(iter(columns.values()))["tokens"]
    lines = [f"{f'held out, {tokens:,} tokens':28}" + "".join(f"{name:>{width}}" for name in columns)]
    for figure, words in SHOWN.items():
        if any(figure in found for found in columns.values()):
            lines.append(f"{words:28}" + "".join(_shown(found, figure).rjust(width) for found in columns.values()))
    return "\n".join(lines)


def _shown(found: dict[str, Any], figure: str) -> str:
    value = found.get(figure, "-")
    if isinstance(value, str):
        return value
    return "inf/nan" if value is None or not math.isfinite(value) else f"{value:.4f}"


def summary(output: Path) -> str:
    """The lines that end a run: the held-out figures before and after, and where the student is."""
    found = evaluations(output / "metrics.jsonl")
    figures = table({"before": found[0]["held_out"], "after": found[-1]["held_out"]}) + "\n" if found else ""
    return f"\n{figures}student  {output}\nmetrics  {output / 'metrics.jsonl'}"


def is_run(folder: Path) -> bool:
    """Whether a training run has written into `folder`."""
    return (folder / "metrics.jsonl").is_file()


def side_by_side(folders: Sequence[Path]) -> str:
    """A table of the held-out figures of several runs, with those before the first run. Raises ConfigError for none."""
    columns: dict[str, dict[str, Any]] = {}
    for folder in folders:
        found = evaluations(folder / "metrics.jsonl")
        if not found:
            raise ConfigError(f"expected held-out figures in {folder / 'metrics.jsonl'}, found none")
        columns |= {} if columns else {"before": found[0]["held_out"]}
        columns[folder.name] = found[-1]["held_out"]
    return table(columns)
