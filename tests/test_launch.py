"""The README's first command, and the presets."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distill.config.generate import GenerateConfig
from distill.config.train import TrainConfig
from distill.settings import load
from tests.support import environment, tree

ROOT = Path(__file__).parent.parent


@pytest.mark.timeout(600)
def test_the_demo_runs_and_runs_again(tmp_path: Path) -> None:
    """In this environment, which has what it installs, with less data; twice."""
    arguments = ["dataset.max_samples=12", "dataset.max_length=48", "dataset.long=truncate", f"log_dir={tmp_path}/logs"]
    arguments += [f"store.path={tmp_path}/x.zarr"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    stores = []
    for told in ("tokens/s", "complete already"):
        ran = subprocess.run(
            ["bash", str(ROOT / "launch" / "demo.sh"), *arguments],
            cwd=tmp_path,
            env={**environment(), "OUTPUTS": str(tmp_path), "VIRTUAL_ENV": sys.prefix, "PATH": path},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert told in ran.stderr
        assert f"python -m distill.inspect {tmp_path}/x.zarr" in ran.stderr
        assert re.search(r"held out, [\d,]+ tokens +before +text_only +distilled\ncross-entropy +\d", ran.stdout)
        assert ran.stderr.count("complete already") == (0 if told == "tokens/s" else 3)
        stores.append(tree(tmp_path / "x.zarr"))
    assert stores[0] == stores[1]


@pytest.mark.parametrize("preset", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_presets_load(preset: Path) -> None:
    if preset.name.startswith("train"):
        assert load(TrainConfig, [str(preset)]).output.startswith("outputs/")
        return
    config = load(GenerateConfig, [str(preset)])
    assert config.store.path.startswith("outputs/")
    if preset.name == "demo.yaml":
        assert config == load(GenerateConfig, [])
