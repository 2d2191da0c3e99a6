"""What identifies a teacher, how long its context is, and what is said where it cannot be read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill.config.generate import TeacherConfig
from distill.config.train import StudentConfig
from distill.errors import ConfigError, TeacherError, first_line
from distill.student.model import find
from distill.teacher import demo
from distill.teacher.source import Source, locate

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
CONTEXTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "plain": ("llama", {}, 1024),
    "yarn, not raised": ("llama", {"rope_parameters": {**YARN, "original_max_position_embeddings": 1024}}, 4096),
    "yarn, length unnamed": ("llama", {"rope_parameters": YARN}, 4096),
    "yarn, raised": ("llama", {"rope_parameters": {**YARN, "original_max_position_embeddings": 256}}, 1024),
    "the old name": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, 2048),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, 2048),
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "rope_theta": 1e4,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        1024,
    ),
    "longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
            },
        },
        1024,
    ),
    "a rope for each type of layer": (  # Gemma 3: its max_position_embeddings is raised, and no other length is named
        "gemma3_text",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            }
        },
        1024,
    ),
    "one of them named": (  # OLMo 3
        "olmo3",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {**YARN, "original_max_position_embeddings": 1024},
            }
        },
        4096,
    ),
    "learned": ("gpt2", {"n_positions": 512}, 512),
    "learned, with an offset": ("opt", {"max_position_embeddings": 512}, 512),
}


@pytest.mark.parametrize("case", CONTEXTS)
def test_the_context_counts_rope_factors(case: str) -> None:
    from transformers import CONFIG_MAPPING

    kind, settings, expected = CONTEXTS[case]
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 1024}
    config = CONFIG_MAPPING[kind](**({} if kind == "gpt2" else sizes) | settings)
    assert Source(Path(), TeacherConfig(), config, SimpleNamespace()).context_length == expected


def test_code_that_is_run_is_part_of_the_fingerprint(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))
    (folder / "generation_config.json").write_text("{}")
    plain, trusted = TeacherConfig(model=str(folder)), TeacherConfig(model=str(folder), trust_remote_code=True)
    before = locate(plain).fingerprint
    (folder / "generation_config.json").write_text('{"temperature": 2.0}')
    (folder / "modeling_x.py").write_text("a = 1")
    assert locate(plain).fingerprint == before
    code = locate(trusted).fingerprint
    assert code == before | {"teacher.code": code["teacher.code"]}
    (folder / "modeling_x.py").write_text("a = 2")
    changed = locate(trusted).fingerprint
    assert {key for key in changed if changed[key] != code[key]} == {"teacher.code"}


def test_errors_keep_the_sentence_that_helps(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    def changed(name: str, file: str, **settings: Any) -> Path:
        folder = Path(shutil.copytree(model_folder("llama"), tmp_path / name))
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | settings))
        return folder

    own = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XModel"}
    code = changed("code", "config.json", model_type="x", auto_map=own)
    tokenizer = changed(
        "words", "tokenizer_config.json", tokenizer_class="X", auto_map={"AutoTokenizer": ["x.X", None]}
    )
    bare = changed("bare", "config.json")
    for file in bare.glob("token*"):
        file.unlink()
    for folder, message in (
        (code, r"Python code of its own; read it, then set teacher.trust_remote_code=true$"),
        (tokenizer, r"Python code of its own; read it, then set teacher.trust_remote_code=true$"),
        (bare, r"You need to have sentencepiece or tiktoken installed"),
        (changed("unknown", "config.json", model_type="nosuch"), "`nosuch`.*pip install --upgrade transformers"),
    ):
        with pytest.raises(TeacherError, match=message) as refused:
            locate(TeacherConfig(model=str(folder)))
        assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"^student.model=.*set student.trust_remote_code=true$"):
        find(StudentConfig(model=str(code)), {})
    (code / "configuration_x.py").write_text("import no_such_package_x")
    with pytest.raises(TeacherError, match="pip install no_such_package_x"):
        locate(TeacherConfig(model=str(code), trust_remote_code=True))


def test_first_line() -> None:
    gated = (
        "401 Client Error. (Request ID: 1)\n\nCannot access gated repo for url u.\nAccess to model a/b is restricted. "
    )
    gated += "You must have access to it and be authenticated to access it. Please log in."
    for error, expected in (
        (ValueError("one\ntwo"), "one"),
        (ValueError(" \n"), "ValueError"),
        (KeyError("config"), "KeyError: 'config'"),
        (OSError(gated), "401 Client Error. (Request ID: 1): Access to model a/b is restricted"),
    ):
        assert first_line(error) == expected


def test_no_home_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])  # a user of a container, whom nobody knows
    with pytest.raises(ConfigError, match=r"teacher.model=demo \(or set XDG_CACHE_HOME\): expected a home folder"):
        locate(TeacherConfig())
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("HOME", "/")
    assert demo.cached() == Path("/.cache/distill/SmolLM2-135M-Instruct")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    with pytest.raises(TeacherError, match=r"cannot convert it into .* \(XDG_CACHE_HOME is the folder to use instead"):
        locate(TeacherConfig())
