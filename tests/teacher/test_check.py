"""Models that see later tokens are refused; samples of other lengths do not change what a model says of one."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from distill.data.plan import batches
from distill.errors import TeacherError
from distill.teacher.check import edges, probe, probe_lengths, relative_difference, rope_switch, sees_later
from distill.teacher.model import Teacher
from distill.teacher.share import Share
from tests.support import build_model

CPU = torch.device("cpu")
SMALL = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}


def bidirectional(kind: str, dtype: torch.dtype) -> Any:
    heads = {"n_head": 4, "d_model": 64, "n_layer": 3, "d_inner": 128} if kind == "xlnet" else SMALL
    config = CONFIG_MAPPING[kind](**{**heads, "vocab_size": 1000, "num_attention_heads": 4})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlnet"])
def test_models_that_see_later_tokens_are_refused(kind: str) -> None:
    message = "teacher.model: expected a causal language model, found .*, in which later tokens change the logits"
    with pytest.raises(TeacherError, match=message):
        Teacher(bidirectional(kind, torch.float32), CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_hides_no_leak(dtype: torch.dtype) -> None:
    model = build_model("llama").to(dtype)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False  # what the kernels without a mask go by
    with pytest.raises(TeacherError, match="later tokens change"):
        Teacher(model, CPU)


def test_a_model_that_wants_more_than_ids_is_refused() -> None:
    model = build_model("llama")

    def forward(pixels: Any, **inputs: Any) -> Any:
        raise AssertionError

    model.forward = forward
    with pytest.raises(TeacherError, match="token ids alone, found LlamaForCausalLM, where they lead to TypeError: "):
        Teacher(model, CPU)


def leaking_beyond(length: int) -> Any:
    """A model whose tokens see the one that follows in inputs longer than `length`."""
    model = build_model("llama", sliding_window=length)
    own = model.model.forward

    def forward(input_ids: Any = None, **inputs: Any) -> Any:
        output = own(input_ids=input_ids, **inputs)
        if input_ids.shape[1] > length:
            hidden = output.last_hidden_state
            output.last_hidden_state = hidden + 0.1 * hidden.roll(-1, dims=1)
        return output

    model.model.forward = forward
    return model


def test_a_leak_beyond_an_edge_is_found_where_samples_get_there() -> None:
    Teacher(leaking_beyond(100), CPU, longest=100)
    with pytest.raises(TeacherError, match=r"samples of 117 tokens"):
        Teacher(leaking_beyond(100), CPU, longest=500)
    with pytest.raises(TeacherError, match=r"samples of 117 tokens"):
        Teacher(leaking_beyond(100), CPU, longest=500, max_tokens=130)


def test_all_workers_of_a_replica_refuse_together() -> None:
    class Other(Share):
        """Another worker of the replica has seen a leak."""

        def agree(self, good: bool) -> bool:
            return False

    with pytest.raises(TeacherError, match="later tokens change"):
        Teacher(build_model("llama"), CPU, Other())


@pytest.mark.parametrize("often", [0.01, 0.1, 0.5])
def test_noise_is_no_leak(often: float) -> None:
    """Rounding everywhere, and rows, so often, that are quite different since they take other experts; twenty runs."""
    model = build_model("mixtral", sliding_window=20).bfloat16()
    own = model.model.forward
    generator = torch.Generator().manual_seed(0)

    def forward(**inputs: Any) -> Any:
        output = own(**inputs)
        hidden = output.last_hidden_state
        noise = torch.randn(hidden.shape, generator=generator) * hidden.float().std()
        flipped = torch.rand(hidden.shape[:2], generator=generator) < often
        output.last_hidden_state = (hidden + noise * torch.where(flipped, 1.0, 0.02)[..., None]).to(hidden.dtype)
        return output

    for _ in range(20):
        model.model.forward = forward
        Teacher(model, CPU, longest=64)


@pytest.mark.parametrize("ahead", [1, 3, 12, 20, 39])
def test_what_is_compared_is_before_the_change(ahead: int) -> None:
    """A model whose rows see so many tokens ahead."""
    seen: list[Any] = []

    def logits_of(samples: Any, rows: list[int], ahead: int = ahead) -> torch.Tensor:
        seen.append((samples, rows))
        sums = [[float(sample[i : i + ahead + 1].sum()) for i in range(len(sample))] for sample in samples]
        return torch.tensor([[value, 0.5, 0.1] for part in sums for value in part])[rows]

    samples = probe([40, 8, 40], 1000)
    assert sees_later(logits_of, samples, 1000, 1e-4) > 0
    (first, rows), (second, _) = seen
    differing = np.flatnonzero(np.concatenate(first) != np.concatenate(second))
    assert differing.tolist() == [*range(27, 40), *range(75, 88)]
    assert rows == [*range(40, 48), 26, 74]
    assert sees_later(lambda samples, rows: logits_of(samples, rows, 0), samples, 1000, 1e-4) == 0.0


def test_masked_ids_are_compared_apart() -> None:
    logits = torch.tensor([[1.0, 2.0, torch.finfo(torch.bfloat16).min]])
    assert relative_difference(logits, torch.tensor([[1.0, 2.5, -torch.inf]])) == 0.25
    assert relative_difference(logits, torch.tensor([[1.0, 2.0, 3.0]])) == float("inf")


def test_where_models_change() -> None:
    plain = CONFIG_MAPPING["llama"]()
    assert (rope_switch(plain), edges(plain), probe_lengths(plain, 5000, 16384)) == (None, [], [[12, 8, 3]])
    mistral = CONFIG_MAPPING["mistral"](sliding_window=4096)
    assert probe_lengths(mistral, 4000, 16384) == [[12, 8, 3]]
    assert probe_lengths(mistral, 5000, 16384) == [[12, 8, 3], [4113, 4108]]
    assert probe_lengths(mistral, 4100, 4096) == [[12, 8, 3], [4100]]
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 2048}
    assert edges(CONFIG_MAPPING["qwen3"](rope_parameters=yarn)) == [2048]
    assert rope_switch(CONFIG_MAPPING["qwen3"](rope_parameters=yarn)) is None
    assert 8192 in edges(CONFIG_MAPPING["llama4_text"]())
    gemma = CONFIG_MAPPING["gemma3_text"](sliding_window=512)
    assert edges(gemma) == [512]
    for name in ("longrope", "dynamic_ntk"):
        config = build_model(name).config
        assert (rope_switch(config), probe_lengths(config, 100, 400)[1]) == (48, [65, 65])
    longrope = build_model("longrope").config.rope_parameters
    layered = SimpleNamespace(rope_parameters={"full_attention": longrope})
    assert rope_switch(layered) == 48


@pytest.mark.parametrize("name", ["longrope", "dynamic_ntk"])
def test_a_batch_changes_no_sample_where_frequencies_follow_the_length(name: str) -> None:
    """Short and long samples, in the order of a run, each beside a model that has seen only that sample."""
    lengths = np.array([30, 49, 48, 60, 47, 60, 64, 20, 35], np.int32)
    samples = [np.random.default_rng(i).integers(3, 1000, length).astype(np.int32) for i, length in enumerate(lengths)]
    teacher = Teacher(build_model(name), CPU, longest=64)
    assert teacher._sliced
    done = []
    for batch in [*(batch.tolist() for batch in batches(lengths, 400, teacher.rope_switch)), [0], [3, 5]]:
        found = torch.cat([logits.clone() for logits in teacher.logits([samples[i] for i in batch])])
        for i, part in zip(batch, found.split([lengths[i] for i in batch]), strict=True):
            with torch.inference_mode():
                fresh = build_model(name)
                expected = fresh(input_ids=torch.from_numpy(samples[i].astype(np.int64))[None]).logits[0]
            torch.testing.assert_close(part, expected, atol=2e-5, rtol=1e-5)
        done += [batch]
    assert done[:3] == [[6], [3, 5], [1]]
    assert len(done) == 3 + 1 + 2
