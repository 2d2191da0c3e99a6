"""DistillationTrainer: its losses and gradients, with one worker and with two, and what it refuses."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from distill import DistillationLoss, TeacherCache, collate
from distill.errors import ConfigError, DataError, NumericalError, StoreError
from distill.hf import DistillationTrainer
from distill.reading.mixture import Mixture
from tests.support import build_model, make_tokenizer, masked_store, two_workers

LOSS = DistillationLoss(temperature=2.0, alpha=0.7)


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings = {"per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 1e-3, "save_strategy": "no"}
    settings |= {"logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "max_grad_norm": 0.0}
    return TrainingArguments(str(folder), **{**settings, **changes})


def trainer(folder: Path, train: Any, model: Any = None, **changes: Any) -> DistillationTrainer:
    given = {"args": arguments(folder), "distillation_loss": LOSS, "processing_class": make_tokenizer(), **changes}
    return DistillationTrainer(model or build_model("llama", num_hidden_layers=2), train_dataset=train, **given)


class Gradients(TrainerCallback):  # type: ignore[misc]
    """Keeps the gradients of the last step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        weights = getattr(model, "module", model).named_parameters()
        self.found = {name: weight.grad.clone() for name, weight in weights if weight.grad is not None}


def some(store: Path, count: int) -> TeacherCache:
    """Four or five samples of very different lengths."""
    cache = TeacherCache(str(store))[18 : 18 + 7 * count : 7]
    assert [len(sample["tokens"]) for sample in cache][:4] == [3, 11, 19, 96]
    return cache


def dense(
    model: Any, samples: list[Any], temperatures: list[float], loss: DistillationLoss = LOSS
) -> tuple[torch.Tensor, int]:
    """The loss summed over all rows, from all logits at once, and the number of rows."""
    batch = collate(samples)
    logits = model(input_ids=batch["input_ids"], attention_mask=(batch["next_tokens"] >= 0).long()).logits
    rows = {name: batch[name][batch["loss_mask"]] for name in batch if batch[name].shape[:2] == logits.shape[:2]}
    return loss.per_row(logits[batch["loss_mask"]], rows, temperatures).sum(), int(batch["loss_mask"].sum())


def test_the_loss_falls(small_store: Path, tmp_path: Path) -> None:
    train, held_out = TeacherCache(str(small_store)).split(20)
    args = arguments(tmp_path, max_steps=12, eval_strategy="steps", eval_steps=6, learning_rate=3e-3)
    run = trainer(tmp_path, train, args=args, eval_dataset={"a": held_out, "b": held_out[:5]}, packed=True)
    run.train()
    losses = [log["loss"] for log in run.state.log_history if "loss" in log]
    held = [log["eval_a_loss"] for log in run.state.log_history if "eval_a_loss" in log]
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert held[1] < held[0]


@pytest.mark.parametrize(
    ("name", "loss"),
    [("llama", LOSS), ("qwen3", LOSS), ("cohere", LOSS), ("qwen3", DistillationLoss("on_policy", alpha=0.7))],
)
def test_losses_are_means_over_tokens(name: str, loss: DistillationLoss, small_store: Path, tmp_path: Path) -> None:
    """Four samples in batches of three: the last batch is filled with empty ones."""
    cache = some(small_store, 4)
    model = build_model(name)
    args = arguments(tmp_path, per_device_eval_batch_size=3)
    run = trainer(tmp_path, cache, model, eval_dataset=cache, args=args, distillation_loss=loss)
    total, count = dense(model, list(cache), cache.temperatures, loss)
    batch = collate(list(cache))
    assert run.compute_loss(model, batch).item() == pytest.approx((total / count).item(), rel=1e-5)
    assert run.compute_loss(model, batch, True, 7)[0].item() == pytest.approx((total / 7).item(), rel=1e-5)
    assert run.evaluate()["eval_loss"] == pytest.approx((total / count).item(), rel=1e-5)
    assert run.predict(cache).metrics["test_loss"] == pytest.approx((total / count).item(), rel=1e-5)
    assert model(input_ids=batch["input_ids"]).logits.shape[-1] == 1000  # the head is a head again


def test_logits_are_made_in_chunks(small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TeacherCache(str(small_store))[:48]
    model = build_model("llama")
    run = trainer(tmp_path, cache, model)
    largest = 0
    linear = torch.nn.functional.linear

    def watched(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        nonlocal largest
        if weight is model.lm_head.weight:
            largest = max(largest, x.numel() // x.shape[-1])
        return linear(x, weight, bias)

    batch = collate(list(cache))
    assert batch["loss_mask"].sum() > 2000
    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    run.compute_loss(model.train(), batch).backward()
    assert 0 < largest <= 1024


@pytest.mark.parametrize(("batch_size", "steps", "packed"), [(2, 2, False), (1, 4, False), (2, 2, True)])
def test_accumulation_changes_nothing(
    batch_size: int, steps: int, packed: bool, small_store: Path, tmp_path: Path
) -> None:
    cache = some(small_store, 4)
    found = []
    for size, accumulated in ((4, 1), (batch_size, steps)):
        args = arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated)
        run = trainer(tmp_path, cache, args=args, packed=packed, callbacks=[gradients := Gradients()])
        found.append((run.train().training_loss, gradients.found))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)


def test_two_workers_are_one(small_store: Path, tmp_path: Path) -> None:
    two_workers(_worker, small_store, tmp_path)
    one = _step(small_store, tmp_path, 4)
    torch.testing.assert_close(torch.load(tmp_path / "two.pt"), one, rtol=1e-5, atol=1e-5)


def _worker(store: Path, folder: Path, rank: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # asked for, not used
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    found = _step(store, folder, 1, gradient_accumulation_steps=2, ddp_backend="gloo")
    if rank == 0:
        torch.save(found, folder / "two.pt")
    torch.distributed.destroy_process_group()


def _step(store: Path, folder: Path, batch_size: int, **changes: Any) -> dict[str, Any]:
    """An evaluation on five samples and a step on four: workers get different numbers of samples and of tokens."""
    args = arguments(folder, per_device_train_batch_size=batch_size, per_device_eval_batch_size=2, **changes)
    callbacks = [gradients := Gradients()]
    run = trainer(folder, some(store, 4), args=args, eval_dataset=some(store, 5), callbacks=callbacks)
    evaluated = run.evaluate()["eval_loss"]
    return {"evaluated": evaluated, "trained": run.train().training_loss, **gradients.found}


def test_a_trainer_of_ones_own(small_store: Path, tmp_path: Path) -> None:
    class Own(Trainer):  # type: ignore[misc]
        def create_optimizer(self, *_: Any) -> Any:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
            return self.optimizer

        def compute_loss(self, *_: Any, **__: Any) -> Any:
            raise AssertionError

    class Both(DistillationTrainer, Own):
        pass

    run = Both(
        build_model("llama"),
        arguments(tmp_path, bf16=True, dataloader_num_workers=1),
        train_dataset=TeacherCache(str(small_store)),
        processing_class=make_tokenizer(),
    )
    assert run.train().training_loss > 0
    assert run.optimizer.param_groups[0]["lr"] == 0.0


def test_what_is_refused(small_store: Path, tmp_path: Path) -> None:
    cache = TeacherCache(str(small_store))

    def refused(error: type[Exception], message: str, train: Any = cache, **changes: Any) -> None:
        with pytest.raises(error, match=message):
            trainer(tmp_path, train, **changes)

    refused(ConfigError, r"train_dataset: expected a distill\.TeacherCache, found list", [1])
    refused(ConfigError, r"eval_dataset: expected a distill\.TeacherCache, found list", eval_dataset=[1])
    refused(ConfigError, r"loss\.temperature: expected one of \[1\.0, 2\.0\], .* found 3\.0",
            distillation_loss=DistillationLoss(temperature=3.0))  # fmt: skip
    refused(ConfigError, r"loss\.max_ratio: expected sampled_logprob in ",
            distillation_loss=DistillationLoss("on_policy", max_ratio=2.0))  # fmt: skip
    refused(ConfigError, r"data_collator: expected none, .* found <function collate", data_collator=collate)
    refused(ConfigError, r"label_smoothing_factor: expected 0, found 0\.1",
            args=arguments(tmp_path, label_smoothing_factor=0.1))  # fmt: skip
    refused(ConfigError, "processing_class: expected the student's tokenizer, found none", processing_class=None)
    other = make_tokenizer()
    other.get_vocab = lambda: {token: 261 - i for token, i in make_tokenizer().get_vocab().items()}
    refused(StoreError, "gives other ids than the teacher's", processing_class=other)
    refused(ConfigError, r"softmax over at least 262 ids.* found 200", model=build_model("llama", vocab_size=200))
    refused(ConfigError, r"context of at least 96 tokens, .* found 64",
            model=build_model("llama", max_position_embeddings=64))  # fmt: skip
    blind = build_model("llama")
    seeing = blind.forward
    blind.forward = lambda position_ids=None, **inputs: seeing(**inputs)
    with pytest.raises(ConfigError, match="packed: expected false"):
        trainer(tmp_path, cache, blind, packed=True).train()
    silent = TeacherCache(str(masked_store(small_store, tmp_path / "silent", [])))
    refused(DataError, "expected tokens to learn from in the 1,177 samples of train_dataset, found none", silent)
    refused(DataError, "samples of eval_dataset, found none: loss_mask is false everywhere", eval_dataset=silent)
    run = trainer(tmp_path, cache)
    with pytest.raises(ConfigError, match="eval_dataset: expected a distill"):
        run.evaluate([1])


def test_a_gradient_that_is_not_finite_changes_no_weight(small_store: Path, tmp_path: Path) -> None:
    model = build_model("llama", num_hidden_layers=1)
    model.model.norm.weight.register_hook(lambda gradient: gradient * torch.nan)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    run = trainer(tmp_path, TeacherCache(str(small_store)), model, args=arguments(tmp_path, max_steps=3))
    with pytest.raises(NumericalError, match="step 1: the gradient is NaN or infinite"):
        run.train()
    assert all(weight.equal(before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_samples_grouped_by_length(strategy: str, small_store: Path, tmp_path: Path) -> None:
    """Each sample once, those of like length together, and none read to learn how long it is."""
    cache = TeacherCache(str(small_store))[:200]
    args = arguments(tmp_path, train_sampling_strategy=strategy, per_device_eval_batch_size=8)
    run = trainer(tmp_path, cache, args=args, eval_dataset=cache)
    loaders = [run.get_train_dataloader(), run.get_eval_dataloader()]
    for loader in loaders:
        batches = [batch["sample"].tolist() for batch in loader]
        assert sorted(i for batch in batches for i in batch if i >= 0) == list(range(200))
    if strategy == "group_by_length":
        lengths = cache.lengths

        def spread(batches: list[list[int]]) -> int:
            return sum(max(lengths[i] for i in b if i >= 0) - min(lengths[i] for i in b if i >= 0) for b in batches)

        assert spread(batches) < 0.5 * spread([list(range(first, first + 8)) for first in range(0, 200, 8)])
    total, count = dense(run.model, list(cache), cache.temperatures)
    assert run.evaluate()["eval_loss"] == pytest.approx((total / count).item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft's
@pytest.mark.parametrize("packed", [False, True])
def test_a_student_with_adapters(packed: bool, small_store: Path, tmp_path: Path) -> None:
    import peft

    cache = some(small_store, 4)
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(build_model("llama"), settings)
    total, count = dense(model, list(cache), cache.temperatures)
    (total / count).backward()
    expected = {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}
    assert expected
    model.zero_grad()
    frozen = {name: w.clone() for name, w in model.named_parameters() if not w.requires_grad}
    gradients = Gradients()
    run = trainer(tmp_path, cache, model, packed=packed, callbacks=[gradients], eval_dataset=cache)
    assert run.evaluate()["eval_loss"] == pytest.approx((total / count).item(), rel=1e-5)
    assert run.train().training_loss == pytest.approx((total / count).item(), rel=1e-5)
    torch.testing.assert_close(gradients.found, expected, rtol=1e-4, atol=1e-5)
    assert all(w.equal(frozen[name]) for name, w in model.named_parameters() if name in frozen)


def test_a_mixture_shows_other_samples_in_each_epoch(small_store: Path, sampled_store: Path, tmp_path: Path) -> None:
    """Its exact shares, also after a resume in the middle of an epoch."""
    seen: list[list[int]] = []

    class Recording(DistillationTrainer):
        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **more: Any) -> Any:
            seen.append(inputs["sample"].tolist())
            return super().compute_loss(model, inputs, *arguments, **more)

    caches = [TeacherCache(str(small_store))[:6], TeacherCache(str(sampled_store))[:20]]
    mixture = TeacherCache.mix(caches, [1, 1])
    assert isinstance(mixture, Mixture)
    epochs = []
    for epoch in range(3):
        mixture.set_epoch(epoch)
        epochs.append({sample["sample"] for sample in mixture})
    assert len(epochs[0] & epochs[1]) == 6  # all of the smaller store, others of the larger one

    def run(**changes: Any) -> DistillationTrainer:
        args = arguments(tmp_path, max_steps=-1, num_train_epochs=3, save_strategy="steps", save_steps=4, **changes)
        loss, tokenizer = DistillationLoss(), make_tokenizer()
        model = build_model("llama", num_hidden_layers=2)
        return Recording(model, args, train_dataset=mixture, distillation_loss=loss, processing_class=tokenizer)

    run().train()
    assert [{i for batch in seen[at : at + 3] for i in batch} for at in (0, 3, 6)] == epochs
    whole = list(seen)
    seen.clear()
    resumed = run(dataloader_num_workers=1, dataloader_persistent_workers=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert seen == whole[4:]

    mixture.set_epoch(0)
    resumed.state.epoch = 1.6
    resumed.callback_handler.on_epoch_begin(resumed.args, resumed.state, resumed.control)
    assert {sample["sample"] for sample in mixture} == epochs[1]
    held_out = mixture.split(6)[1]
    total, count = dense(resumed.model.eval(), list(held_out), [1.0], DistillationLoss())
    assert resumed.evaluate(held_out)["eval_loss"] == pytest.approx((total / count).item(), rel=1e-5)
