"""One store from any number of workers: the same bytes, no block written twice, nothing lost after kills."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos import chaos
from tests.processes import committed
from tests.support import blocks_logged, command, environment, generate, tree, wait_for


@pytest.mark.parametrize(
    ("count", "blocks_are"),
    [(24, "not divisible by 2, 3 or 4"), (4, "fewer than workers"), (1, "one")],
)
def test_bytes_do_not_depend_on_the_workers(
    count: int, blocks_are: str, model_folder: Callable[[str], Path], texts: Callable[[int], Path], tmp_path: Path
) -> None:
    arguments = [f"teacher.model={model_folder('llama')}", f"dataset.path={texts(count)}", "dataset.max_length=128"]
    arguments += ["capture.k=8", "store.path=x.zarr", "store.block_rows=128"]
    arguments += ["capture.method=topk"] if count == 24 else []  # the storms below have samples too
    expected = None
    for workers in (None, 2, 3, 4) if count == 24 else (1, 3):
        folder = tmp_path / str(workers)
        folder.mkdir()
        ran = generate(folder, *arguments, workers=workers)
        assert ran.returncode == 0, ran.stderr
        found = tree(folder / "x.zarr")
        expected = expected or found
        assert found == expected
        blocks = len([name for name in found if name.startswith("commits/c/")])
        assert blocks_logged(folder) == list(range(blocks))
    if count == 24:
        assert all(blocks % workers for workers in (2, 3, 4)), f"{blocks} blocks: choose another size"


def test_the_same_command_again_changes_nothing(
    model_folder: Callable[[str], Path], texts: Callable[[int], Path], tmp_path: Path
) -> None:
    arguments = [
        f"teacher.model={model_folder('llama')}",
        f"dataset.path={texts(4)}",
        "capture.k=8",
        "store.path=x.zarr",
    ]
    assert generate(tmp_path, *arguments).returncode == 0
    before = tree(tmp_path / "x.zarr")
    again = generate(tmp_path, *arguments, workers=2)
    assert again.returncode == 0, again.stderr
    assert "complete already" in again.stderr
    assert tree(tmp_path / "x.zarr") == before


@pytest.mark.timeout(600)
def test_faults_lose_nothing(tmp_path: Path) -> None:
    done, stores = chaos(tmp_path, faults=6, seed=7)
    assert sum(done.values()) == 6, done
    assert sum(count for (_, _, moment), count in done.items() if moment == "between commits") >= 3, done
    assert stores >= 2


@pytest.mark.timeout(600)
def test_no_arguments_with_and_without_torchrun(tmp_path: Path) -> None:
    """The embedded demo: begun by plain python, interrupted, finished by eight workers under torchrun."""
    with (tmp_path / "console").open("wb") as console:
        alone = subprocess.Popen(command(None, []), cwd=tmp_path, env=environment(), stdout=console, stderr=console)
        wait_for(lambda: committed(tmp_path / "outputs" / "demo.zarr") >= 3, (tmp_path / "console").read_text, 240)
        os.kill(alone.pid, signal.SIGTERM)
        assert alone.wait(timeout=30) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in (tmp_path / "console").read_text()
    ran = generate(tmp_path, workers=8)
    assert ran.returncode == 0, ran.stderr
    attributes = json.loads((tmp_path / "outputs" / "demo.zarr" / "zarr.json").read_text())["attributes"]
    assert attributes["complete"] is True
    found = blocks_logged(tmp_path)
    assert found == sorted({*found}), "a block was written twice"
    for word in (
        "samples",
        "tokens",
        "bytes/token",
        "tokens/s",
        "mass of the top",
        "perplexity",
        "store",
        "logs",
        "next",
    ):
        assert word in ran.stderr
