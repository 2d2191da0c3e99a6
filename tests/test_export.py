"""The real commands: export and ingest under torchrun, killed in the middle and run again; a line for each mistake."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.exchange.support import TEXTS, captured, export_here, ingest_here
from tests.processes import children
from tests.support import environment, save_model, tree, wait_for


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("models") / "teacher", vocab_size=300)


@pytest.fixture(scope="module")
def store(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 160 samples in many blocks."""
    rows = [{"text": f"{i} " + text["text"]} for i in range(160) for text in TEXTS[i % 9 : i % 9 + 1]]
    return captured(tmp_path_factory.mktemp("store"), teacher, rows, "capture.method=topk", "capture.k=64")


def command(name: str, workers: int | None, arguments: Sequence[str]) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(workers)] if workers is not None else []
    return [sys.executable, *launcher, "-m", f"distill.{name}", *arguments]


def run(name: str, folder: Path, *arguments: str, workers: int | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(name, workers, arguments), cwd=folder, env=environment(), capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip


def test_a_kill_in_the_middle_loses_and_repeats_nothing(store: Path, teacher: Path, tmp_path: Path) -> None:
    """Two workers export, and are killed; one finishes. Then two ingest what was exported."""
    expected = tree(export_here(store, tmp_path / "expected", "part_tokens=200"))
    out, console = tmp_path / "out", tmp_path / "console"
    arguments = [str(store), "out", "part_tokens=200"]
    with console.open("wb") as stream:
        launcher = subprocess.Popen(
            command("export", 2, arguments), cwd=tmp_path, env=environment(), stdout=stream, stderr=stream,
            start_new_session=True,
        )  # fmt: skip
        wait_for(lambda: list(out.glob("part_*.parquet")), console.read_text)
        for pid in [launcher.pid, *children(launcher.pid)]:
            os.kill(pid, signal.SIGKILL)
        launcher.wait(timeout=30)
    there = {name: file for name, file in tree(out).items() if name.endswith(".parquet")}
    assert 0 < len(there) < len(expected) - 2, "the kill came too late"
    assert there.items() <= expected.items()
    ran = run("export", tmp_path, *arguments)
    assert ran.returncode == 0, ran.stderr
    assert tree(out) == expected
    logs = "".join(log.read_text() for log in (tmp_path / "logs").glob("worker_*.log"))
    finished = sorted(int(part) for part in re.findall(r"part (\d+) is finished", logs))
    assert finished == sorted({*finished}), "a part was written twice"
    for word in ("samples  160", "bytes/token", "about token t+1", "tokens/s", "load_dataset", "export: 100%"):
        assert word in ran.stderr
    again = run("export", tmp_path, *arguments)
    assert again.returncode == 0, again.stderr
    assert "out is complete already: nothing to do" in again.stderr
    alone = tree(ingest_here(out, tmp_path / "alone.zarr", teacher, "store.block_rows=128"))
    settings = ["out", "both.zarr", f"teacher.model={teacher}", "store.block_rows=128"]
    both = run("ingest", tmp_path, *settings, workers=2)
    assert both.returncode == 0, both.stderr
    assert tree(tmp_path / "both.zarr") == alone
    for word in (
        "unknown  logsumexp, next_logprob",
        "ids      64 a row at most",
        "python -m distill.inspect both.zarr",
    ):
        assert word in both.stderr


def test_mistakes_are_a_line(store: Path, teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "abc"}\n')
    for name, arguments, words in (
        (
            "export",
            [str(store), "a", "b"],
            "error: expected at most 2 arguments without a key (store.path, output), found",
        ),
        ("export", [str(store), "rows.jsonl"], "error: output: cannot write rows.jsonl: File exists"),
        ("ingest", ["rows.jsonl", "x.zarr", f"teacher.model={teacher}"], "error: dataset: expected columns input_ids"),
    ):
        ran = run(name, tmp_path, *arguments)
        assert ran.returncode == 2, ran.stderr
        line = ran.stderr.strip().splitlines()[-1]
        assert line.startswith(words), line
        assert "Traceback" not in ran.stderr
    assert not (tmp_path / "x.zarr").exists()
    assert not (tmp_path / "a").exists()
