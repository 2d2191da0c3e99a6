"""Nothing that a store, a checkpoint or a model holds is run, unless the user asks for it."""

import ast
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import TeacherCache
from distill.config.generate import TeacherConfig
from distill.config.train import StudentConfig
from distill.errors import ConfigError, StoreError, TeacherError
from distill.store.metadata import array_digest, encode, group_document, sealed
from distill.student.checkpoint import Checkpoints
from distill.student.model import find as find_student
from distill.teacher.loading import load
from distill.teacher.placement import Needs, Placement
from distill.teacher.source import local_tokenizer, locate

PACKAGE = Path(__file__).parent.parent / "distill"


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_the_bomb_goes_off(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def test_weights_are_not_unpickled(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(model_folder("llama"), folder)
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": torch.zeros(1), "x": Bomb(mark)}, folder / "pytorch_model.bin")
    source = locate(TeacherConfig(model=str(folder)))
    needs = Needs.of(source, torch.float32, 64, 1 << 20)
    with pytest.raises(TeacherError, match=r"teacher.model: cannot load"):
        load(source, torch.device("cpu"), Placement(), needs, None, tmp_path)
    assert not mark.exists()


def test_adapters_are_not_unpickled(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(model_folder("llama"), folder)
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    torch.save({"x": Bomb(mark)}, folder / "adapter_model.bin")
    source = locate(TeacherConfig(model=str(folder)))
    assert source.adapter == folder
    needs = Needs.of(source, torch.float32, 64, 1 << 20)
    with pytest.raises(TeacherError, match=r"teacher.model: cannot load"):
        load(source, torch.device("cpu"), Placement(), needs, None, tmp_path)
    assert not mark.exists()


def test_checkpoints_are_not_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    checkpoint = tmp_path / "output" / "checkpoints" / "step_1"
    checkpoint.mkdir(parents=True)
    torch.save({"step": 1, "settings": Bomb(mark)}, checkpoint / "state.pt")
    with pytest.raises(ConfigError, match=r"output: cannot read the checkpoint"):
        Checkpoints(tmp_path / "output", {})
    assert not mark.exists()


def test_a_models_own_code_is_not_run(
    model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by itself, and not after a question either."""
    folder, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(model_folder("llama"), folder)
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass X: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    maps: dict[str, dict[str, Any]] = {"config.json": {"AutoConfig": "code.X", "AutoModelForCausalLM": "code.X"}}
    maps |= {"tokenizer_config.json": {"AutoTokenizer": [None, "code.X"]}}
    for name, auto_map in maps.items():
        content = json.loads((folder / name).read_text())
        kind = {"model_type": "its_own"} if name == "config.json" else {"tokenizer_class": "X"}
        (folder / name).write_text(json.dumps(content | kind | {"auto_map": auto_map}))
        with pytest.raises(TeacherError, match=r"read it, then set teacher\.trust_remote_code=true"):
            locate(TeacherConfig(model=str(folder)))
        with pytest.raises(ConfigError, match=r"read it, then set student\.trust_remote_code=true"):
            find_student(StudentConfig(model=str(folder)), {})
        local_tokenizer(str(folder), None)
        assert not mark.exists()
        (folder / name).write_text(json.dumps(content))
    assert local_tokenizer(str(folder), None) is not None


@pytest.mark.parametrize("how", ["codec", "inner codec", "filter", "object", "version 2"])
def test_a_stores_codecs_are_those_of_the_format(how: str, small_store: Path, tmp_path: Path) -> None:
    """Although its attributes say so too: somebody made it."""
    folder, mark = tmp_path / "x.zarr", tmp_path / "mark"
    shutil.copytree(small_store, folder)
    at = folder / "target_ids" / "zarr.json"
    document = json.loads(at.read_text())
    strange = {"name": "numcodecs.pickle", "configuration": {}}
    if how == "codec":
        document["codecs"] = [strange]
    elif how == "inner codec":
        document["codecs"][0]["configuration"]["codecs"] = [strange]
    elif how == "filter":
        document["codecs"] = [{"name": "numcodecs.json2", "configuration": {}}, *document["codecs"]]
    elif how == "object":
        document |= {"data_type": "variable_length_bytes", "fill_value": "", "codecs": [{"name": "vlen-bytes"}]}
    else:
        old = {"zarr_format": 2, "shape": document["shape"], "chunks": [512, 8], "dtype": "|O", "fill_value": None}
        old |= {"order": "C", "compressor": None, "filters": [{"id": "pickle"}]}
        at.unlink()
        (at.parent / ".zarray").write_text(json.dumps(old))
        (at.parent / "0.0").write_bytes(pickle.dumps(Bomb(mark)))
    if how != "version 2":
        at.write_bytes(encode(document))
    for chunk in (at.parent / "c").rglob("0"):
        if chunk.is_file():
            chunk.write_bytes(pickle.dumps(Bomb(mark)))
    root = json.loads((folder / "zarr.json").read_text())["attributes"]
    root = sealed(root | {"arrays": root["arrays"] | {"target_ids": array_digest(document)}})
    commits = json.loads((folder / "commits" / "zarr.json").read_text())
    (folder / "commits" / "zarr.json").write_bytes(encode(commits | {"attributes": {**root, "complete": False}}))
    (folder / "zarr.json").write_bytes(encode(group_document(root)))
    with pytest.raises(StoreError, match=r"target_ids/zarr.json (names codecs that no store has|is missing|is not)"):
        TeacherCache(str(folder))
    assert not mark.exists()


def test_what_loads_says_that_it_runs_nothing() -> None:
    """Every call in the package that could unpickle, or run what a model comes with."""
    risky = {"from_pretrained": "trust_remote_code", "from_config": "trust_remote_code", "load": "weights_only"}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            name, given = node.func.attr, {keyword.arg for keyword in node.keywords}
            owner = ast.unparse(node.func.value)
            assert owner not in ("pickle", "marshal", "shelve", "dill"), f"{file}: {ast.unparse(node)}"
            assert "allow_pickle" not in given, file
            if name == "load" and owner == "torch":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), file
            ours = ("demo.py", "adapter.py")  # its folder is our own; peft runs no code of an adapter's
            if name in ("from_pretrained", "from_config") and file.name not in ours:
                assert {risky[name], None} & given, f"{file}: {ast.unparse(node)}"
