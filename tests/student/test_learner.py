"""From a batch to its loss: the head in chunks or all logits, adapters, and models whose parts have other names."""

from pathlib import Path
from typing import Any

import pytest
import torch

from distill import DistillationLoss, Learner, TeacherCache, collate
from distill.errors import ConfigError
from distill.reading.samples import Batch
from tests.support import build_model

LOSS = DistillationLoss(alpha=0.7)
OLD_WORDS = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft's


def batch_of(store: Path) -> tuple[TeacherCache, Batch]:
    cache = TeacherCache(str(store))
    return cache, collate([cache[i] for i in range(18, 46, 7)])


def dense(model: Any, batch: Batch, temperatures: list[float]) -> torch.Tensor:
    """The sum of the losses from all logits at once, in a call of the model as anybody would write it."""
    logits = model(batch["input_ids"]).logits
    rows = {name: values[batch["loss_mask"]] for name, values in batch.items() if name != "sample"}
    return LOSS.per_row(logits[batch["loss_mask"]], rows, temperatures).sum()


def compared(model: Any, store: Path, packed: bool) -> Learner:
    """Loss and gradients of a Learner beside the dense ones."""
    cache, batch = batch_of(store)
    learner, found = Learner(model, LOSS, cache.temperatures, packed), []
    for total in (dense(model, batch, cache.temperatures), learner(batch)):
        learner.zero_grad()
        total.backward()
        trained = {n: w.grad.clone() for n, w in model.named_parameters() if w.requires_grad and w.grad is not None}
        found.append((total.item(), trained))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1].keys() == found[1][1].keys()
    assert len(found[0][1]) > 1
    largest = max(float(gradient.abs().max()) for gradient in found[0][1].values())
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-5 * largest)
    return learner


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "chunks"),
    [("llama", True), ("gpt2", True), ("mixtral", True), ("gemma3_softcapped", False), ("cohere", False)],
)
def test_the_loss_is_that_of_all_logits(name: str, chunks: bool, packed: bool, small_store: Path) -> None:
    assert compared(build_model(name), small_store, packed)._losses._sliced is chunks


@OLD_WORDS
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_a_student_with_adapters(targets: list[str], packed: bool, small_store: Path) -> None:
    import peft

    settings = peft.LoraConfig(target_modules=targets, r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    learner = compared(peft.get_peft_model(build_model("llama"), settings), small_store, packed)
    assert learner._losses._sliced
    assert all("lora" in name for name, weight in learner.named_parameters() if weight.requires_grad)


@OLD_WORDS
def test_a_saved_head(small_store: Path) -> None:
    """peft trains a whole copy of the head beside adapters."""
    import peft

    settings = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    compared(peft.get_peft_model(build_model("llama"), settings), small_store, packed=True)


@OLD_WORDS
def test_tokens_of_an_adapter_are_refused(small_store: Path) -> None:
    """Prompt tuning puts tokens of its own before each text, about which the store says nothing."""
    import peft

    cache, batch = batch_of(small_store)
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    for name in ("llama", "cohere"):  # the head in chunks, and all logits
        learner = Learner(peft.get_peft_model(build_model(name), settings), LOSS, cache.temperatures)
        with pytest.raises(ConfigError, match="model: expected 96 positions for as many tokens, found 101"):
            learner(batch)


def test_a_multimodal_model(small_store: Path) -> None:
    """Its base_model is the model itself, or has vision in it; the head is a head."""
    from transformers import AutoModelForImageTextToText, Mistral3Config

    text: dict[str, Any] = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "model_type": "mistral"}
    vision: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision |= {"image_size": 28, "patch_size": 14, "model_type": "pixtral", "head_dim": 16}
    torch.manual_seed(0)
    settings = Mistral3Config(text_config=text, vision_config=vision, image_token_index=999)
    model = AutoModelForImageTextToText.from_config(settings, dtype=torch.float32)
    for packed in (False, True):
        compared(model, small_store, packed)


@pytest.mark.parametrize("autocast", [False, True])
def test_soft_capping_is_seen_where_it_is_small(autocast: bool, small_store: Path) -> None:
    """A new student's logits are near 0, where tanh bends them by less than bfloat16 can tell; later they grow."""
    cache, batch = batch_of(small_store)
    model = build_model("gemma3_softcapped", final_logit_softcapping=30.0)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    learner = Learner(model, LOSS, cache.temperatures)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        learner(batch)
    assert learner._losses._sliced is False


def test_the_head_is_a_head_again(small_store: Path) -> None:
    cache, batch = batch_of(small_store)
    model = build_model("llama")
    before = model(batch["input_ids"]).logits
    Learner(model, LOSS, cache.temperatures)(batch)
    assert "forward" not in vars(model.lm_head)
    assert model(batch["input_ids"]).logits.equal(before)


def test_a_loss_that_the_store_cannot_serve() -> None:
    with pytest.raises(ConfigError, match=r"loss\.temperature: expected one of \[1\.0\]"):
        Learner(build_model("llama"), DistillationLoss(temperature=2.0), [1.0])
