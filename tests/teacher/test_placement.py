"""How a teacher is spread: the decision, its arithmetic, and what is refused, from numbers alone."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from distill.config.generate import GenerateConfig, ParallelConfig, TeacherConfig
from distill.errors import ConfigError, TeacherError
from distill.run.grid import Grid
from distill.settings import load
from distill.teacher.placement import Needs, Placement, decide
from distill.teacher.source import Source

GIB = 1 << 30
LLAMA_70B = Needs(
    architecture="LlamaForCausalLM",
    parameters=131 * GIB,
    activations=6 * GIB,
    layers=80,
    heads=(64, 8),
    vocab_size=128256,
    tensor_plan={"lm_head": "colwise"},
)
LLAMA_8B = replace(LLAMA_70B, parameters=15 * GIB, activations=4 * GIB, layers=32, heads=(32, 8))


def node(workers: int) -> Grid:
    return Grid(world_size=workers, local_world_size=workers, launched=True)


@pytest.mark.parametrize(
    ("needs", "workers", "free", "expected"),
    [
        (LLAMA_8B, 1, 40, Placement()),
        (LLAMA_8B, 8, 24, Placement()),
        (LLAMA_8B, 8, 22, Placement("tensor", 2)),
        (LLAMA_70B, 8, 80, Placement("tensor", 4)),
        (LLAMA_70B, 8, 141, Placement("tensor", 2)),
        (LLAMA_70B, 4, 80, Placement("tensor", 4)),
        (LLAMA_70B, 8, 40, Placement("tensor", 8)),
        (replace(LLAMA_70B, heads=(64, 1)), 8, 80, Placement("pipeline", 4)),
        (replace(LLAMA_70B, tensor_plan={}), 8, 80, Placement("pipeline", 4)),
        (replace(LLAMA_70B, heads=(12, 6)), 4, 141, Placement("tensor", 2)),
    ],
)
def test_auto_takes_the_fewest_devices(needs: Needs, workers: int, free: float, expected: Placement) -> None:
    assert decide(ParallelConfig(), needs, int(free * GIB), node(workers), workers) == expected


def test_auto_uses_the_devices_of_a_single_worker() -> None:
    assert decide(ParallelConfig(), LLAMA_70B, 80 * GIB, node(1), 4) == Placement("device_map", 3)
    assert decide(ParallelConfig(shard_size=2), LLAMA_70B, 141 * GIB, node(2), 4) == Placement("device_map", 2)


def test_auto_with_a_degree_and_a_mode_without_one() -> None:
    assert decide(ParallelConfig(shard_size=4), LLAMA_8B, 80 * GIB, node(8), 8) == Placement("tensor", 4)
    assert decide(ParallelConfig(mode="tensor"), LLAMA_8B, 80 * GIB, node(8), 8) == Placement("tensor", 2)
    assert decide(ParallelConfig(mode="pipeline"), LLAMA_70B, 80 * GIB, node(8), 8) == Placement("pipeline", 4)
    assert decide(ParallelConfig(mode="device_map"), LLAMA_70B, 80 * GIB, node(2), 8) == Placement("device_map", 4)


REFUSED: dict[str, tuple[ParallelConfig, dict[str, Any], int, int, str]] = {
    "degree": (
        ParallelConfig("tensor", 3),
        {},
        8,
        8,
        "found 3: 2 replicas x 3 workers = 6, 2 left",
    ),
    "one worker": (ParallelConfig("pipeline"), {}, 1, 1, "expected a divisor of the 1 workers of a node, found 2"),
    "heads": (
        ParallelConfig("tensor", 4),
        {"heads": (6, 6)},
        4,
        4,
        "attention heads that 4 divides, found 6",
    ),
    "kv heads": (ParallelConfig("tensor", 4), {"heads": (8, 2)}, 4, 4, "key-value heads that 4 divides, found 2"),
    "no plan": (ParallelConfig("tensor", 2), {"tensor_plan": {}}, 2, 2, "LlamaForCausalLM has no plan for tensor"),
    "layers": (ParallelConfig("pipeline", 4), {"layers": 3}, 4, 4, "expected at least 4 layers, found 3"),
    "unknown layers": (ParallelConfig("pipeline", 4), {"layers": 0}, 4, 4, "not clear which parts"),
    "quantised": (
        ParallelConfig("tensor", 2),
        {"quantization": "gptq"},
        2,
        2,
        "quantised .gptq., which",
    ),
    "devices": (ParallelConfig("device_map", 2), {}, 4, 4, "4 workers x 2 devices = 8, found 4: start fewer workers"),
    "shared": (ParallelConfig("tensor", 2), {}, 4, 2, "expected a device for each of the node's 4 workers, found 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    config, changes, workers, devices, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        decide(config, replace(LLAMA_8B, **changes), 80 * GIB, node(workers), devices)


def test_what_fits_nowhere_is_refused_with_the_arithmetic() -> None:
    message = r"131.0 GiB of parameters x 1.1 / 2 \+ 6.0 of activations = 78.1 GiB a device, of 0.9 x 80.0 GiB free"
    with pytest.raises(TeacherError, match=message):
        decide(ParallelConfig(), LLAMA_70B, 80 * GIB, node(2), 2)
    with pytest.raises(TeacherError, match="does not fit"):
        decide(ParallelConfig(mode="data"), LLAMA_70B, 80 * GIB, node(8), 8)
    # a tight fit is the user's to choose
    assert decide(ParallelConfig("tensor", 2), LLAMA_70B, 80 * GIB, node(2), 2) == Placement("tensor", 2)
    assert decide(ParallelConfig("device_map"), LLAMA_70B, 80 * GIB, node(1), 1) == Placement("device_map", 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["shard_size=0"], "parallel.shard_size: expected auto or at least 1, found 0"),
        (["shard_size=two"], "expected auto or at least 1, found 'two'"),
        (["mode=data", "shard_size=2"], "expected 1 with parallel.mode=data, found 2"),
        (["max_memory=1GiB"], "expected parallel.mode=device_map with it, found auto"),
    ],
)
def test_settings_that_cannot_be(values: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(GenerateConfig, [f"parallel.{value}" for value in values])


def source_of(config: object) -> Source:
    return Source(Path("nowhere"), TeacherConfig(), config, SimpleNamespace())


def test_needs_of_a_70b_model() -> None:
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    needs = Needs.of(source_of(config), torch.bfloat16, 16384, GIB)
    assert round(needs.parameters / GIB, 1) == 131.4
    assert needs.heads == (64, 8)
    assert needs.layers == 80
    assert needs.tensor_plan["lm_head"] == "colwise"
    assert needs.tensor_plan["model.embed_tokens"] == "embedding_rowwise"
    assert needs.refusal("tensor", 8) is None
    assert str(needs.refusal("tensor", 16)).startswith("expected key-value heads that 16 divides, found 8; pipeline")


def test_a_model_that_cannot_be_built_without_weights_is_not_cut(tmp_path: Path) -> None:
    """As with code that comes with a model: transformers' own classes do not know this configuration."""
    text = SimpleNamespace(vocab_size=1000, hidden_size=64, num_attention_heads=4)
    config = SimpleNamespace(architectures=["OddForCausalLM"], get_text_config=lambda: text, vocab_size=1000)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    needs = Needs.of(replace(source_of(config), folder=tmp_path), torch.float32, 1024, GIB)
    assert needs.parameters == 1000
    assert decide(ParallelConfig(), needs, 80 * GIB, node(2), 2) == Placement()
    assert "not clear which parts of OddForCausalLM" in str(needs.refusal("pipeline", 2))
    assert "no plan" in str(needs.refusal("tensor", 2))


def test_models_without_a_plan_and_quantised_checkpoints(tmp_path: Path) -> None:
    gpt2 = Needs.of(source_of(transformers.GPT2Config(n_layer=2)), torch.float32, 1024, GIB)
    assert gpt2.tensor_plan == {}
    assert "no plan" in str(gpt2.refusal("tensor", 2))
    assert gpt2.refusal("pipeline", 2) is None
    config = transformers.LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    quantised = Needs.of(replace(source_of(config), folder=tmp_path), torch.float16, 1024, GIB)
    assert quantised.quantization == "gptq"
    assert quantised.parameters == 1000


def test_the_table_of_the_docs_is_what_auto_decides() -> None:
    """docs/parallelism.md: which way for which teacher and node."""
    sizes = {
        "7B": (32000, 4096, 11008, 32, 32, 32),
        "34B": (32000, 8192, 22016, 48, 64, 8),
        "70B": (128256, 8192, 28672, 80, 64, 8),
        "405B": (128256, 16384, 53248, 126, 128, 8),
    }
    names = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ]
    page = (Path(__file__).parent.parent.parent / "docs" / "parallelism.md").read_text()
    rows = [
        row.strip("| ").split(" | ") for row in page.splitlines() if row.startswith(tuple(f"| {s} |" for s in sizes))
    ]
    assert len(rows) == 9
    for teacher, memory, *cells in rows:
        values = dict(zip(names, sizes[teacher], strict=True))
        config = transformers.LlamaConfig(**values, tie_word_embeddings=False)
        needs = Needs.of(source_of(config), torch.bfloat16, 16384, GIB)
        for free in (int(word) for word in memory.replace(",", "").split() if word.isdigit()):
            for workers, cell in zip((1, 2, 4, 8), cells, strict=True):
                try:
                    found = decide(ParallelConfig(), needs, free * GIB, node(workers), workers)
                except TeacherError:
                    assert cell == "-", (teacher, free, workers)
                    continue
                way = {"data": "D", "tensor": f"T{found.shard_size}"}[found.mode]
                copies = workers // found.shard_size
                assert cell == way + f" x{copies}" * (copies > 1), (teacher, free, workers)
