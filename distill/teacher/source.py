"""Find the teacher: its folder on this machine, its configuration and its tokenizer. No weights are loaded."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from distill.config import TeacherConfig
from distill.errors import TeacherError, first_line
from distill.store.fingerprint import digest, text_digest
from distill.teacher import demo

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]


@dataclass(frozen=True)
class Source:
    """A model's folder, with its configuration and its tokenizer."""

    folder: Path
    config: TeacherConfig
    model_config: Any
    tokenizer: Any

    @property
    def text_config(self) -> Any:
        """The configuration of the language model, which may be one part of a larger model."""
        return self.model_config.get_text_config()

    @property
    def vocab_size(self) -> int:
        """V: the size of the model's softmax; often padded beyond the tokenizer's vocabulary."""
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
        """What a student's tokenizer is compared with: the number of tokens, and a hash of the (token, id) pairs."""
        pairs = sorted(self.tokenizer.get_vocab().items())
        return {"vocab_size": len(self.tokenizer), "vocab_digest": text_digest(json.dumps(pairs))}

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What identifies the model and the tokenizer, independent of where the folder is."""
        files = sorted(file for file in self.folder.iterdir() if file.is_file())
        tokenizer = [file for file in files if file.name.startswith(("token", "vocab", "merges", "special", "chat_"))]
        return {
            "teacher.config": digest([self.folder / "config.json"]),
            "teacher.weights": digest(self.weight_files),
            "tokenizer": digest(tokenizer),
        }


def locate(config: TeacherConfig) -> Source:
    """Find the folder of ``teacher.model`` and read its small files. May convert the demo, or download from the hub.

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
    """The tokenizer of ``teacher.model`` if it is on this machine, else None. Nothing is converted or downloaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            demo.cached() if model == "demo" else Path(model).expanduser() if Path(model).is_dir() else model,
            revision=revision,
            local_files_only=True,
        )
    except Exception:  # transformers raises OSError, ValueError and its dependencies' own
        return None


def _resolve(config: TeacherConfig) -> Path:
    if config.model == "demo":
        return demo.folder()
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
