"""Multimodal models say about text what the plain model says, without their towers; as teachers and as students."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForMultimodalLM

from distill.config.generate import TeacherConfig
from distill.config.train import StudentConfig
from distill.errors import TeacherError
from distill.student.model import build, find
from distill.teacher.loading import load
from distill.teacher.model import Teacher
from distill.teacher.pipeline import decoder_layers
from distill.teacher.placement import Needs, Placement
from distill.teacher.source import locate
from distill.teacher.text import leave_out, towers
from tests.support import MULTIMODAL, build_model, make_tokenizer, save_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("multimodal")
    return lambda name: root / name if (root / name).exists() else save_model(name, root / name)


@pytest.mark.parametrize("mode", ["data", "device_map"])
@pytest.mark.parametrize("name", MULTIMODAL)
def test_text_without_the_tower(
    name: str, mode: str, folder: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = build_model(name)
    samples = [np.random.default_rng(i).integers(0, 998, length).astype(np.int32) for i, length in enumerate((40, 33))]
    with torch.inference_mode():
        expected = torch.cat([plain(input_ids=torch.from_numpy(s.astype(np.int64))[None]).logits[0] for s in samples])
    source = locate(TeacherConfig(model=str(folder(name))))
    needs = Needs.of(source, torch.float32, 1024, 1)
    with caplog.at_level("INFO"):
        model, share = load(source, CPU, Placement(mode), needs, "100KB" if mode == "device_map" else None, tmp_path)
        count = sum(weight.numel() for weight in model.parameters())
        teacher = Teacher(model, CPU, share)
    found = torch.cat([logits.clone() for logits in teacher.logits(samples)])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert teacher._sliced
    assert needs.left_out == towers(plain) != []
    assert f"not loaded, since text does not need it: {needs.left_out[0]}" in caplog.text
    assert needs.parameters == 4 * count
    tower = sum(weight.numel() for weight in plain.get_submodule(needs.left_out[0]).parameters())
    assert count + tower == sum(weight.numel() for weight in plain.parameters())


def test_a_tower_that_text_goes_through_is_told() -> None:
    model = build_model("mistral3")
    leave_out(model, ["model.language_model.norm"])
    with pytest.raises(TeacherError, match="expected a model that reads text without its MistralRMSNorm, which it run"):
        Teacher(model, CPU)


def test_a_model_that_does_not_continue_text_is_refused(tmp_path: Path) -> None:
    for kind in ("t5gemma2", "vit"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        (tmp_path / "model.safetensors").write_bytes(b"x")
        with pytest.raises(TeacherError, match=f"teacher.model: expected a causal language model, found {kind} in"):
            locate(TeacherConfig(model=str(tmp_path)))


@pytest.mark.parametrize("name", MULTIMODAL)
def test_the_layers_are_those_of_the_language_model(name: str) -> None:
    found = decoder_layers(build_model(name))
    assert found is not None
    assert found[0] == "model.language_model.layers"


@pytest.mark.parametrize(("name", "layers"), [("mistral3", None), ("qwen3_vl", 2), ("gemma3_vision", 2)])
def test_a_student_is_saved_with_its_tower(
    name: str, layers: int | None, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source = find(StudentConfig(), {"model": str(folder(name)), "revision": None})
    student = build(StudentConfig(layers=layers), source, seed=0)
    before = {key: weight.clone() for key, weight in student.state_dict().items()}
    student(input_ids=torch.arange(12)[None]).logits.float().logsumexp(dim=-1).sum().backward()
    trained = {key for key, weight in student.named_parameters() if weight.requires_grad}
    assert trained == {key for key, weight in student.named_parameters() if weight.grad is not None}
    assert trained == {key for key, _ in student.named_parameters() if "language_model" in key or "lm_head" in key}
    torch.optim.SGD(student.parameters(), lr=1.0).step()
    student.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    saved, info = AutoModelForMultimodalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert AutoConfig.from_pretrained(tmp_path).get_text_config().num_hidden_layers == layers or 3
    for key, weight in saved.state_dict().items():
        changed = not weight.equal(before[key])
        assert changed == (key in trained or key == "lm_head.weight"), key
    teacher: Any = Teacher(saved.eval(), CPU)
    assert teacher._sliced
