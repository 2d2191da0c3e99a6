"""Disks that fill up or turn read-only: one message, exit status 1, nothing lost, and the same command goes on."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.errors import StorageError
from distill.store.writable import WritableStore
from tests.processes import committed
from tests.store.test_store import create, fill
from tests.support import command, environment, generate, remount, small_disk, tree, wait_for


def test_a_full_disk_and_one_that_turns_read_only(
    model_folder: Callable[[str], Path], texts: Callable[[int], Path], tmp_path: Path
) -> None:
    """The workers' logs, and torchrun's reports, are on the same disk."""
    arguments = [f"teacher.model={model_folder('llama')}", f"dataset.path={texts(150)}", "dataset.max_length=128"]
    arguments += ["capture.k=8", "store.block_rows=128", "store.path=disk/x.zarr"]
    whole = generate(tmp_path, *arguments[:-1], "store.path=whole.zarr")
    assert whole.returncode == 0, whole.stderr
    sizes = [file.stat().st_size for file in (tmp_path / "whole.zarr").rglob("*") if file.is_file()]
    size = sum(-(-size // 4096) * 4 for size in sizes)  # KiB, in pages
    with small_disk(tmp_path / "disk", f"{size * 2 // 3}k") as disk:
        (disk / "tmp").mkdir()
        ran = generate(tmp_path, *arguments, "log_dir=disk/logs", workers=2, TMPDIR=str(disk / "tmp"))
        assert ran.returncode == 1
        (said,) = [line.strip() for line in ran.stderr.splitlines() if "error: " in line]
        assert "No space left on device" in said
        assert said.endswith("what is committed stays, and the same command continues from there")
        assert ran.stderr.count("Traceback") <= 1, ran.stderr  # torchrun's own
        assert "Logging error" not in ran.stderr
        there = committed(disk / "x.zarr")
        assert 0 < there < committed(tmp_path / "whole.zarr")

        remount(disk, "size=64m")
        with (tmp_path / "console").open("wb") as console:
            run = subprocess.Popen(
                command(None, arguments), cwd=tmp_path, env=environment(), stdout=console, stderr=console
            )
            wait_for(lambda: committed(disk / "x.zarr") > there, (tmp_path / "console").read_text)
            remount(disk, "ro")
            assert run.wait(timeout=60) == 1
        lines = (tmp_path / "console").read_text().splitlines()
        assert "Read-only file system" in lines[-1]
        assert lines[-1].startswith("error: store: cannot write ")
        assert "Traceback" not in "".join(lines)

        remount(disk, "rw")
        ran = generate(tmp_path, *arguments)
        assert ran.returncode == 0, ran.stderr
        assert tree(disk / "x.zarr") == tree(tmp_path / "whole.zarr")


def test_a_flush_that_fails_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed fsync the system may have dropped the pages: asking again would succeed, and mean nothing."""
    store, asked = create(tmp_path / "x.zarr"), []

    def fsync(descriptor: int) -> None:
        asked.append(descriptor)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fsync)
        with pytest.raises(StorageError, match=r"cannot flush .*x.zarr/target_ids/c/0/0 to disk: Input/output"):
            fill(store, 0)
    assert len(asked) == 1
    again = WritableStore.open(str(tmp_path / "x.zarr"), {})
    assert again is not None
    assert again.missing_blocks() == [0, 1, 2]


def test_a_checkpoint_that_does_not_fit(small_store: Path, model_folder: Any, tmp_path: Path) -> None:
    """The one before stays whole, and the run goes on from it: to the student of a run on a disk with room."""
    arguments = [f"store.path={small_store}", f"student.model={model_folder('llama')}", "student.layers=2"]
    arguments += ["optimizer.steps=6", "batch.samples=2", "batch.readers=0", "evaluation.samples=0"]
    arguments += ["checkpoint_every=2", "device=cpu"]

    def train(output: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "distill.train", *arguments, f"output={output}"]
        return subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)

    whole = train("whole")
    assert whole.returncode == 0, whole.stderr
    size = (tmp_path / "whole/checkpoints/step_6/state.pt").stat().st_size // 1024
    with small_disk(tmp_path / "disk", f"{size * 5 // 2}k") as disk:
        ran = train("disk/out")
        assert ran.returncode == 1
        last = ran.stderr.splitlines()[-1]
        assert last.startswith("error: output: cannot write the checkpoint disk/out/checkpoints/step_6: No space left")
        assert last.endswith("the same command continues from the newest checkpoint")
        assert "Traceback" not in ran.stderr
        kept = disk / "out" / "checkpoints"
        assert sorted(entry.name for entry in kept.iterdir()) == ["step_2", "step_4"]
        assert torch.load(kept / "step_4" / "state.pt", weights_only=True)["step"] == 4

        remount(disk, "size=64m")
        ran = train("disk/out")
        assert ran.returncode == 0, ran.stderr
        assert "from step 4 of 6" in ran.stderr
        name = "model.safetensors"
        assert (disk / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        steps = [json.loads(line)["step"] for line in (disk / "out" / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 7))
