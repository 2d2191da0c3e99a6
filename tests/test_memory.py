"""A worker's peak resident memory does not grow with the number of samples."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.support import command, environment, open_raw


def peak_mib(folder: Path, arguments: list[str]) -> float:
    """Run distill.generate in `folder`; its peak resident memory in MiB."""
    folder.mkdir()
    with (folder / "console").open("wb") as console:
        process = subprocess.Popen(
            command(None, arguments), cwd=folder, env=environment(), stdout=console, stderr=console
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, (folder / "console").read_text()
    return usage.ru_maxrss / 1024


def test_peak_memory_is_flat(model_folder: Callable[[str], Path], texts: Callable[[int], Path], tmp_path: Path) -> None:
    arguments = [
        f"teacher.model={model_folder('llama')}",
        "dataset.max_length=256",
        "capture.k=200",
        "store.path=x.zarr",
    ]
    arguments += ["store.block_rows=8192", "batch.max_tokens=1024"]
    few = peak_mib(tmp_path / "few", [*arguments, f"dataset.path={texts(150)}"])
    many = peak_mib(tmp_path / "many", [*arguments, f"dataset.path={texts(900)}"])
    rows = [len(open_raw(tmp_path / name / "x.zarr", "tokens")) for name in ("few", "many")]
    kept_mib = (rows[1] - rows[0]) * 200 * 6 / 2**20  # what the additional rows' ids and log-probabilities weigh
    assert kept_mib > 200
    assert many - few < 0.2 * kept_mib, f"{few:.0f} MiB for {rows[0]} rows, {many:.0f} MiB for {rows[1]}"
