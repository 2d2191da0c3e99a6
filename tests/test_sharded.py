"""Copies of the teacher on several workers say what one worker says: tensor and pipeline, alone and side by side."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import environment, save_model, tree

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
