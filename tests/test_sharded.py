"""Copies of the teacher on several workers say what one worker says: tensor and pipeline, alone and side by side."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kills import children
from tests.support import command, environment, generate, save_model, tree

LAYERS = {"num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LAYERS),
    "llama tied": ("llama", {**LAYERS, "tie_word_embeddings": True}),
    "llama odd": ("llama", {**LAYERS, "vocab_size": 1001}),
    "qwen3": ("qwen3", LAYERS),
    "gemma3": ("gemma3", LAYERS),
    "gemma3 soft-capped": ("gemma3_softcapped", LAYERS),
    "phi3": ("phi3", LAYERS),
    "gpt_neox": ("gpt_neox", {**LAYERS, "num_key_value_heads": 8}),
    "gpt2": ("gpt2", {"n_layer": 5, "n_head": 8}),
    "mixtral": ("mixtral", LAYERS),
}
NO_TENSOR_PLAN = {"gpt2"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose heads four divides and whose layers make four stages."""
    root = tmp_path_factory.mktemp("sharded")
    return {name: save_model(kind, root / name, **changes) for name, (kind, changes) in MODELS.items()}


def launch(folder: Path, workers: int, runs: list[dict[str, Any]]) -> None:
    """Do the runs in one launch of so many workers. A time-out here is a deadlock of the workers."""
    file = folder / f"runs of {workers}.json"
    file.write_text(json.dumps(runs))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(workers)]
    ran = subprocess.run(
        [*launcher, "-m", "tests.sharded", str(file)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


def arguments(model: Path, texts: Path, store: Path, *more: str) -> list[str]:
    settings = [f"teacher.model={model}", f"dataset.path={texts}", "dataset.max_length=64", "capture.k=12"]
    settings += ["capture.temperatures=[1.0,2.5]", "batch.max_tokens=300", "store.block_rows=256"]
    return [*settings, f"store.path={store}", "log_dir=logs", "teacher.dtype=float32", *more]


def captured(store: Path) -> dict[bytes, dict[str, torch.Tensor]]:
    found: dict[bytes, dict[str, torch.Tensor]] = {}
    for file in sorted(store.parent.glob(f"{store.name}.captured.*.pt")):
        found |= torch.load(file)
    return found


def difference(expected: Path, found: Path) -> str:
    """How the second store differs from the first beyond 1e-4 (ids: but for ties), in words; empty if it does not."""
    ours, theirs = captured(found), captured(expected)
    if ours.keys() != theirs.keys():
        return f"other batches: {len(ours)}, not {len(theirs)}"
    for batch, right in theirs.items():
        left = ours[batch]
        for name in ("topk_logprobs", "logsumexp", "tail_logprob", "target_logprob"):
            if not torch.allclose(left[name], right[name], atol=1e-4, rtol=0, equal_nan=True):
                return f"{name} by {(left[name] - right[name]).nan_to_num().abs().max():.2g}"
        swapped = left["topk_ids"] != right["topk_ids"]
        for row, place in swapped.nonzero().tolist():
            near = (right["topk_logprobs"][row] - right["topk_logprobs"][row, place]).abs() < 1e-4
            last = place == swapped.shape[1] - 1
            if near.sum() < 2 and not last:
                return f"topk_ids in row {row}, place {place}"
    return ""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("workers", "degree"), [(2, 2), (4, 4), (4, 2)], ids=["2", "4", "2x2"])
def test_sharded_stores_agree_with_one_process(
    workers: int, degree: int, folders: dict[str, Path], texts: Callable[[int], Path], tmp_path: Path
) -> None:
    launch(tmp_path, 1, [{"arguments": arguments(folders[n], texts(12), tmp_path / f"{n}.data")} for n in MODELS])
    runs: list[dict[str, Any]] = []
    for name, mode in [(name, mode) for name in MODELS for mode in ("tensor", "pipeline")]:
        if mode == "pipeline" or name not in NO_TENSOR_PLAN:
            ways = [f"parallel.mode={mode}", f"parallel.shard_size={degree}"]
            store = tmp_path / f"{name}.{mode}"
            runs.append({"arguments": arguments(folders[name], texts(12), store, *ways)})
    for mode, name in (("tensor", "llama"), ("pipeline", "qwen3")):  # the negative control
        ways = [f"parallel.mode={mode}", f"parallel.shard_size={degree}"]
        store = tmp_path / f"{name}.{mode}.damaged"
        runs.append({"arguments": arguments(folders[name], texts(12), store, *ways), "damage": 1.01})
    launch(tmp_path, workers, runs)
    for name in MODELS:
        expected = tmp_path / f"{name}.data"
        assert tree(tmp_path / f"{name}.pipeline") == tree(expected), name
        if name not in NO_TENSOR_PLAN:
            assert difference(expected, tmp_path / f"{name}.tensor") == "", name
    assert difference(tmp_path / "llama.data", tmp_path / "llama.tensor.damaged")
    assert difference(tmp_path / "qwen3.data", tmp_path / "qwen3.pipeline.damaged")


def begin(folder: Path, workers: int, settings: list[str]) -> subprocess.Popen[bytes]:
    """Start a run whose console goes to a file, and wait until something is committed."""
    with (folder / "console").open("wb") as console:
        launcher = subprocess.Popen(
            command(workers, settings), cwd=folder, env=environment(), stdout=console, stderr=console
        )
    deadline = time.monotonic() + 120
    while not list(folder.glob("*.zarr/commits/c/*")):
        assert launcher.poll() is None, (folder / "console").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return launcher


@pytest.mark.parametrize("rank", range(4))
def test_a_killed_shard_is_named_and_another_mode_goes_on(
    rank: int, folders: dict[str, Path], texts: Callable[[int], Path], tmp_path: Path
) -> None:
    """Kill each worker of a 2x2 hybrid; resume with another mode and degree: nothing is lost, nothing done twice."""
    settings = arguments(folders["llama"], texts(400), Path("x.zarr"), "store.block_rows=512")
    modes = ["parallel.mode=pipeline", "parallel.mode=tensor"][:: -1 if rank % 2 else 1]
    launcher = begin(tmp_path, 4, [*settings, modes[0], "parallel.shard_size=2"])
    killed = time.monotonic()
    os.kill(sorted(children(launcher.pid))[rank], signal.SIGKILL)
    assert launcher.wait(timeout=60) == 1
    assert time.monotonic() - killed < 20
    console = (tmp_path / "console").read_text()
    role = f"replica {rank // 2} of 2, shard rank {rank % 2} of 2"
    assert f"worker {rank} ({role}) failed; the end of its log, {tmp_path}/logs/worker_{rank}.log:" in console
    assert console.count("failed; the end of its log") == 1
    assert "NO_OTHER_FAILURES" in console
    log = (tmp_path / "logs" / f"worker_{rank}.log").read_text()
    assert f"this worker is {role}" in log
    assert ("stage" in log) == (modes[0] == "parallel.mode=pipeline")

    ran = generate(tmp_path, *settings, modes[1], "parallel.shard_size=2", workers=2)
    assert ran.returncode == 0, ran.stderr
    attributes = json.loads((tmp_path / "x.zarr" / "zarr.json").read_text())["attributes"]
    assert attributes["complete"] is True
    logs = "".join(log.read_text() for log in (tmp_path / "logs").glob("worker_*.log"))
    done = sorted(int(block) for block in re.findall(r"block (\d+) is committed", logs))
    assert done == sorted({*done}), "a block was written twice"
    there = len(list((tmp_path / "x.zarr" / "commits" / "c").iterdir()))
    assert there - len(done) in (0, 1, 2)  # one a replica may be committed, but not logged, when the run is killed


def test_a_hang_ends_with_the_log_of_who_hangs(
    folders: dict[str, Path], texts: Callable[[int], Path], tmp_path: Path
) -> None:
    settings = arguments(folders["llama"], texts(400), Path("x.zarr"), "parallel.mode=pipeline")
    launcher = begin(tmp_path, 2, [*settings, "parallel.timeout_seconds=5"])
    victim, stuck = sorted(children(launcher.pid))
    os.kill(stuck, signal.SIGSTOP)
    stopped = time.monotonic()
    while Path(f"/proc/{victim}/stat").exists() and "Z" not in Path(f"/proc/{victim}/stat").read_text().split()[2]:
        assert time.monotonic() - stopped < 60
        time.sleep(0.1)
    os.kill(stuck, signal.SIGCONT)  # so that it may be stopped, which torchrun would take 30 s to enforce
    assert launcher.wait(timeout=60) == 1
    console = (tmp_path / "console").read_text()
    assert "worker 1 of replica 0 has not answered for 5 s (parallel.timeout_seconds)" in console
    assert f"the end of its log, {tmp_path}/logs/worker_1.log:" in console
    assert (tmp_path / "logs" / "worker_1.log").read_text().splitlines()[-1].strip() in console


def test_bad_degrees_are_told_once(folders: dict[str, Path], texts: Callable[[int], Path], tmp_path: Path) -> None:
    cases = [
        (3, "llama", ["parallel.mode=tensor", "parallel.shard_size=2"], "2, 1 left over"),
        (2, "gpt2", ["parallel.mode=tensor"], "GPT2LMHeadModel has no plan for tensor parallelism"),
        (2, "llama", ["parallel.mode=device_map", "parallel.shard_size=2"], "2 workers x 2 devices = 4, found 2"),
    ]
    for workers, model, more, message in cases:
        ran = generate(tmp_path, *arguments(folders[model], texts(12), Path("x.zarr"), *more), workers=workers)
        assert ran.stderr.count("error: ") == 1, ran.stderr
        assert message in ran.stderr
        assert "exitcode  : 2" in ran.stderr
        assert "NO_OTHER_FAILURES" in ran.stderr
        assert not (tmp_path / "x.zarr").exists()


@pytest.mark.parametrize(
    ("name", "limit"), [("llama", None), ("llama", "700KB"), ("gemma3", "500KB"), ("gpt2", "500KB")]
)
def test_device_map_with_offload_gives_the_same_bytes(
    name: str, limit: str | None, folders: dict[str, Path], texts: Callable[[int], Path], tmp_path: Path
) -> None:
    more = ["parallel.mode=device_map"] + ([f"parallel.max_memory={limit}"] if limit else [])
    for store, settings in (("data", []), ("device_map", more)):
        ran = generate(tmp_path, *arguments(folders[name], texts(12), Path(f"{store}.zarr"), *settings))
        assert ran.returncode == 0, ran.stderr
        assert "slower" not in ran.stderr
    assert ("parts are in memory or on disk, which is slow" in ran.stderr) == (limit is not None)
    assert tree(tmp_path / "device_map.zarr") == tree(tmp_path / "data.zarr")
    assert not list((tmp_path / "logs").glob("offload*"))


def test_plan_prints_the_decision_and_stops(
    folders: dict[str, Path], texts: Callable[[int], Path], tmp_path: Path
) -> None:
    settings = arguments(folders["llama"], texts(12), Path("x.zarr"), "parallel.mode=pipeline")
    planned = subprocess.run(
        [sys.executable, "-m", "distill.generate", "--plan", *settings],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    cores = len(os.sched_getaffinity(0))
    found = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in planned.splitlines())
    assert "GiB a device" in found["memory"]
    assert found["parallel"].startswith("pipeline, ")
    assert found["next"].startswith(f"torchrun --nproc_per_node {cores} -m distill.generate teacher.model=")
    assert not (tmp_path / "x.zarr").exists()
    ran = generate(tmp_path, *settings[:-1])
    assert ran.returncode == 0, ran.stderr
    attributes = json.loads((tmp_path / "x.zarr" / "zarr.json").read_text())["attributes"]
    assert found["samples"] == f"{attributes['num_samples']:,}"
    assert found["tokens"] == f"{attributes['num_tokens']:,}"
    assert found["blocks"].startswith(f"{len(list((tmp_path / 'x.zarr' / 'commits' / 'c').iterdir()))} of 256 rows, ")
