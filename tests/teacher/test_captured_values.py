"""What is in the store is what the plain transformers forward says: each sample alone, unpadded, in float32."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.store.schema import CAPTURED
from tests.support import MODELS, generate, open_raw

K = 12
TEMPERATURES = [1.0, 2.5]


def check(store: Path, model: Any, samples: int) -> None:
    """Compare every row of the store with the model."""
    arrays = {
        path.name: open_raw(store, path.name) for path in store.iterdir() if path.is_dir() and path.name != "commits"
    }
    assert len(arrays["sample_start"]) == samples
    used = np.zeros(len(arrays["tokens"]), bool)
    for start, length in zip(arrays["sample_start"], arrays["sample_length"], strict=True):
        rows = slice(start, start + length)
        used[rows] = True
        with torch.inference_mode():
            ids = torch.from_numpy(arrays["tokens"][rows].astype(np.int64))[None]
            logits = model(input_ids=ids).logits[0].double()
        logprobs = logits.log_softmax(-1)
        kept = torch.from_numpy(arrays["target_ids"][rows].astype(np.int64))
        best, best_ids = logprobs.topk(K)
        swapped = best_ids != kept  # equal ids but for ties within float32's noise
        assert torch.allclose(logprobs.gather(1, kept)[swapped], best[swapped], atol=1e-5)
        expected = logprobs.gather(1, kept).numpy()
        found = arrays["target_logprobs"][rows].astype(np.float64)
        np.testing.assert_allclose(found, expected, rtol=2**-7 + 2**-10, atol=1e-4)
        assert (np.diff(found, axis=1) <= 0).all()
        following = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy()
        np.testing.assert_allclose(arrays["next_logprob"][rows][:-1], following, rtol=2**-10, atol=1e-4)
        assert np.isnan(arrays["next_logprob"][rows][-1:])
        outside = torch.ones_like(logprobs, dtype=torch.bool).scatter(1, kept, False)
        for column, temperature in enumerate(TEMPERATURES):
            lse = torch.logsumexp(logits / temperature, -1)
            np.testing.assert_allclose(arrays["logsumexp"][rows, column], lse.numpy(), atol=1e-4, rtol=0)
            rest = (logits / temperature).masked_fill(~outside, -torch.inf).logsumexp(-1) - lse
            found_tail = arrays["tail_logprob"][rows, column].astype(np.float64)
            np.testing.assert_allclose(found_tail, rest.numpy(), rtol=2**-7 + 2**-10, atol=1e-4)
    assert (arrays["tokens"][~used] == -1).all()
    assert (arrays["target_ids"][~used] == -1).all()
    assert np.isnan(arrays["target_logprobs"][~used].astype(np.float32)).all()
    assert np.isnan(arrays["logsumexp"][~used]).all()


def check_sample(store: Path, model: Any) -> None:
    """Compare every row of a store of samples with the model: which ids are kept, how many are drawn, of which mass."""
    arrays = {name: open_raw(store, name) for name in ("sample_start", "sample_length", "tokens", *CAPTURED)}
    num_drawn = 0
    for start, length in zip(arrays["sample_start"], arrays["sample_length"], strict=True):
        rows = slice(start, start + length)
        with torch.inference_mode():
            logits = model(input_ids=torch.from_numpy(arrays["tokens"][rows].astype(np.int64))[None]).logits[0].double()
        p = logits.softmax(-1)
        ids = torch.from_numpy(arrays["target_ids"][rows].astype(np.int64))
        logprobs = torch.from_numpy(arrays["target_logprobs"][rows].astype(np.float64))
        kept, there = ~logprobs.isnan(), ids >= 0
        assert (kept <= there).all()
        order = logits.sort(dim=1, descending=True, stable=True).indices[:, :K]
        near = p.gather(1, ids.clamp(min=0)).log() - p.gather(1, order).log()
        assert (near[kept].abs() < 1e-4).all(), "the most probable, equal ones aside"
        expected = p.gather(1, ids.clamp(min=0)).log()[kept]
        torch.testing.assert_close(logprobs[kept], expected, rtol=2**-7 + 2**-10, atol=1e-4)
        rest = 1 - torch.where(kept, p.gather(1, ids.clamp(min=0)), 0.0).sum(dim=1)
        tail = torch.from_numpy(arrays["tail_logprob"][rows, 0].astype(np.float64))
        torch.testing.assert_close(tail, rest.log(), rtol=2**-7 + 2**-10, atol=1e-4)
        torch.testing.assert_close(
            torch.from_numpy(arrays["logsumexp"][rows, 0]).double(), logits.logsumexp(-1), atol=1e-4, rtol=0
        )
        least = (K * p).clamp(max=1).sum(dim=1)  # ids of a row
        assert (there.sum(dim=1) - least > -1e-3).all()
        assert (there.sum(dim=1) - least < 1 + 1e-3).all()
        threshold = rest / (there & ~kept).sum(dim=1).clamp(min=1)
        drawn = there & ~kept
        later = kept & (torch.arange(K) > 0)  # the first is always kept
        assert (p.gather(1, ids.clamp(min=0))[later] >= threshold[:, None].expand_as(ids)[later] * 0.999).all()
        assert (p.gather(1, ids.clamp(min=0))[drawn] <= threshold[:, None].expand_as(ids)[drawn] * 1.001).all()
        num_drawn += int(drawn.sum())
    assert num_drawn > 3 * len(arrays["sample_start"])


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("cohere", "dynamic_ntk")])
def test_random_models(
    name: str, model_folder: Callable[[str], Path], texts: Callable[[int], Path], tmp_path: Path
) -> None:
    folder = model_folder(name)
    ran = generate(
        tmp_path,
        f"teacher.model={folder}",
        f"dataset.path={texts(40)}",
        "dataset.max_length=200",
        "capture.method=topk",
        f"capture.k={K}",
        f"capture.temperatures={TEMPERATURES}",
        "batch.max_tokens=500",
        "store.block_rows=1024",
        "store.path=x.zarr",
    )
    assert ran.returncode == 0, ran.stderr
    assert "slower" not in ran.stderr  # no fallback
    attributes = json.loads((tmp_path / "x.zarr" / "zarr.json").read_text())["attributes"]
    assert attributes["complete"] is True
    check(tmp_path / "x.zarr", AutoModelForCausalLM.from_pretrained(folder).eval(), attributes["num_samples"])


def test_smollm2(tmp_path: Path) -> None:
    from distill.config.generate import TeacherConfig
    from distill.teacher.source import locate

    ran = generate(
        tmp_path, "dataset.max_samples=3", "capture.method=topk", f"capture.k={K}",
        f"capture.temperatures={TEMPERATURES}", workers=2,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    model = AutoModelForCausalLM.from_pretrained(locate(TeacherConfig()).folder).eval()
    check(tmp_path / "outputs" / "demo.zarr", model, 3)
    ran = generate(tmp_path, "dataset.max_samples=3", f"capture.k={K}", "capture.method=sample", "store.path=s.zarr")
    assert ran.returncode == 0, ran.stderr
    check_sample(tmp_path / "s.zarr", model)
