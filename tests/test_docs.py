"""The code of docs/training.md runs as it is written, on small models, and its values are right."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import DistillationLoss, Learner, TeacherCache, collate
from distill.hf import DistillationTrainer
from tests.flash_attention import flash_attention
from tests.support import make_tokenizer

PAGE = (Path(__file__).parent.parent / "docs" / "training.md").read_text()


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def alone(model: Any, batch: Any, loss: DistillationLoss) -> float:
    """The mean loss over the tokens of a batch, from calls of the model with one sample each."""
    total = 0.0
    with torch.no_grad():
        for i in range(len(batch["sample"])):
            part = {name: values[i : i + 1] for name, values in batch.items()}
            total += loss.from_logits(model(part["input_ids"]).logits, part, [1.0, 2.0]).item()
    return total / int(batch["loss_mask"].sum())


@pytest.mark.parametrize("kernel", ["sdpa", "flash_attention_2"])
def test_the_loop_of_ones_own(
    kernel: str, small_store: Path, model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student is the teacher: its first loss is nearly nothing. All losses are those of the samples alone."""
    loop, logits = [block for block in blocks() if "DistillationTrainer" not in block and ".mix(" not in block]
    named = f'from_pretrained(attn_implementation="{kernel}", pretrained_model_name_or_path="'
    loop = loop.replace('from_pretrained("', named, 1).replace("Qwen/Qwen2.5-0.5B", str(model_folder("llama")))
    loop = loop.replace("outputs/mine.zarr", str(small_store)).replace("range(3)", "range(1)")
    losses: list[tuple[float, float]] = []
    plain = Learner.forward

    def watched(self: Learner, batch: Any, *more: Any) -> torch.Tensor:
        total: torch.Tensor = plain(self, batch, *more)
        if len(losses) < 4:
            mean = total.item() / int(batch["loss_mask"].sum())
            losses.append((mean, alone(self.model, batch, DistillationLoss())))
        return total

    monkeypatch.setattr(Learner, "forward", watched)
    names: dict[str, Any] = {}
    with flash_attention():
        exec(loop, names)
        assert names["student"].config._attn_implementation == kernel
        exec(logits, names)
        assert names["total"].item() == pytest.approx(plain(names["learner"], names["batch"]).item(), abs=1e-3)
    assert losses[0][0] < 1e-3
    assert losses[-1][0] != losses[0][0]  # steps were taken
    for packed, expected in losses:
        assert packed == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_trainer(small_store: Path, model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, TrainingArguments

    (block,) = [block for block in blocks() if "DistillationTrainer" in block and "SFTTrainer" not in block]
    args = TrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1,
        per_device_train_batch_size=4, learning_rate=1e-4, save_strategy="no",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    losses: list[float] = []
    plain = DistillationTrainer.compute_loss

    def watched(self: DistillationTrainer, model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
        losses.append(alone(model, inputs, DistillationLoss(alpha=0.9)))
        return plain(self, model, inputs, *more, **named)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", watched)
    names: dict[str, Any] = {"model": model, "args": args, "tokenizer": make_tokenizer()}
    exec(block.replace("outputs/mine.zarr", str(small_store)), names)
    assert names["trainer"]._packed
    logged = [line["loss"] for line in names["trainer"].state.log_history if "loss" in line]
    assert [float(loss) for loss in logged] == pytest.approx(losses, rel=1e-4)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")  # TRL's and peft's words
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("nothing_yet", [True, False])
def test_sft_trainer(
    nothing_yet: bool, small_store: Path, model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and gradients. The student is the teacher: while its adapters do nothing, its loss is nearly nothing."""
    (block,) = [block for block in blocks() if "SFTTrainer" in block]
    given = "max_steps=2, report_to='none', use_cpu=True, disable_tqdm=True, logging_steps=1, bf16=False, learning_rate"
    block = block.replace("Qwen/Qwen2.5-0.5B", str(model_folder("llama"))).replace("learning_rate", given)
    block = block.replace("outputs/mine.zarr", str(small_store)).replace("outputs/sft", str(tmp_path))
    block = block.replace("r=16", f"r=16, init_lora_weights={nothing_yet}")
    losses: list[float] = []
    plain = DistillationTrainer.compute_loss

    def watched(self: DistillationTrainer, model: Any, batch: Any, *more: Any, **named: Any) -> Any:
        mean: torch.Tensor = plain(self, model, batch, *more, **named)
        if model.training:
            logits = model(batch["input_ids"]).logits
            expected = DistillationLoss().from_logits(logits, batch, [1.0, 2.0]) / batch["loss_mask"].sum()
            trained = [weight for weight in model.parameters() if weight.requires_grad]
            gradients = [torch.autograd.grad(loss, trained, retain_graph=True) for loss in (mean, expected)]
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
            losses.append(alone(model, batch, DistillationLoss()))
        return mean

    monkeypatch.setattr(DistillationTrainer, "compute_loss", watched)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **_: None)
    names: dict[str, Any] = {}
    exec(block, names)
    logged = [line["loss"] for line in names["trainer"].state.log_history if "loss" in line]
    assert [float(loss) for loss in logged] == pytest.approx(losses, rel=1e-4, abs=1e-7)
    assert (losses[0] < 1e-3) is nothing_yet
    assert losses[1] != losses[0]
    evaluated = names["trainer"].evaluate()["eval_held_out_loss"]
    expected = alone(names["trainer"].model, collate(list(names["held_out"])), DistillationLoss())
    assert evaluated == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 0


def test_several_stores(small_store: Path, sampled_store: Path) -> None:
    (block,) = [block for block in blocks() if ".mix(" in block]
    names: dict[str, Any] = {"TeacherCache": TeacherCache}
    exec(block.replace("a.zarr", str(small_store)).replace("b.zarr", str(sampled_store)), names)
    shares = [count / len(names["cache"]) for count in names["cache"].per_epoch]
    assert shares == pytest.approx([0.7, 0.3], abs=0.001)
    assert sum(len(batch["sample"]) for batch in names["batches"]) == len(names["train"])
    assert 64 <= len(names["held_out"]) <= 68
