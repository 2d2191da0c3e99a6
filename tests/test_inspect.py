import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import environment, generate, open_raw, save_model


def inspect(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distill.inspect", *arguments],
        cwd=folder,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_inspect_describes_a_store(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path / "model", chat=True)
    chats = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you " * i}] for i in range(1, 9)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    arguments = [f"teacher.model={model}", "dataset.path=x.jsonl", "dataset.messages_column=messages", "capture.k=8"]
    arguments += ["capture.method=topk"]
    ran = generate(tmp_path, *arguments, "store.path=x.zarr", "store.block_rows=64")
    assert ran.returncode == 0, ran.stderr
    shown = inspect(tmp_path, "x.zarr")
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr == ""
    for words in ("distill-cache, version 1, complete", "LlamaForCausalLM, float32", "vocabulary 1,000, tokenizer 262"):
        assert words in shown.stdout
    assert "8 samples" in shown.stdout
    assert re.search(r"«.*you( you)* ?<\|end\|>»", shown.stdout), shown.stdout
    assert "loss_mask" in shown.stdout
    assert "bytes/token" in shown.stdout
    following = open_raw(tmp_path / "x.zarr", "next_logprob").astype(float)[open_raw(tmp_path / "x.zarr", "loss_mask")]
    assert f"teacher perplexity  {np.exp(-following.mean()):.2f}" in shown.stdout
    examples = [line for line in shown.stdout.splitlines() if " -> " in line and line[0] == " "]
    assert any(line.strip().startswith("'<|user|>'") for line in examples)
    assert all(line.count(" 0.") == 5 for line in examples), examples

    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    ascii_only = inspect(tmp_path, "x.zarr", **plain)
    assert ascii_only.returncode == 0, ascii_only.stderr
    assert "\\ufffd" in ascii_only.stdout
    assert ascii_only.stdout == shown.stdout.encode("ascii", "backslashreplace").decode()

    (tmp_path / "x.zarr" / "commits" / "c" / "1").unlink()  # one block never committed; no tokenizer at hand
    attributes = json.loads((tmp_path / "x.zarr" / "zarr.json").read_text())
    attributes["attributes"]["complete"] = False
    (tmp_path / "x.zarr" / "zarr.json").write_text(json.dumps(attributes))
    shutil.rmtree(model)
    shown = inspect(tmp_path, "x.zarr")
    assert shown.returncode == 0, shown.stderr
    assert "unfinished: " in shown.stdout
    assert "  #3 " in shown.stdout


def test_inspect_puts_training_runs_side_by_side(tmp_path: Path) -> None:
    figures = {"tokens": 9, "cross_entropy": 3.0, "kl": 1.0, "top1_agreement": 0.5, "calibration_error": 0.1}
    more: dict[str, Any] = {"log_ratio": 0.5, "reverse_kl": None, "entropy": 2.0}  # of rollouts; one is infinite
    for name, kl in (("one", 0.25), ("lr=2", 0.125)):
        (tmp_path / name).mkdir()
        lines = [
            {"step": 0, "held_out": figures},
            {"step": 1, "loss": 2.0},
            {"step": 1, "held_out": figures | {"kl": kl} | (more if name == "lr=2" else {})},
        ]
        (tmp_path / name / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    shown = inspect(tmp_path, "one", "lr=2")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[0].split() == ["held", "out,", "9", "tokens", "before", "one", "lr=2"]
    assert shown.stdout.splitlines()[2] == "KL to teacher                   1.0000    0.2500    0.1250"
    assert shown.stdout.splitlines()[5:] == [
        "log-ratio to teacher                 -         -    0.5000",
        "reverse KL, estimated                -         -   inf/nan",
        "entropy of the student               -         -    2.0000",
    ]
    assert "entropy of" not in inspect(tmp_path, "one").stdout
    (tmp_path / "one" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    shown = inspect(tmp_path, "one")
    assert (shown.returncode, shown.stderr) == (
        2,
        "error: expected held-out figures in one/metrics.jsonl, found none\n",
    )


def test_inspect_refuses(tmp_path: Path, texts: Callable[[int], Path]) -> None:
    for arguments, message in (
        (("nowhere.zarr",), "error: store.path: found no store at nowhere.zarr"),
        ((str(texts(4)),), "found a file"),
        ((), "expected one store, or folders of training runs, found 0 paths"),
    ):
        shown = inspect(tmp_path, *arguments)
        assert shown.returncode == 2
        assert message in shown.stderr
        assert "Traceback" not in shown.stderr
