"""Packed samples do not see each other, whatever the attention kernel; models in which they would are refused."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import DistillationLoss, Learner, TeacherCache, collate
from distill.errors import ConfigError
from distill.reading.samples import Batch, empty_sample
from distill.student.packing import evaluating, pack
from tests.flash_attention import flash_attention
from tests.support import build_model


def samples_of(store: Path) -> tuple[TeacherCache, list[Any]]:
    """A long sample and many short ones: several rows, with several samples in most of them."""
    cache = TeacherCache(str(store))
    return cache, [cache[0], *[sample for sample in cache[:60] if len(sample["tokens"]) < 45]]


def gradients(learner: Learner, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    learner.zero_grad()
    total = sum(learner(batch) for batch in batches)
    total.backward()
    return total.item(), {name: w.grad.clone() for name, w in learner.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("kernel", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gemma3_softcapped", "gpt2", "mixtral", "cohere"])
def test_losses_and_gradients_are_those_of_the_samples_alone(name: str, kernel: str, small_store: Path) -> None:
    if (name, kernel) == ("gpt2", "flash_attention_2"):
        pytest.skip("transformers' gpt2 has no linear layers, by which it finds the dtype for this kernel")
    cache, samples = samples_of(small_store)
    loss = DistillationLoss(alpha=0.5)
    with flash_attention() as called:
        model = build_model(name, attn_implementation=kernel)
        assert model.config.use_cache  # which makes transformers ignore position_ids, where it is not turned off
        alone = gradients(Learner(model, loss, cache.temperatures), [collate([sample]) for sample in samples])
        called.clear()
        packed = gradients(Learner(model, loss, cache.temperatures, packed=True), [collate(samples)])
    assert called[-1:] == (["varlen"] if kernel == "flash_attention_2" else [])
    assert alone[0] == pytest.approx(packed[0], rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in alone[1].values())
    torch.testing.assert_close(alone[1], packed[1], rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize("one_row", [False, True])
def test_tokens_keep_their_targets(one_row: bool) -> None:
    lengths = [30, 7, 96, 1, 50, 46, 33, 33, 29, 2]
    samples = []
    for i, length in enumerate(lengths):
        tokens = 1000 * (i + 1) + torch.arange(length)  # each token tells whose it is, and where it stands
        about = tokens[:, None].float()
        samples.append({"sample": i, "tokens": tokens, "target_ids": tokens[:, None].repeat(1, 3)})
        samples[-1] |= {"target_logprobs": about.repeat(1, 3), "logsumexp": about, "tail_logprob": about}
    padded = collate(samples)
    padded["loss_mask"][0, 20:] = False  # the end of this sample teaches nothing
    batch = pack(padded, one_row)
    kept = [max(1, length - 1) for length in lengths]  # the last token of a sample predicts nothing
    kept[0] = 20
    assert batch["input_ids"].shape == ((1, sum(kept)) if one_row else (4, 95))
    mask, ids = batch["loss_mask"], batch["input_ids"]
    assert sorted(ids[mask].tolist()) == padded["input_ids"][padded["loss_mask"]].sort().values.tolist()
    assert batch["next_tokens"][mask].equal(ids[mask] + 1)
    assert batch["position_ids"][mask].equal(ids[mask] % 1000)
    for name in ("target_ids", "target_logprobs", "logsumexp", "tail_logprob"):
        assert (batch[name][mask] == ids[mask][:, None]).all()
    begins = batch["position_ids"] == 0
    together = ~begins[:, 1:] & mask[:, 1:]  # a sample is in one piece
    assert (ids[:, 1:] == ids[:, :-1] + 1)[together].all()


def test_an_empty_batch() -> None:
    batch = collate([empty_sample(8, 2)])
    for kernel in ("sdpa", "flash_attention_2"):
        with flash_attention():
            learner = Learner(build_model("llama", attn_implementation=kernel), DistillationLoss(), [1.0, 2.0], True)
            total, found = gradients(learner, [batch])
        assert total == 0
        assert len(found) == len(dict(learner.named_parameters()))  # DistributedDataParallel waits for all of them
        assert all((gradient == 0).all() for gradient in found.values())


def hybrid(kind: str) -> Any:
    """A random model with layers that read a row from its beginning, whatever its positions say."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    common = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    mamba = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16}
    more: dict[str, dict[str, Any]] = {
        "mamba": {"state_size": 4},
        "bamba": {**attention, **mamba, "attn_layer_indices": [1]},
        "qwen3_next": {**attention, "head_dim": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
                       "linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_experts": 2,
                       "num_experts_per_tok": 1, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
                       "layer_types": ["linear_attention", "full_attention"]},
    }  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**common, **more[kind]), dtype=torch.float32)


@pytest.mark.parametrize("kind", ["mamba", "bamba", "qwen3_next"])
def test_models_that_ignore_positions_are_refused(kind: str, small_store: Path) -> None:
    cache, samples = samples_of(small_store)
    learner = Learner(hybrid(kind), DistillationLoss(), cache.temperatures, packed=True)
    for _ in range(2):  # not only the first time
        with pytest.raises(ConfigError, match=r"packed: expected false .* samples in one row would see each other"):
            learner(collate(samples[:4]))
    assert Learner(learner.model, DistillationLoss(), cache.temperatures)(collate(samples[:4])) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("blind", ["cache", "positions", "rows"])
def test_a_call_that_lets_samples_see_each_other_is_noticed(
    blind: str, autocast: bool, dtype: torch.dtype, small_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that insists on a cache, one that ignores positions, and FlashAttention with several rows."""
    cache, samples = samples_of(small_store)
    with flash_attention() if blind == "rows" else contextlib.nullcontext():
        model = build_model("llama", attn_implementation="flash_attention_2" if blind == "rows" else "sdpa").to(dtype)
        whole = model.forward
        if blind == "rows":
            monkeypatch.setattr("distill.student.learner.wants_one_row", lambda _: False)
        elif blind == "cache":
            model.forward = lambda use_cache=None, **inputs: whole(use_cache=True, **inputs)
        else:
            model.forward = lambda position_ids=None, **inputs: whole(**inputs)
        learner = Learner(model, DistillationLoss(), cache.temperatures, packed=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with pytest.raises(ConfigError, match="packed: expected false"):
                learner(collate(samples))
            monkeypatch.undo()
            model.forward = whole
            assert learner(collate(samples)) > 0


def test_the_first_look_changes_nothing(small_store: Path) -> None:
    """Neither random numbers nor the modes of the model's parts, some of which a user may have frozen."""
    cache, samples = samples_of(small_store)
    model = build_model("llama", attention_dropout=0.5).train()
    model.model.layers[1].eval()
    before = [part.training for part in model.modules()]
    torch.manual_seed(1)
    learner = Learner(model, DistillationLoss(), cache.temperatures, packed=True)
    losses = []
    for _ in range(2):
        torch.manual_seed(1)
        losses.append(learner(collate(samples)).item())
    assert losses[0] == losses[1]
    assert [part.training for part in model.modules()] == before
    with evaluating(model):
        assert not any(part.training for part in model.modules())
