"""Replicas of several workers say what one worker says: tensor and pipeline, one replica and several."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import children, committed, freeze
from tests.support import (
    blocks_logged,
    build_model,
    command,
    environment,
    generate,
    has,
    save_model,
    tree,
    wait_for,
)

LAYERS = {"num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LAYERS),
    "llama tied": ("llama", {**LAYERS, "tie_word_embeddings": True}),
    "llama odd": ("llama", {**LAYERS, "vocab_size": 1001}),
    "sampled llama": ("llama", {**LAYERS, "vocab_size": 1001}),
    "qwen3": ("qwen3", LAYERS),
    "gemma3": ("gemma3", LAYERS),
    "gemma3 soft-capped": ("gemma3_softcapped", LAYERS),
    "phi3": ("phi3", LAYERS),
    "gpt_neox": ("gpt_neox", {**LAYERS, "num_key_value_heads": 8}),
    "gpt2": ("gpt2", {"n_layer": 5, "n_head": 8}),
    "mixtral": ("mixtral", LAYERS),
    "opt": ("opt", LAYERS),
    "mistral3": ("mistral3", LAYERS),
    "gemma3 vision": ("gemma3_vision", LAYERS),
    "qwen3_vl": ("qwen3_vl", LAYERS),
    "glm4v_moe": ("glm4v_moe", LAYERS),
}
NO_TENSOR_PLAN = {"gpt2", "opt", "qwen3_vl"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose heads four divides and whose layers make four stages."""
    root = tmp_path_factory.mktemp("sharded")
    made = {name: save_model(kind, root / name, **changes) for name, (kind, changes) in MODELS.items()}
    (made["qwen3"] / "model.safetensors").unlink()  # a checkpoint in many files instead
    build_model("qwen3", **LAYERS).save_pretrained(made["qwen3"], max_shard_size="100KB")
    assert len(list(made["qwen3"].glob("*.safetensors"))) > 3
    return made


def launch(folder: Path, workers: int, runs: list[dict[str, Any]]) -> str:
    """Do the runs in one launch of so many workers, and return the console. A time-out here is a deadlock."""
    file = folder / f"runs of {workers}.json"
    file.write_text(json.dumps(runs))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(workers)]
    ran = subprocess.run(
        [*launcher, "-m", "tests.sharded", str(file)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stderr


def arguments(model: Path, texts: Path, store: Path, *more: str) -> list[str]:
    settings = [f"teacher.model={model}", f"dataset.path={texts}", "dataset.max_length=64", "capture.k=12"]
    settings += ["capture.method=topk", "capture.temperatures=[1.0,2.5]", "batch.max_tokens=400"]
    settings += ["store.block_rows=256"]
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
    differing = rows = 0
    for batch, right in theirs.items():
        left = ours[batch]
        for name in ("target_logprobs", "logsumexp", "tail_logprob", "next_logprob"):
            if not torch.allclose(left[name], right[name], atol=1e-4, rtol=0, equal_nan=True):
                return f"{name} by {(left[name] - right[name]).nan_to_num().abs().max():.2g}"
        if found.name.startswith("sampled"):  # a point may cross the border of an id; of 1,001, it seldom does
            others = (left["target_ids"] != right["target_ids"]).any(dim=1)
            differing, rows = differing + int(others.sum()), rows + len(others)
            continue
        swapped = left["target_ids"] != right["target_ids"]
        for row, place in swapped.nonzero().tolist():
            near = (right["target_logprobs"][row] - right["target_logprobs"][row, place]).abs() < 1e-4
            last = place == swapped.shape[1] - 1
            if near.sum() < 2 and not last:
                return f"target_ids in row {row}, place {place}"
    return f"ids of {differing} of {rows} rows" if differing > 0.01 * rows else ""


def check_shares(whole: Path, store: Path, mode: str) -> None:
    """Four workers together loaded every weight, and each about a quarter, the largest indivisible part aside."""
    everything = json.loads(Path(f"{whole}.loaded.0.json").read_text())
    shares = [json.loads(Path(f"{store}.loaded.{rank}.json").read_text()) for rank in range(4)]
    assert {name for share in shares for name in share} == {*everything}
    total, most = sum(everything.values()), max(sum(share.values()) for share in shares)
    if mode == "tensor":
        assert most < 0.3 * total
    else:
        layers: dict[str, int] = {}
        for name, count in everything.items():
            part = re.sub(r"(\.\d+\.).*", r"\1", name)
            layers[part] = layers.get(part, 0) + count
        assert most < total / 4 + 1.5 * max(layers.values())
        copies = Counter(name for share in shares for name in share)
        for name, count in copies.items():  # a tied embedding is in two stages, norms and positions in all
            most_copies = 1 if re.search(r"\.\d+\.", name) else 2 if re.search("embed_tokens|wte|embed_in", name) else 4
            assert "vision" not in name and "visual" not in name
            assert count <= most_copies, name


@pytest.mark.timeout(900)
def test_sharded_stores_agree_with_one_process(
    folders: dict[str, Path], texts: Callable[[int], Path], tmp_path: Path
) -> None:
    """Every architecture on four workers, as one replica of four and as two of two; some as one replica of two."""

    def run(name: str, mode: str, degree: int, workers: int) -> dict[str, Any]:
        store = tmp_path / f"{name}.{mode}{degree}of{workers}"
        ways = [f"parallel.mode={mode}", f"parallel.shard_size={degree}"]
        if name.startswith("sampled"):
            ways += ["capture.method=sample", "capture.temperatures=[1.0]"]
        return {"arguments": arguments(folders[name], texts(6), store, *ways)}

    modes = [(name, mode) for name in MODELS for mode in ("tensor", "pipeline")]
    modes = [(name, mode) for name, mode in modes if mode == "pipeline" or name not in NO_TENSOR_PLAN]
    launch(tmp_path, 1, [run(name, "data", 1, 1) for name in MODELS])
    launch(tmp_path, 2, [run(name, mode, 2, 2) for name, mode in modes if name in ("llama", "gemma3", "gpt2")])
    wrong = [("llama", "tensor"), ("qwen3", "pipeline"), ("sampled llama", "tensor")]
    damaged = [{**run(name, mode, 4, 0), "damage": 1.01} for name, mode in wrong]
    launch(tmp_path, 4, [*damaged, *(run(name, mode, degree, 4) for name, mode in modes for degree in (4, 2))])
    for name, mode in modes:
        expected = tmp_path / f"{name}.data1of1"
        stores = [path for path in tmp_path.glob(f"{name}.{mode}?of[24]") if path.is_dir()]
        assert len(stores) in (2, 3)
        check_shares(expected, tmp_path / f"{name}.{mode}4of4", mode)
        for store in stores:
            assert difference(expected, store) == "", store.name
            assert mode == "tensor" or tree(store) == tree(expected), store.name
    for name, mode in wrong:  # the negative controls
        assert difference(tmp_path / f"{name}.data1of1", tmp_path / f"{name}.{mode}4of0")


def begin(folder: Path, workers: int, settings: list[str]) -> subprocess.Popen[bytes]:
    """Start a run whose console goes to a file, and wait until something is committed."""
    with (folder / "console").open("wb") as console:
        launcher = subprocess.Popen(
            command(workers, settings), cwd=folder, env=environment(), stdout=console, stderr=console
        )
    before = committed(folder / "x.zarr")
    wait_for(lambda: committed(folder / "x.zarr") > before, (folder / "console").read_text)
    return launcher


def test_a_killed_shard_is_named_and_another_mode_goes_on(
    folders: dict[str, Path], texts: Callable[[int], Path], tmp_path: Path
) -> None:
    """Kill workers of 2x2 hybrids, resume with another mode, then another shard_size: nothing is lost or done twice."""
    settings = arguments(folders["llama"], texts(300), Path("x.zarr"))
    for rank, mode in ((3, "pipeline"), (0, "tensor")):
        launcher = begin(tmp_path, 4, [*settings, f"parallel.mode={mode}", "parallel.shard_size=2"])
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
        assert mode != "pipeline" or "stage 1 of 2: layers" in log
    ran = generate(tmp_path, *settings, "parallel.mode=pipeline", workers=2)
    assert ran.returncode == 0, ran.stderr
    attributes = json.loads((tmp_path / "x.zarr" / "zarr.json").read_text())["attributes"]
    assert attributes["complete"] is True
    done = blocks_logged(tmp_path)
    assert done == sorted({*done}), "a block was written twice"
    unlogged = committed(tmp_path / "x.zarr") - len(done)
    assert unlogged in range(5)  # when a run is killed, a block of each replica may be committed but not logged


def test_a_hang_ends_with_the_log_of_who_hangs(
    folders: dict[str, Path], texts: Callable[[int], Path], tmp_path: Path
) -> None:
    settings = arguments(folders["llama"], texts(300), Path("x.zarr"), "parallel.mode=pipeline")
    launcher = begin(tmp_path, 2, [*settings, "timeout_seconds=5"])
    wait_for(lambda: has(tmp_path / "logs" / "worker_1.log", "is committed"))  # logged just after it is there
    freeze(launcher)
    assert launcher.wait(timeout=60) == 1
    console = (tmp_path / "console").read_text()
    assert "worker 1 has made no progress for 5 s (timeout_seconds)" in console
    assert f"the end of its log, {tmp_path}/logs/worker_1.log:" in console
    assert "rank 1 INFO distill.teacher.worker: block" in console


def test_bad_degrees_are_told_once(folders: dict[str, Path], texts: Callable[[int], Path], tmp_path: Path) -> None:
    more = ["parallel.mode=tensor", "parallel.shard_size=2"]
    ran = generate(tmp_path, *arguments(folders["llama"], texts(6), Path("x.zarr"), *more), workers=3)
    assert ran.stderr.count("error: ") == 1, ran.stderr
    assert "found 2: 1 replicas x 2 workers = 2, 1 left over" in ran.stderr
    assert "exitcode  : 2" in ran.stderr
    assert "NO_OTHER_FAILURES" in ran.stderr
    assert not (tmp_path / "x.zarr").exists()


def test_device_map_with_offload_gives_the_same_bytes(
    folders: dict[str, Path], texts: Callable[[int], Path], tmp_path: Path
) -> None:
    cases: list[tuple[str, list[str]]] = [("whole", [])]
    cases += [("spread", ["parallel.mode=device_map"])]
    cases += [("offloaded", ["parallel.mode=device_map", "parallel.max_memory=500KB"])]
    names = ("llama", "gemma3", "gpt2", "mixtral", "mistral3", "gemma3 vision", "qwen3_vl")
    runs = [
        {"arguments": arguments(folders[name], texts(6), tmp_path / f"{name}.{case}", *more)}
        for name in names
        for case, more in cases
    ]
    console = launch(tmp_path, 1, runs)
    assert console.count("parts are in memory or on disk, which is slow") == len(names)
    assert "slower" not in console
    for name in names:
        for case, _ in cases:
            assert tree(tmp_path / f"{name}.{case}") == tree(tmp_path / f"{name}.whole"), (name, case)
    assert not list((tmp_path / "logs").glob("offload*"))


def test_plan_prints_the_decision_and_stops(
    folders: dict[str, Path], texts: Callable[[int], Path], tmp_path: Path
) -> None:
    settings = arguments(folders["llama"], texts(6), Path("x.zarr"), "parallel.mode=pipeline")
    planned = subprocess.run(
        [sys.executable, "-m", "distill.generate", "--plan", *settings],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    cores = len(os.sched_getaffinity(0))
    found = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in planned.partition("\n\n")[0].splitlines())
    assert "«" in planned.partition("\n\n")[2]
    assert "GiB a device" in found["memory"]
    assert found["parallel"].startswith("pipeline, ")
    assert found["next"].startswith(f"torchrun --nproc_per_node={cores} -m distill.generate teacher.model=")
    assert not (tmp_path / "x.zarr").exists()
    ran = generate(tmp_path, *settings[:-1])
    assert ran.returncode == 0, ran.stderr
    attributes = json.loads((tmp_path / "x.zarr" / "zarr.json").read_text())["attributes"]
    assert found["samples"] == f"{attributes['num_samples']:,}"
    assert found["tokens"] == f"{attributes['num_tokens']:,}"
    assert found["blocks"].startswith(f"{len(list((tmp_path / 'x.zarr' / 'commits' / 'c').iterdir()))} of 256 rows, ")
