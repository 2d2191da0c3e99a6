"""A LoRA adapter's folder: which base model it belongs to, and how it is merged into that model's weights.

`peft` does the merging, once, when the model is loaded. What runs then is a plain model of transformers.
"""

import importlib.util
import json
import re
import warnings
from pathlib import Path
from typing import Any

from distill.errors import TeacherError
from distill.store.fingerprint import digest, text_digest

CONFIG = "adapter_config.json"
UNMERGED = {"adapter_kwargs": {"subfolder": "no adapter"}}
"""For from_pretrained: transformers leaves an adapter beside a model alone; it would load it, and not merge it."""

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_EMBEDDING = re.compile(r"\b(embed_tokens|embed_in|embed_out|word_embeddings|wte|lm_head)\b.*\bweight$")


def settings_of(folder: Path) -> dict[str, Any] | None:
    """What the adapter's configuration says; None where the folder has no adapter.

    Raises TeacherError for an adapter that cannot be merged, or without weights, and where peft is not installed.
    """
    if not (folder / CONFIG).is_file():
        return None
    try:
        settings: dict[str, Any] = dict(json.loads((folder / CONFIG).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise TeacherError(f"teacher.model: cannot read {folder / CONFIG}: {error}") from error
    if settings.get("peft_type") != "LORA" or settings.get("task_type") not in (None, "CAUSAL_LM"):
        found = f"{settings.get('peft_type')} for {settings.get('task_type')}"
        raise TeacherError(
            f"teacher.model: expected a LoRA adapter of a causal language model in {folder}, found {found}"
        )
    if not _weights(folder):
        raise TeacherError(f"teacher.model: expected the adapter's weights ({_WEIGHTS[0]}), found none in {folder}")
    if importlib.util.find_spec("peft") is None:
        raise TeacherError(
            f"teacher.model: the adapter in {folder} needs the package peft: pip install 'distill[lora]'"
        )
    return settings


def fingerprint(folder: Path, settings: dict[str, Any]) -> str:
    """A hash of the adapter's settings and weights, independent of where it and its base are."""
    lasting = {name: value for name, value in settings.items() if name != "base_model_name_or_path"}
    return text_digest(json.dumps(lasting, sort_keys=True) + digest(_weights(folder)))


def check(folder: Path, model_config: Any) -> None:
    """Raise TeacherError where the base is quantised, or has another vocabulary than the adapter was trained with."""
    if getattr(model_config, "quantization_config", None) is not None:
        raise TeacherError(
            f"teacher.model: expected a base that is not quantised for the adapter in {folder}: merging would round; "
            "name the full-precision base in its adapter_config.json (base_model_name_or_path)"
        )
    expected = int(model_config.get_text_config().vocab_size)
    for name, rows in _rows(folder).items():
        if _EMBEDDING.search(name) and rows != expected:
            raise TeacherError(
                f"teacher.model: the adapter in {folder} was trained with a vocabulary of {rows:,}, its base has "
                f"{expected:,}: resize the base, merge the adapter with peft, and give the folder of the result"
            )


def merge(model: Any, folder: Path) -> Any:
    """The base `model` with the adapter merged into its weights: of the same class. The base is changed.

    Raises TeacherError where the adapter does not fit the base, where merging would change more than the adapter does,
    and where weights are offloaded: peft would write copies of them into the working directory.
    """
    from peft import PeftModel

    text = model.config.get_text_config()
    if {"cpu", "disk"} & {*(getattr(model, "hf_device_map", None) or {}).values()}:
        raise TeacherError(
            f"teacher.model: expected room for the whole base on the devices, to merge the adapter in {folder}, found "
            "a part offloaded; give more devices or memory, or merge it once with peft (merge_and_unload, "
            "save_pretrained) and give that folder"
        )
    with warnings.catch_warnings():  # peft's own, of what is deprecated; of what is missing, which is checked below
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(model, str(folder))
        _check_fit(adapted, folder)
        ends = model.get_input_embeddings(), model.get_output_embeddings()
        if text.tie_word_embeddings and any(hasattr(end, "base_layer") for end in ends):
            raise TeacherError(
                f"teacher.model: the adapter in {folder} changes the embedding or the output head, which are one "
                "tensor in its base: merged, it would change both"
            )
        merged = adapted.merge_and_unload()
    if text.tie_word_embeddings and merged.get_input_embeddings().weight is not merged.get_output_embeddings().weight:
        merged.config.tie_word_embeddings = text.tie_word_embeddings = False  # the adapter has its own copy of one
    return merged


def _check_fit(adapted: Any, folder: Path) -> None:
    """Raise TeacherError where weights of the adapter have no place in the model, or places have no weights."""
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    places = {name for name in get_peft_model_state_dict(adapted, save_embedding_layers=False) if "lora_" in name}
    weights = {name for name in load_peft_weights(str(folder), device="cpu") if "lora_" in name}
    if places != weights:
        raise TeacherError(
            f"teacher.model: expected an adapter that fits its base in {folder}, found {len(weights - places)} weights "
            f"without a place and {len(places - weights)} places without a weight ({min(places ^ weights)})"
        )


def _weights(folder: Path) -> list[Path]:
    return [folder / name for name in _WEIGHTS if (folder / name).is_file()][:1]


def _rows(folder: Path) -> dict[str, int]:
    """The rows of each weight of the adapter, where its file tells."""
    from safetensors import safe_open

    if not (folder / _WEIGHTS[0]).is_file():
        return {}
    with safe_open(folder / _WEIGHTS[0], "np") as file:
        return {name: int(file.get_slice(name).get_shape()[0]) for name in file.keys()}  # noqa: SIM118 (no mapping)
