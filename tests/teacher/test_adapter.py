"""A LoRA adapter as teacher and as student: the values of peft's own model, and what cannot be merged."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.config.generate import TeacherConfig
from distill.config.train import StudentConfig
from distill.errors import ConfigError, TeacherError
from distill.student.model import build, find
from distill.teacher.loading import load
from distill.teacher.placement import Needs, Placement
from distill.teacher.source import Source, local_tokenizer, locate
from tests.support import generate, make_tokenizer, open_raw, save_model

peft = pytest.importorskip("peft")
IDS = torch.arange(3, 40)[None]
CPU = torch.device("cpu")


def save_adapter(base: Path, folder: Path, rows: int | None = None, **settings: Any) -> Path:
    """A random adapter of the model in `base`, whose changes of the logits are large. rows: resize the embeddings."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base)
        if rows is not None:
            model.resize_token_embeddings(rows, mean_resizing=False)
        settings = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **settings}
        adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
        torch.manual_seed(1)
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    weight.add_(torch.randn_like(weight) * 0.3)
        adapted.save_pretrained(folder)
    return folder


@torch.no_grad()
def by_peft(base: Path, adapter: Path, merged: bool) -> Tensor:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        model = model.merge_and_unload() if merged else model
    logits: Tensor = model.eval()(input_ids=IDS).logits
    return logits


@torch.no_grad()
def loaded(source: Source, mode: str, offload: Path, max_memory: str | None = None) -> Tensor:
    needs = Needs.of(source, torch.float32, 1024, 1 << 20)
    model, _ = load(source, CPU, Placement(mode), needs, max_memory, offload)
    assert type(model).__name__ == needs.architecture
    logits: Tensor = model(input_ids=IDS).logits
    return logits


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapter") / "lora")


def test_the_values_are_those_of_pefts_merged_model(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Whole and spread, not offloaded; also where the adapter lies beside the files of its base."""
    beside = Path(shutil.copytree(base, tmp_path / "beside"))
    for file in adapter.glob("adapter_*"):
        shutil.copy(file, beside)
    shutil.copy(adapter / "adapter_config.json", beside)
    settings = json.loads((beside / "adapter_config.json").read_text())
    (beside / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "nowhere"}))
    expected, plain = by_peft(base, adapter, merged=True), by_peft(base, adapter, merged=False)
    torch.testing.assert_close(expected, plain, rtol=1e-4, atol=1e-4)
    for folder in (adapter, beside):
        source = locate(TeacherConfig(model=str(folder)))
        assert [file.name for file in source.weight_files] == ["model.safetensors"]
        for mode in ("data", "device_map"):
            torch.testing.assert_close(loaded(source, mode, tmp_path / "offload"), expected, rtol=0, atol=0)
        with pytest.raises(TeacherError, match=r"expected room for the whole base .* found a part offloaded"):
            loaded(source, "device_map", tmp_path / "offload", "500KB")


def test_modules_to_save_and_tied_embeddings(base: Path, tmp_path: Path) -> None:
    tied = save_model("qwen3", tmp_path / "tied")
    for model in (base, tied):
        saved = save_adapter(model, tmp_path / f"saved_{model.name}", modules_to_save=["lm_head"])
        source = locate(TeacherConfig(model=str(saved)))
        expected = by_peft(model, saved, merged=False)
        torch.testing.assert_close(loaded(source, "data", tmp_path), expected, rtol=1e-4, atol=1e-4)
        student = build(StudentConfig(model=str(saved)), find(StudentConfig(model=str(saved)), {}), seed=0)
        student.save_pretrained(tmp_path / "again")  # not tied again
        again = type(student).from_pretrained(tmp_path / "again")
        with torch.no_grad():
            torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    both = save_adapter(tied, tmp_path / "both", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(TeacherError, match="changes the embedding or the output head, which are one tensor"):
        loaded(locate(TeacherConfig(model=str(both))), "data", tmp_path)
    with pytest.raises(ConfigError, match=r"^student.model: the adapter in .* changes the embedding"):
        build(StudentConfig(), find(StudentConfig(model=str(both)), {}), seed=0)


def test_a_student_begins_with_the_merged_weights(base: Path, adapter: Path) -> None:
    for config in (StudentConfig(model=str(adapter)), StudentConfig()):
        student = build(config, find(config, {"model": str(adapter), "revision": None}), seed=0)
        with torch.no_grad():
            torch.testing.assert_close(student(input_ids=IDS).logits, by_peft(base, adapter, merged=True))


def test_a_store_is_that_of_the_merged_model(
    base: Path, adapter: Path, texts: Callable[[int], Path], tmp_path: Path
) -> None:
    """To the last byte; the run knows the adapter and the base by their contents."""
    from transformers import AutoModelForCausalLM

    model, lora = (Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in (base, adapter))
    settings = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(model)}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    make_tokenizer().save_pretrained(tmp_path / "merged")
    arguments = [f"dataset.path={texts(40)}", "capture.k=8", "teacher.dtype=float32"]
    for name, folder in (("ours", lora), ("theirs", tmp_path / "merged")):
        ran = generate(tmp_path, *arguments, f"teacher.model={folder}", f"store.path={name}.zarr")
        assert ran.returncode == 0, ran.stderr
        assert ("merged the adapter in" in ran.stderr) == (name == "ours")
    for name in ("tokens", "target_ids", "target_logprobs", "logsumexp", "tail_logprob"):
        ours, theirs = (open_raw(tmp_path / f"{which}.zarr", name) for which in ("ours", "theirs"))
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    moved = lora.rename(tmp_path / "moved")
    ran = generate(tmp_path, *arguments, f"teacher.model={moved}", "store.path=ours.zarr")
    assert "complete already" in ran.stderr, ran.stderr
    save_adapter(base, moved, r=2)
    save_model("llama", model, initializer_range=0.03)
    (moved / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(model), "r": 2}))
    ran = generate(tmp_path, *arguments, f"teacher.model={moved}", "store.path=ours.zarr")
    assert ran.returncode == 2
    for key in ("teacher.adapter", "teacher.weights"):
        assert f"{key}: the store has" in ran.stderr


def test_the_tokenizer_is_the_adapters_where_it_has_one(base: Path, adapter: Path, tmp_path: Path) -> None:
    lora = Path(shutil.copytree(adapter, tmp_path / "lora"))
    source = locate(TeacherConfig(model=str(lora)))
    assert len(source.tokenizer) == len(local_tokenizer(str(lora), None)) == 262
    tokenizer, before = make_tokenizer(), source.fingerprint
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(lora)
    source = locate(TeacherConfig(model=str(lora)))
    assert len(source.tokenizer) == len(local_tokenizer(str(lora), None)) == 263
    changed = {key for key, value in source.fingerprint.items() if before[key] != value}
    assert changed == {"tokenizer"}


def test_what_cannot_be_merged_is_refused_in_one_line(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(name: str, **settings: Any) -> Path:
        folder = Path(shutil.copytree(adapter, tmp_path / name))
        old = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(old | settings))
        return folder

    quantised = Path(shutil.copytree(base, tmp_path / "quantised"))
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    empty = changed("empty")
    (empty / "adapter_model.safetensors").unlink()
    broken = changed("broken")
    (broken / "adapter_config.json").write_text("[")
    cases = {
        changed("ia3", peft_type="IA3"): "expected a LoRA adapter of a causal language model in .*, found IA3",
        changed("classifier", task_type="SEQ_CLS"): "found LORA for SEQ_CLS",
        changed("baseless", base_model_name_or_path=None): "expected base_model_name_or_path in .*, found none",
        changed("lost", base_model_name_or_path="./nowhere"): r"the base of the adapter in .*: expected .*\./nowhere",
        changed("chain", base_model_name_or_path=str(adapter)): "is an adapter too: merge that one first",
        changed("rounded", base_model_name_or_path=str(quantised)): "expected a base that is not quantised",
        save_adapter(base, tmp_path / "resized", rows=1010, modules_to_save=["embed_tokens", "lm_head"]): (
            "was trained with a vocabulary of 1,010, its base has 1,000"
        ),
        empty: "expected the adapter's weights",
        broken: "cannot read .*adapter_config.json",
    }
    for folder, message in cases.items():
        with pytest.raises(TeacherError, match=f"^teacher.model: .*{message}") as refused:
            locate(TeacherConfig(model=str(folder)))
        assert "\n" not in str(refused.value)
    for layers in (2, 4):
        other = changed(f"other{layers}", base_model_name_or_path=str(tmp_path / f"base{layers}"))
        save_model("llama", tmp_path / f"base{layers}", num_hidden_layers=layers)
        with pytest.raises(TeacherError, match=r"expected an adapter that fits its base in .*other"):
            loaded(locate(TeacherConfig(model=str(other))), "data", tmp_path)
    needs = Needs.of(locate(TeacherConfig(model=str(adapter))), torch.float32, 1024, 1 << 20)
    for mode in ("tensor", "pipeline"):
        assert "an adapter is merged where the whole model is loaded, with data or device_map" in str(
            needs.refusal(mode, 2)
        )
    monkeypatch.setattr("distill.teacher.adapter.importlib.util.find_spec", lambda name: None)
    with pytest.raises(TeacherError, match=r"needs the package peft: pip install 'distill\[lora\]'"):
        locate(TeacherConfig(model=str(adapter)))
