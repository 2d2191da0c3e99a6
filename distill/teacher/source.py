"""Find the teacher: its folder on this machine, its configuration and its tokenizer. No weights are loaded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from distill.config.generate import TeacherConfig
from distill.errors import TeacherError, UserError, first_line
from distill.settings import expand
from distill.store.fingerprint import digest, text_digest
from distill.teacher import adapter, demo

_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.py"]
_HUB_FILES = [*_SMALL_FILES, "*.safetensors"]


@dataclass(frozen=True)
class Source:
    """A model's folder, with its configuration and its tokenizer.

    adapter:          the folder of the LoRA adapter that is to be merged into the model, if there is one
    tokenizer_folder: where the tokenizer is
    """

    folder: Path
    config: TeacherConfig
    model_config: Any
    tokenizer: Any
    adapter: Path | None = None
    tokenizer_folder: Path = Path()

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
        """The longest sample the model was made for, in tokens; None where its configuration does not say.

        A rope factor stretches the length of pre-training, and max_position_embeddings may be the one or the other.
        With a rope for each type of layer, only those count that name the length of pre-training.
        """
        length = getattr(self.text_config, "max_position_embeddings", None)
        if not length or length <= 0:
            return None
        rope = getattr(self.text_config, "rope_parameters", None) or {}
        by_layer = [part for part in rope.values() if isinstance(part, Mapping)]
        stretched = [
            part["factor"] * (part.get("original_max_position_embeddings") or (0 if by_layer else length))
            for part in by_layer or [rope]
            if part.get("factor")
        ]
        return int(max([length, *stretched]))

    @cached_property
    def weight_files(self) -> list[Path]:
        """The files that hold the weights, without those of an adapter."""
        return _weight_files(self.folder)

    @cached_property
    def vocabulary(self) -> dict[str, Any]:
        """What a student's tokenizer is compared with: the number of tokens, and a hash of the (token, id) pairs."""
        pairs = sorted(self.tokenizer.get_vocab().items())
        return {"vocab_size": len(self.tokenizer), "vocab_digest": text_digest(json.dumps(pairs))}

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What identifies the model and the tokenizer, independent of where the folder is."""
        files = sorted(file for file in self.tokenizer_folder.iterdir() if file.is_file())
        tokenizer = [file for file in files if file.name.startswith(("token", "vocab", "merges", "special", "chat_"))]
        found = {
            "teacher.config": digest([self.folder / "config.json"]),
            "teacher.weights": digest(self.weight_files),
            "tokenizer": digest(tokenizer),
        }
        if self.adapter is not None:
            found["teacher.adapter"] = adapter.fingerprint(self.adapter, adapter.settings_of(self.adapter) or {})
        code = sorted({*self.folder.rglob("*.py"), *self.tokenizer_folder.rglob("*.py")})
        if self.config.trust_remote_code and code:
            found["teacher.code"] = digest(code)
        return found


def locate(config: TeacherConfig, weights: bool = True) -> Source:
    """Find the folder of ``teacher.model`` and read its small files. May convert the demo, or download from the hub.

    weights: whether its weights have to be there
    Raises TeacherError for a folder or id that is missing, not a causal language model, or without a tokenizer.
    """
    from transformers import AutoConfig, AutoTokenizer

    named = demo.folder() if config.model == "demo" else _resolve(config.model, config.revision, weights=weights)
    folder, with_tokenizer, adapted = _parts(named)
    if not (folder / "config.json").is_file():
        raise TeacherError(f"teacher.model: expected a model's folder, found no config.json in {folder}")
    if weights and not _weight_files(folder):
        raise TeacherError(f"teacher.model: expected weights (*.safetensors), found none in {folder}")
    try:
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        raise TeacherError(f"teacher.model: cannot read {folder / 'config.json'}: {_why(error)}") from error
    if auto_class(model_config) is None:
        raise TeacherError(
            f"teacher.model: expected a causal language model, found {model_config.model_type} in {folder}"
        )
    if adapted is not None:
        adapter.check(adapted, model_config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(with_tokenizer, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        raise TeacherError(f"teacher.model: no usable tokenizer in {with_tokenizer}: {_why(error)}") from error
    return Source(folder, config, model_config, tokenizer, adapted, with_tokenizer)


def _why(error: BaseException) -> str:
    """What transformers says, in one line and with our key."""
    if "trust_remote_code=True" in str(error):
        return "it comes with Python code of its own; read it, then set teacher.trust_remote_code=true"
    return first_line(error)


def auto_class(model_config: Any) -> Any:
    """transformers' class that loads such a model; None where it is no model that continues text.

    It is AutoModelForCausalLM, or AutoModelForMultimodalLM for a type that exists only with images or sounds.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
    from transformers.models.auto import modeling_auto as auto

    kind, own_code = model_config.model_type, getattr(model_config, "auto_map", None) or {}
    if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in own_code:
        return AutoModelForCausalLM
    encodes = any(
        getattr(config, "is_encoder_decoder", False) for config in (model_config, model_config.get_text_config())
    )
    return None if encodes or kind not in auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES else AutoModelForMultimodalLM


def local_tokenizer(model: str, revision: str | None) -> Any:
    """The tokenizer of ``teacher.model`` if it is on this machine, else None. Nothing is converted or downloaded."""
    from transformers import AutoTokenizer

    try:
        named = demo.cached() if model == "demo" else _resolve(model, revision, download=False)
        folder = _parts(named, download=False)[1]  # unless it is told not to run code there, transformers asks
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception:  # transformers raises OSError, ValueError and its dependencies' own
        return None


def _parts(named: Path, download: bool = True) -> tuple[Path, Path, Path | None]:
    """Where the model, its tokenizer and its adapter are: in one folder, or the adapter's base elsewhere.

    A folder with a whole model and an adapter beside it means the two together, as for transformers.
    """
    settings = adapter.settings_of(named)
    if settings is None:
        return named, named, None
    whole = (named / "config.json").is_file() and bool(_weight_files(named))
    base = named if whole else _base(named, settings, download)
    has_tokenizer = any((named / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    return base, named if has_tokenizer else base, named


def _base(named: Path, settings: Mapping[str, Any], download: bool) -> Path:
    """The folder of the adapter's base."""
    base = settings.get("base_model_name_or_path")
    if not base:
        raise TeacherError(f"teacher.model: expected base_model_name_or_path in {named / adapter.CONFIG}, found none")
    try:
        found = _resolve(expand(base, "base_model_name_or_path"), settings.get("revision"), download)
    except UserError as error:
        text = str(error).removeprefix("teacher.model: ")
        raise TeacherError(f"teacher.model: the base of the adapter in {named}: {text}") from error
    if (found / adapter.CONFIG).is_file():
        raise TeacherError(f"teacher.model: the base of the adapter in {named} is an adapter too: merge that one first")
    return found


def _weight_files(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and file.suffix in (".safetensors", ".bin") and not file.name.startswith("adapter_")
    )


def _resolve(model: str, revision: str | None, download: bool = True, weights: bool = True) -> Path:
    """The folder of a model that is a folder here, or is or will be in the hub's cache."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    looks_local = model.startswith(("/", "./", "../")) or model.count("/") > 1 or folder.exists()
    if looks_local:
        raise TeacherError(f"teacher.model: expected a Hugging Face id or a model's folder, found no folder {model}")
    from huggingface_hub import snapshot_download

    where: dict[str, Any] = {"revision": revision, "local_files_only": not download}
    try:
        found = Path(snapshot_download(model, allow_patterns=_HUB_FILES if weights else _SMALL_FILES, **where))
        if download and weights and not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(model, allow_patterns=[*_HUB_FILES, "*.bin"], **where))
        return found
    except Exception as error:  # the hub client has dozens, from validation to the network's
        raise TeacherError(
            f"teacher.model: {model} is neither a folder here nor to be had from the hub: {first_line(error)}"
        ) from error
