"""What several tests need: small models, launching the command line, and looking at a store without distill."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

WORDS = topics["assert"].split()
_COMMON = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 48,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_COMMON, "tie_word_embeddings": False}),
    "qwen3": ("qwen3", {**_COMMON, "head_dim": 32, "tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {**_COMMON, "head_dim": 32, "sliding_window": 7}),
    "gemma3_softcapped": (
        "gemma3_text",
        {**_COMMON, "head_dim": 32, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 30.0},
    ),
    "gpt2": ("gpt2", {"vocab_size": 1000, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 1024}),
    "mixtral": ("mixtral", {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3": ("phi3", _COMMON),
    "longrope": ("phi3", {**_COMMON, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 48}),
    "dynamic_ntk": (
        "llama",
        {
            **_COMMON,
            "max_position_embeddings": 48,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
    "gpt_neox": ("gpt_neox", {**_COMMON, "tie_word_embeddings": False}),
    "cohere": ("cohere", {**_COMMON, "logit_scale": 0.25}),
    "opt": ("opt", {**_COMMON, "ffn_dim": 128, "word_embed_proj_dim": 32}),
}
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
_TOWER |= {"image_size": 56, "patch_size": 14}
_QWEN_TOWER = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
_MROPE = {"rope_type": "default", "rope_theta": 1e4}
_IDS = {"image_token_id": 999, "video_token_id": 998, "image_token_index": 999}
MULTIMODAL: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral3": (
        "mistral3",
        {"text_config": {**_COMMON, "model_type": "mistral"}, "vision_config": {**_TOWER, "model_type": "pixtral"}},
    ),
    "llava": (
        "llava",
        {
            "text_config": {**_COMMON, "model_type": "llama"},
            "vision_config": {**_TOWER, "model_type": "clip_vision_model"},
        },
    ),
    "gemma3_vision": (
        "gemma3",
        {
            "text_config": {**_COMMON, "head_dim": 32, "sliding_window": 7},
            "vision_config": {**_TOWER, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
        },
    ),
    "qwen3_vl": (
        "qwen3_vl",
        {
            "text_config": {**_COMMON, "head_dim": 32, "rope_parameters": {**_MROPE, "mrope_section": [6, 5, 5]}},
            "vision_config": {**_QWEN_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1, 2]},
            "tie_word_embeddings": True,
        },
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {
            "text_config": {**_COMMON, "rope_parameters": {**_MROPE, "mrope_section": [2, 3, 3]}},
            "vision_config": {**_QWEN_TOWER, "fullatt_block_indexes": [1]},
        },
    ),
    "glm4v_moe": (
        "glm4v_moe",
        {
            "text_config": {
                **_COMMON,
                "head_dim": 16,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "first_k_dense_replace": 1,
                "rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5},
            },
            "vision_config": _QWEN_TOWER,
        },
    ),
}
"""Models with a tower for images. It has as many layers as the language model, which must not be mistaken for it."""

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(chat: bool = False, bos: bool = False, declared: bool = True) -> Any:
    """A byte-level tokenizer of 262 tokens, made here. declared: the chat's special tokens are said to be special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(specials + alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|end|>"] if declared else [],
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(name: str, **changes: Any) -> Any:
    """A random float32 model of a kind in MODELS or MULTIMODAL, with logits that are far from uniform.

    changes: of its language model's configuration
    """
    from transformers import CONFIG_MAPPING

    from distill.teacher.source import auto_class

    kind, settings = (MODELS | MULTIMODAL)[name]
    if "text_config" in settings:
        settings = {**settings, **_IDS, "text_config": {**settings["text_config"], **changes}}
    else:
        settings = {**settings, **changes}
    config = CONFIG_MAPPING[kind](**settings)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.1)
            else:
                weight.mul_(5.0)
    return model.eval()


def save_model(name: str, folder: Path, chat: bool = False, bos: bool = False, **changes: Any) -> Path:
    """Save build_model(name) and a tokenizer as a model's folder."""
    build_model(name, **changes).save_pretrained(folder)
    make_tokenizer(chat, bos).save_pretrained(folder)
    return folder


def environment() -> dict[str, str]:
    """The environment of a child process: no hub, one thread, and this checkout."""
    root = str(Path(__file__).parent.parent)
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": root}


def command(workers: int | None, arguments: Sequence[str]) -> list[str]:
    """The command line of distill.generate; without torchrun where `workers` is None."""
    if workers is None:
        return [sys.executable, "-m", "distill.generate", *arguments]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(workers)]
    return [*launcher, "-m", "distill.generate", *arguments]


_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["datasets", "transformers.modeling_utils", "distill.teacher.prepare", "distill.teacher.summary"]
)


def _main(folder: Path, arguments: Sequence[str], variables: dict[str, str], consoles: tuple[str, str]) -> None:
    os.chdir(folder)
    os.environ.update(variables)
    for descriptor, console in enumerate(consoles, start=1):
        os.dup2(os.open(console, os.O_WRONLY), descriptor)
    from distill.generate import main

    sys.exit(main(arguments))


def generate(
    folder: Path, *arguments: str, workers: int | None = None, timeout: float = 240, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run distill.generate in `folder`, to its end. A time-out here means that the workers have a deadlock.

    Without torchrun it is forked from a process that has imported what takes long, before it sees `variables`.
    """
    if workers is not None:
        return subprocess.run(
            command(workers, arguments), cwd=folder, env={**environment(), **variables}, capture_output=True, text=True,
            timeout=timeout, check=False,
        )  # fmt: skip
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        process = _SERVER.Process(
            target=_main, args=(folder, arguments, {**environment(), **variables}, (out.name, err.name))
        )
        with mock.patch.dict(os.environ, environment()):
            process.start()
        process.join(timeout)
        assert process.exitcode is not None, err.read()
        return subprocess.CompletedProcess(command(None, arguments), process.exitcode, out.read(), err.read())


def generate_here(folder: Path, *arguments: str, models: dict[str, Any] | None = None) -> Path:
    """What distill.generate does, by one worker, in this process. Returns the path of the store, which is in `folder`.

    models: keeps teachers that are loaded, by the name of their folder
    """
    from distill.config.generate import GenerateConfig
    from distill.run.board import Board
    from distill.run.grid import Grid
    from distill.run.watch import Watch
    from distill.settings import load as load_settings
    from distill.teacher.loading import load
    from distill.teacher.model import Teacher
    from distill.teacher.prepare import find, plan_job
    from distill.teacher.worker import Worker

    config = load_settings(GenerateConfig, [*arguments, f"log_dir={folder}"])
    device, grid, board = torch.device("cpu"), Grid(), Board(torch.distributed.HashStore())
    source, needs = find(config, device)
    board.note("free memory of 0", str(1 << 40))
    job = plan_job(config, grid, board, source, needs, device)
    if job is not None:
        models = {} if models is None else models
        if config.teacher.model not in models:
            model, share = load(source, device, job.placement, needs, None, folder / "offload")
            models[config.teacher.model] = Teacher(model, device, share)
        watch = Watch(board, grid, 600.0, lambda error: None)
        Worker(config, job.store, models[config.teacher.model], board, watch, len(job.missing), job.missing).work()
        job.store.mark_complete()
    return Path(config.store.path)


def two_workers(worker: Callable[..., None], *arguments: Any) -> None:
    """Run `worker(*arguments, rank)` in two processes, each of which has to end well."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([worker.__module__])
    workers = [context.Process(target=worker, args=(*arguments, rank)) for rank in range(2)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(120)
        assert process.exitcode == 0


def wait_for(happened: Callable[[], object], said: Callable[[], object] = str, seconds: float = 120) -> None:
    """Until `happened` returns something true; fails after so many seconds, with what `said` returns."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, said()
        time.sleep(0.05)


def has(file: Path, text: str) -> bool:
    """Whether there is such a file, and this text in it."""
    return file.is_file() and text in file.read_text()


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own at `folder`, so large ("900k"). Skips the test where mounting is not permitted."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, option: str) -> None:
    """Change a `small_disk`: "size=64m", "ro", "rw". Read-only is refused for as long as a file is being written."""
    again = ["mount", "-o", f"remount,{option}", str(folder)]
    wait_for(lambda: subprocess.run(again, capture_output=True, check=False).returncode == 0, seconds=20)


def blocks_logged(folder: Path) -> list[int]:
    """The blocks that the workers' logs in `folder` say were committed, ascending, with repetitions."""
    logs = "".join(log.read_text() for log in sorted((folder / "logs").glob("worker_*.log")))
    return sorted(int(block) for block in re.findall(r"block (\d+) is committed", logs))


def tree(folder: Path) -> dict[str, str]:
    """Every file below `folder`, with a hash of its bytes."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def open_raw(store: Path, name: str) -> Any:
    """An array of a store as numpy, read by tensorstore, which shares no code with zarr-python."""
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store / name)}}
    return tensorstore.open(spec).result().read().result()


def planned_store(
    path: Path, layout: Any, index: Any = None, planned: Sequence[str] = ("tokens",), k: int = 2, **attributes: Any
) -> Any:
    """A store with the sample table of a Plan, not published: its tokens are to be written."""
    from distill.store.writable import WritableStore

    found = {"method": "topk", "k": k, "temperatures": [1.0], "vocab_size": 1000}
    found |= {"num_tokens": int(layout.lengths.sum())}
    found |= {"config": {}, "fingerprint": "made up"}
    found |= {"block_rows": layout.block_rows, "num_blocks": layout.num_blocks, "num_samples": len(layout.lengths)}
    store = WritableStore.create(str(path), {}, found | attributes, planned, "portable")
    store.write_all("sample_start", layout.starts)
    store.write_all("sample_length", layout.lengths)
    store.write_all("sample_index", np.arange(len(layout.lengths)) if index is None else index)
    return store


def reseal(store: Path, **changes: Any) -> None:
    """Change attributes of a store, as if it had been made so."""
    from distill.store.metadata import sealed

    for file in (store / "zarr.json", store / "commits" / "zarr.json"):
        document = json.loads(file.read_text())
        document["attributes"] = sealed(document["attributes"] | changes)
        file.write_text(json.dumps(document))


def masked_store(store: Path, folder: Path, trained: Sequence[int]) -> Path:
    """A copy of a store without a loss mask, with one: true at the first token of the samples `trained` only."""
    from distill.store.schema import CAPTURED
    from distill.store.store import Store
    from distill.store.writable import WritableStore

    old = Store.existing(str(store), {})
    mask = np.zeros(old.num_blocks * old.block_rows, bool)
    mask[old.read_all("sample_start")[list(trained)]] = True
    new = WritableStore.create(str(folder), {}, old.attributes, planned=["tokens", "loss_mask"], codec="portable")
    for name in ("sample_start", "sample_length", "sample_index"):
        new.write_all(name, old.read_all(name))
    for block in range(old.num_blocks):
        rows = block * old.block_rows, (block + 1) * old.block_rows
        new.write_rows("tokens", block, old.read_rows("tokens", *rows))
        new.write_rows("loss_mask", block, mask[slice(*rows)])
    new.publish()
    for block, tokens in enumerate(old.tokens_per_block()):
        for name, values in old.read_arrays(CAPTURED, block * old.block_rows, (block + 1) * old.block_rows).items():
            new.write_rows(name, block, values)
        new.commit(block, int(tokens))
    new.mark_complete()
    return folder
