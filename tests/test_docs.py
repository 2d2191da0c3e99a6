"""The code of docs/training.md runs as it is written, on small models, and its values are right."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import DistillationLoss, Learner
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
    loop, logits = [block for block in blocks() if "DistillationTrainer" not in block]
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

    (block,) = [block for block in blocks() if "DistillationTrainer" in block]
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
