"""What a training run measured: JSON lines, TensorBoard where it is installed, and the table that ends the run."""

import contextlib
import json
from pathlib import Path
from typing import Any

_SHOWN = {"cross_entropy": "cross-entropy", "kl": "KL to teacher", "top1_agreement": "top-1 agreement"}
_SHOWN |= {"calibration_error": "calibration error"}


class Metrics:
    """One JSON object per line in ``<output>/metrics.jsonl``: {step, loss, ...} of a step, {step, held_out: {...}}."""

    def __init__(self, output: Path, step: int, visible: bool) -> None:
        """Go on after `step`: what was measured later, before the run was stopped, is measured again."""
        self._file = output / "metrics.jsonl"
        self._visible = visible
        self._board: Any = None
        if not visible:
            return
        output.mkdir(parents=True, exist_ok=True)
        kept = [line for line in self._lines() if line["step"] <= step and step > 0]
        self._file.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)

    def add(self, values: dict[str, Any]) -> None:
        """Write one line."""
        if not self._visible:
            return
        with self._file.open("a") as file:
            file.write(f"{json.dumps(values)}\n")
        if self._board is not None:
            flat = {k: v for k, v in values.items() if k not in ("step", "held_out")}
            flat |= {f"held_out/{name}": value for name, value in values.get("held_out", {}).items()}
            for name, value in flat.items():
                self._board.add_scalar(name, value, values["step"])

    def evaluations(self) -> list[dict[str, Any]]:
        """The lines with held-out figures, first to last."""
        return [line for line in self._lines() if "held_out" in line]

    def _lines(self) -> list[dict[str, Any]]:
        if not self._file.is_file():
            return []
        found = []
        for line in self._file.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed run
                found.append(json.loads(line))
        return found


def table(evaluations: list[dict[str, Any]], output: Path) -> str:
    """The lines that end a run: the held-out figures before and after, and where the student is."""
    lines = []
    if evaluations:
        before, after = evaluations[0], evaluations[-1]
        lines = [f"{'held out, ' + format(after['held_out']['tokens'], ',') + ' tokens':24}{'before':>10}{'after':>10}"]
        for name, words in _SHOWN.items():
            lines.append(f"{words:24}{before['held_out'][name]:>10.4f}{after['held_out'][name]:>10.4f}")
    lines += [f"{'student':10}{output}", f"{'metrics':10}{output / 'metrics.jsonl'}"]
    return "\n" + "\n".join(lines)
