"""How a run ends badly: bad input in one line and status 2; a failed or killed worker with the end of its log."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.processes import children, freeze
from tests.support import (
    build_model,
    command,
    environment,
    generate,
    has,
    make_tokenizer,
    save_model,
    tree,
    wait_for,
)


@pytest.fixture(scope="module")
def inputs(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path], texts: Callable[[int], Path]
) -> dict[str, Path]:
    """The files that the cases below name."""
    root = tmp_path_factory.mktemp("inputs")
    (root / "empty.jsonl").write_text(json.dumps({"text": ""}) + "\n")
    (root / "numbers.jsonl").write_text(json.dumps({"text": 5}) + "\n")
    (root / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    (root / "weightless").mkdir()
    (root / "weightless" / "config.json").write_text((model_folder("llama") / "config.json").read_text())
    (root / "other").mkdir()
    (root / "other" / "thing.txt").write_text("precious")
    return {"root": root, "llama": model_folder("llama"), "texts": texts(4)}


BAD_INPUT = {
    "missing model": ("teacher.model=./nowhere", "found no folder ./nowhere"),
    "unknown id": ("teacher.model=no-such/model", "no-such/model is neither a folder here nor to be had from the hub"),
    "folder without a model": ("teacher.model={root}/other", "found no config.json"),
    "no weights": ("teacher.model={root}/weightless", "expected weights"),
    "no chat template": ("dataset.path={root}/chat.jsonl dataset.messages_column=messages", "has no chat template"),
    "missing column": (
        "dataset.text_column=text dataset.path={root}/chat.jsonl",
        "expected a column 'text' in .*, found messages",
    ),
    "not text": ("dataset.path={root}/numbers.jsonl", "expected text in 'text' of example 0, found 5 .int."),
    "empty data": (
        "dataset.path={root}/empty.jsonl",
        "expected something to train on, found nothing; .*dropped 1 empty",
    ),
    "missing data": ("dataset.path=./nowhere.jsonl", "found no file or folder ./nowhere.jsonl"),
    "unknown split": ("dataset.split=test", "dataset.split: expected train, .* found test"),
    "k": ("capture.k=1001", "capture.k: expected at most 1000, the teacher's vocabulary, found 1001"),
    "context": (
        "dataset.max_length=1025",
        "dataset.max_length: expected at most 1024, the teacher's context, found 1025",
    ),
    "long sample": ("dataset.path={long} dataset.max_length=null", "found a sample of 1100 tokens .example 1 of"),
    "small block": ("store.block_rows=10", "expected at least the longest sample"),
    "uneven block": ("store.block_rows=10000", "a multiple of it"),
    "foreign folder": ("store.path={root}/other", "found a folder with other content"),
    "foreign file": ("store.path={root}/chat.jsonl", "found a file"),
    "unwritable": ("store.path=/proc/x.zarr", "cannot write"),
    "unwritable logs": ("log_dir=/proc/x", "log_dir: cannot write"),
    "no cuda": ("teacher.device=cuda", "expected a CUDA GPU"),
    "odd device": ("teacher.device=tpu", "expected auto, cpu, cuda or cuda:N, found tpu"),
    "wrong type": ("capture.k=many", "capture.k: expected an integer, found 'many'"),
    "unknown key": ("capture.kk=3", "unknown key capture.kk; did you mean capture.k?"),
    "unknown value": ("store.codec=zip", "store.codec: expected portable, compact, found 'zip'"),
    "no such file": ("missing.yaml", "missing.yaml: no such file"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str, inputs: dict[str, Path], tmp_path: Path) -> None:
    if case == "no cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a", "a" * 1100)))
    before = tree(inputs["root"])
    words, message = BAD_INPUT[case]
    arguments = [word.format(root=inputs["root"], long=long) for word in words.split()]
    defaults = {
        "teacher.model": inputs["llama"],
        "dataset.path": inputs["texts"],
        "capture.k": 8,
        "store.path": "x.zarr",
    }
    given = {argument.split("=")[0] for argument in arguments}
    ran = generate(tmp_path, *arguments, *(f"{key}={value}" for key, value in defaults.items() if key not in given))
    assert ran.returncode == 2, ran.stderr
    lines = [
        line for line in ran.stderr.splitlines() if line.strip() and "examples/s" not in line and "it/s" not in line
    ]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, ran.stderr
    assert re.search(message, errors[0]), errors[0]
    assert len(lines) - lines.index(errors[0]) <= 2, "the error is not the end"
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "x.zarr").exists()
    assert tree(inputs["root"]) == before


def test_another_runs_store_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    arguments = [f"teacher.model={inputs['llama']}", f"dataset.path={inputs['texts']}", "store.path=x.zarr"]
    assert generate(tmp_path, *arguments, "capture.k=8").returncode == 0
    before = tree(tmp_path / "x.zarr")
    ran = generate(tmp_path, *arguments, "capture.k=9", "dataset.max_length=300")
    assert ran.returncode == 2
    assert "capture.k: the store has 8, this run 9" in ran.stderr
    assert "dataset.max_length: the store has 'auto', this run 300" in ran.stderr
    assert tree(tmp_path / "x.zarr") == before


def test_other_weights_and_data_are_another_run(inputs: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["teacher.model=model", "dataset.path=texts.jsonl", "store.path=x.zarr", "capture.k=8"]
    model = save_model("llama", tmp_path / "model")
    (tmp_path / "texts.jsonl").write_text(inputs["texts"].read_text())
    assert generate(tmp_path, *arguments).returncode == 0
    changed = build_model("llama")
    with torch.no_grad():
        changed.lm_head.weight[0, 0] += 1
    changed.save_pretrained(model)
    (tmp_path / "texts.jsonl").write_text(inputs["texts"].read_text().replace("a", "e", 1))
    ran = generate(tmp_path, *arguments)
    assert ran.returncode == 2
    assert "teacher.weights: the store has" in ran.stderr
    assert "dataset.content: the store has" in ran.stderr


def test_bad_input_under_torchrun_is_told_once(inputs: dict[str, Path], tmp_path: Path) -> None:
    """By worker 0 alone, even while another has not finished starting."""
    (tmp_path / "sitecustomize.py").write_text("import os, time\nif os.environ.get('RANK') == '2': time.sleep(2)\n")
    path = f"{tmp_path}{os.pathsep}{environment()['PYTHONPATH']}"
    for argument in ("capture.k=many", f"dataset.path={inputs['root']}/empty.jsonl"):
        arguments = [f"teacher.model={inputs['llama']}", argument, "store.path=x.zarr"]
        ran = generate(tmp_path, *arguments, workers=3, PYTHONPATH=path)
        assert ran.returncode != 0
        assert ran.stderr.count("error: ") == 1, ran.stderr
        assert "exitcode  : 2" in ran.stderr
        assert "NO_OTHER_FAILURES" in ran.stderr
        assert not (tmp_path / "x.zarr").exists()


@pytest.fixture(scope="module")
def nan_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says NaN for every text with a '!' (masked attention weights are 0, and 0 x NaN is NaN)."""
    folder = tmp_path_factory.mktemp("models") / "nan"
    model, tokenizer = build_model("llama"), make_tokenizer()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer("!")["input_ids"][0]] = torch.nan
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_nan_logits_stop_the_run(nan_model: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("abc", "abcde!fg")))
    ran = generate(tmp_path, f"teacher.model={nan_model}", "dataset.path=x.jsonl", "capture.k=8", "store.path=x.zarr")
    assert ran.returncode == 1
    assert re.search(r"NaN or infinite at position 0 of sample \d \(example 1 of the dataset\)", ran.stderr)
    attributes = json.loads((tmp_path / "x.zarr" / "zarr.json").read_text())["attributes"]
    assert attributes["complete"] is False


def check_ending(console: str, rank: int, folder: Path) -> None:
    """The console ends with the failed worker's rank, its log's path and the log's last 10 lines, once."""
    log = folder / "logs" / f"worker_{rank}.log"
    logged = [f"    {line}" for line in log.read_text().splitlines()]
    lines = console.rstrip().splitlines()
    if lines[-2] != logged[-1]:  # killed between writing its last line and refreshing the report
        logged.pop()
    tail = logged[-10:]
    assert lines[-1].startswith("====")
    assert lines[-1 - len(tail) : -1] == tail, console
    assert f"worker {rank} failed; the end of its log, {log}:" in lines[-2 - len(tail)]
    assert console.count(tail[-1].strip()) == 1
    assert f"rank      : {rank} " in console
    assert console.count("Traceback (most recent call last)") <= 1 + "\n".join(tail).count("Traceback")
    assert "NO_OTHER_FAILURES" in console


def test_a_worker_that_raises(nan_model: Path, tmp_path: Path) -> None:
    rows = [{"text": "abcde" * 20 + ("!" if i == 17 else ".")} for i in range(40)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["dataset.path=x.jsonl", "capture.k=8", "store.path=x.zarr", "store.block_rows=128"]
    ran = generate(tmp_path, f"teacher.model={nan_model}", *arguments, workers=3)
    assert ran.returncode == 1
    (rank,) = [rank for rank in range(3) if "NumericalError" in (tmp_path / "logs" / f"worker_{rank}.log").read_text()]
    check_ending(ran.stderr, rank, tmp_path)
    again = generate(tmp_path, f"teacher.model={nan_model}", *arguments, workers=1)
    assert "(example 17 of the dataset)" in again.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_is_killed(
    rank: int, texts: Callable[[int], Path], model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    arguments = [f"teacher.model={model_folder('llama')}", f"dataset.path={texts(300)}", "dataset.max_length=128"]
    arguments += ["capture.k=8", "store.path=x.zarr", "store.block_rows=128"]
    with (tmp_path / "console").open("wb") as console:
        launcher = subprocess.Popen(
            command(2, arguments), cwd=tmp_path, env=environment(), stdout=console, stderr=console
        )
        wait_for(lambda: has(tmp_path / "logs" / f"worker_{rank}.log", "is committed"))
        os.kill(sorted(children(launcher.pid))[rank], signal.SIGKILL)
        assert launcher.wait(timeout=60) == 1
    console_text = (tmp_path / "console").read_text()
    check_ending(console_text, rank, tmp_path)
    assert "SIGKILL" in console_text


def test_a_worker_that_hangs(texts: Callable[[int], Path], model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Whose process is frozen: the others are done long before, and wait for it."""
    arguments = [f"teacher.model={model_folder('llama')}", f"dataset.path={texts(300)}", "dataset.max_length=128"]
    arguments += ["capture.k=8", "store.path=x.zarr", "store.block_rows=128", "timeout_seconds=4"]
    with (tmp_path / "console").open("wb") as console:
        launcher = subprocess.Popen(
            command(2, arguments), cwd=tmp_path, env=environment(), stdout=console, stderr=console
        )
    log = tmp_path / "logs" / "worker_1.log"
    wait_for(lambda: has(log, "is committed"))
    freeze(launcher)
    assert launcher.wait(timeout=60) == 1
    text = (tmp_path / "console").read_text()
    assert "worker 1 has made no progress for 4 s (timeout_seconds)" in text
    assert f"the end of its log, {log}:" in text
    assert "rank 1 INFO distill.teacher.worker: block" in text


def test_other_workers_keep_off_the_console(
    texts: Callable[[int], Path], model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    ran = generate(
        tmp_path,
        f"teacher.model={model_folder('llama')}",
        f"dataset.path={texts(40)}",
        "capture.k=8",
        "store.path=x.zarr",
        workers=3,
    )
    assert ran.returncode == 0
    assert ran.stdout == ""
    assert "workers 1 to 2 log to logs/worker_<rank>.log" in ran.stderr
    assert ran.stderr.count("this worker does") == 1
    for rank in (1, 2):
        lines = (tmp_path / "logs" / f"worker_{rank}.log").read_text().splitlines()
        assert lines
        assert all(
            re.match(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ rank {rank} [A-Z]+ [\w.]+: ", line) for line in lines
        )


def test_numerical_errors_name_sample_and_position() -> None:
    from types import SimpleNamespace

    import numpy as np

    from distill.errors import NumericalError
    from distill.teacher.worker import Worker

    worker = Worker.__new__(Worker)
    batch = np.array([1, 0, 2]), np.array([4, 3, 2], np.int32)
    worker._store = SimpleNamespace(read_rows=lambda name, start, stop: np.array([10, 11, 12])[start:stop])  # type: ignore[assignment]
    logsumexp = torch.zeros(9, 1)
    captured = SimpleNamespace(logsumexp=logsumexp)
    worker._check_finite(captured, *batch)  # type: ignore[arg-type]
    logsumexp[4 + 2] = torch.inf  # the batch holds samples 1, 0 and 2 in this order: row 6 is the last of sample 0
    with pytest.raises(NumericalError, match=r"position 2 of sample 0 \(example 10 of"):
        worker._check_finite(captured, *batch)  # type: ignore[arg-type]
