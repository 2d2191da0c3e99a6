"""DistillationTrainer with TRL's SFTTrainer: loss and gradients of a plain loop, epochs, resuming, refusals."""

import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import trl
from transformers import AutoModelForCausalLM, ProcessorMixin

import distill
from distill import DistillationLoss, Learner, TeacherCache, collate
from distill.errors import ConfigError, DataError
from distill.hf import DistillationTrainer
from tests.support import build_model, make_tokenizer, two_workers
from tests.test_hf import LOSS, Gradients, dense, some

pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated"),  # TRL's and peft's words
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
]
OF_TRL = ("entropy", "mean_token_accuracy", "num_tokens", "aux_loss")


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **_: None)


class Mine(DistillationTrainer, trl.SFTTrainer):  # type: ignore[misc]
    pass


def arguments(folder: Path, **changes: Any) -> Any:
    """As an SFTConfig is, with gradient checkpointing, but in float32."""
    settings = {"per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 1e-3, "save_strategy": "no"}
    settings |= {"logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    return trl.SFTConfig(str(folder), **{**settings, "max_grad_norm": 0.0, **changes})


def lora(**changes: Any) -> Any:
    settings = {"target_modules": ["q_proj", "down_proj"], "r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    return peft.LoraConfig(**{**settings, **changes})


def trainer(folder: Path, train: Any, model: Any = None, **changes: Any) -> Mine:
    given = {"args": arguments(folder), "distillation_loss": LOSS, "processing_class": make_tokenizer(), **changes}
    return Mine(model or build_model("llama", num_hidden_layers=2), train_dataset=train, **given)


def plain(model: Any, cache: TeacherCache, packed: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the step of a loop of one's own over all of `cache`."""
    batch = collate(list(cache))
    model.zero_grad()
    loss = Learner(model, LOSS, cache.temperatures, packed)(batch) / batch["loss_mask"].sum()
    loss.backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return loss.item(), found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("adapters", [None, lora(), lora(modules_to_save=["lm_head"])])
def test_loss_and_gradients_are_those_of_a_plain_loop(
    adapters: Any, packed: bool, small_store: Path, tmp_path: Path
) -> None:
    """In one batch and in two, and what is logged; two held-out caches, the one with a batch that is not full."""
    cache, held_out = some(small_store, 4), {"a": some(small_store, 4), "b": some(small_store, 5)}
    logged = []
    for size, accumulated in ((4, 1), (2, 2)):
        gradients = Gradients()
        args = arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated)
        given = {"args": args, "packed": packed, "peft_config": adapters, "callbacks": [gradients]}
        run = trainer(tmp_path, cache, eval_dataset=held_out, **given)
        assert isinstance(run.model, peft.PeftModel) is (adapters is not None)
        loss, expected = plain(run.model, cache, packed)
        total, count = dense(run.model, list(cache), cache.temperatures)
        assert loss == pytest.approx((total / count).item(), rel=1e-5)
        evaluated = run.evaluate()
        for name, some_of in held_out.items():
            total, count = dense(run.model, list(some_of), cache.temperatures)
            assert evaluated[f"eval_{name}_loss"] == pytest.approx((total / count).item(), rel=1e-5)
        assert run.evaluate(held_out["b"])["eval_loss"] == pytest.approx((total / count).item(), rel=1e-5)
        assert run.predict(held_out["b"]).metrics["test_loss"] == pytest.approx((total / count).item(), rel=1e-5)
        assert run.train().training_loss == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(gradients.found, expected, rtol=1e-4, atol=1e-6)
        assert len(expected) > 5
        logged += [*evaluated, *(name for line in run.state.log_history for name in line)]
    assert not [name for name in logged if name.removeprefix("eval_").removeprefix("a_").removeprefix("b_") in OF_TRL]


def test_an_sft_config_as_it_is(small_store: Path, model_folder: Any, tmp_path: Path) -> None:
    """A student by name, its own tokenizer, bfloat16, gradient checkpointing; saved with a card, and loaded."""
    cache = some(small_store, 4)
    args = arguments(tmp_path, bf16=None, save_strategy="steps", save_steps=1)
    run = trainer(
        tmp_path, cache, str(model_folder("llama")), args=args, processing_class=None,
        callbacks=[gradients := Gradients()], peft_config=lora(target_modules="all-linear"),
    )  # fmt: skip
    assert run.args.bf16
    assert run.args.gradient_checkpointing
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = plain(run.model, cache)
    assert run.train().training_loss == pytest.approx(loss, rel=1e-4)
    torch.testing.assert_close(gradients.found, expected, rtol=1e-2, atol=1e-4)
    run.save_model()
    run.create_model_card()
    for card in (tmp_path / "README.md", tmp_path / "checkpoint-1" / "README.md"):
        assert card.read_text()
    assert "trained with distillation" in (tmp_path / "README.md").read_text()
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder("llama")), tmp_path)
    for name, weight in again.named_parameters():
        assert weight.equal(run.model.get_parameter(name)), name


class Turning(TeacherCache):
    """Eight samples, in each epoch other ones, as a mixture of caches has."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 8

    def __getitem__(self, which: Any) -> Any:
        return self._of(self._index)[18 + 8 * self.epoch + range(8)[which]]


class Watched(Mine):
    """Keeps the numbers of the samples of each step."""

    def get_batch_samples(self, *args: Any) -> Any:
        batches, count = super().get_batch_samples(*args)
        self.read = [*getattr(self, "read", []), [i for batch in batches for i in batch["sample"].tolist()]]
        return batches, count


@pytest.mark.parametrize("readers", [0, 1])
def test_a_resumed_run_is_the_same(readers: int, small_store: Path, tmp_path: Path) -> None:
    """Stopped in the middle of the second epoch: samples, losses and adapters, with dropout."""

    def started(folder: Path) -> Watched:
        args = arguments(
            folder, max_steps=-1, num_train_epochs=3, per_device_train_batch_size=2, save_strategy="steps",
            save_steps=3, dataloader_num_workers=readers,
        )  # fmt: skip
        return Watched(
            build_model("llama", num_hidden_layers=1), args, train_dataset=Turning(str(small_store)),
            processing_class=make_tokenizer(), peft_config=lora(lora_dropout=0.3), packed=True,
        )  # fmt: skip

    whole, again = started(tmp_path / "a"), started(tmp_path / "b")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    epochs = [sorted(i for step in whole.read[at : at + 4] for i in step) for at in (0, 4, 8)]
    assert epochs == [list(range(first, first + 8)) for first in (18, 26, 34)]
    assert again.read == whole.read[6:]
    losses = [[log["loss"] for log in run.state.log_history if "loss" in log] for run in (whole, again)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12
    for name, weight in whole.model.named_parameters():
        assert weight.equal(again.model.get_parameter(name)), name


def test_two_workers_are_one(small_store: Path, tmp_path: Path) -> None:
    """Evaluation, a step with accumulation and gradient checkpointing, a head that is trained, and epochs."""
    two_workers(_worker, small_store, tmp_path)
    one, two = _step(small_store, tmp_path, 4), torch.load(tmp_path / "two.pt")
    assert two.pop("epochs") == [list(range(first, first + 8)) for first in (18, 26)]
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)


def _worker(store: Path, folder: Path, rank: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # asked for, not used
    os.environ["CI"] = "1"  # TRL sends no telemetry then
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    found = _step(store, folder, 1, gradient_accumulation_steps=2, ddp_backend="gloo")
    args = arguments(folder, max_steps=4, per_device_train_batch_size=2, ddp_backend="gloo")
    run = Watched(build_model("llama", num_hidden_layers=1), args, train_dataset=Turning(str(store)),
                  processing_class=make_tokenizer())  # fmt: skip
    run.train()
    read: list[Any] = [None, None]
    torch.distributed.all_gather_object(read, run.read)
    if rank == 0:
        epochs = [sorted(i for steps in read for step in steps[at : at + 2] for i in step) for at in (0, 2)]
        torch.save({**found, "epochs": epochs}, folder / "two.pt")
    torch.distributed.destroy_process_group()


def _step(store: Path, folder: Path, batch_size: int, **changes: Any) -> dict[str, Any]:
    args = arguments(folder, per_device_train_batch_size=batch_size, per_device_eval_batch_size=2, **changes)
    run = trainer(
        folder, some(store, 4), args=args, eval_dataset=some(store, 5), callbacks=[gradients := Gradients()],
        peft_config=lora(modules_to_save=["lm_head"]),
    )  # fmt: skip
    evaluated = run.evaluate()["eval_loss"]
    predicted = run.predict(some(store, 5)).metrics["test_loss"]
    return {"evaluated": [evaluated, predicted], "trained": run.train().training_loss, **gradients.found}


def test_what_is_refused(small_store: Path, tmp_path: Path) -> None:
    cache, model = TeacherCache(str(small_store)), build_model("llama", num_hidden_layers=1)

    def refused(message: str, train: Any = cache, error: type[Exception] = ConfigError, **changes: Any) -> None:
        with pytest.raises(error, match=message):
            trainer(tmp_path, train, changes.pop("model", model), **changes)

    for name, value, instead in (
        ("packing", True, "packed=True"), ("eval_packing", True, "packed=True"), ("padding_free", True, "packed=True"),
        ("pad_to_multiple_of", 8, "as wide as"), ("completion_only_loss", True, "loss_mask"),
        ("completion_only_loss", False, "loss_mask"), ("assistant_only_loss", True, "loss_mask"),
        ("loss_type", "dft", "distillation_loss"), ("chat_template_path", "x.jinja", "token ids"),
    ):  # fmt: skip
        refused(rf"^{name}: expected .*, found {value}: .*{instead}", args=arguments(tmp_path, **{name: value}))
    refused(r"max_length: expected None or at least 96, .*\.zarr, found 64", args=arguments(tmp_path, max_length=64))
    refused("formatting_func: expected none, found <", formatting_func=str)
    refused("data_collator: expected none", data_collator=collate)
    refused("preprocess_logits_for_metrics: expected none", preprocess_logits_for_metrics=str)
    refused(r"train_dataset: expected a distill\.TeacherCache, found Dataset", datasets.Dataset.from_dict({}))
    refused(r"eval_dataset: expected a distill\.TeacherCache, found list", eval_dataset=[1])
    refused("in the 0 samples of train_dataset, found none", cache[:0], DataError)
    refused("router_aux_loss_coef: expected 0, found 0.001", model=build_model("mixtral"))
    refused("adapter to `lm_head` is not supported", cache, ValueError, peft_config=lora(target_modules=["lm_head"]))
    model = build_model("llama", num_hidden_layers=1)  # it has adapters now
    with pytest.raises(ConfigError, match="Other: expected DistillationTrainer before SFTTrainer, found it after"):
        type("Other", (trl.SFTTrainer, DistillationTrainer), {})
    for longest in (None, 96):
        args = arguments(tmp_path, max_length=longest, dataset_text_field="body", dataset_num_proc=2)
        assert trainer(tmp_path, cache, model, args=args).train_dataset is cache
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    with pytest.raises(ConfigError, match="model: expected 96 positions for as many tokens, found 101"):
        trainer(tmp_path, some(small_store, 4), model, peft_config=prompts).train()


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
@pytest.mark.parametrize("name", ["DPOTrainer", "GRPOTrainer", "RewardTrainer", "DistillationTrainer", "GKDTrainer"])
def test_other_trainers_of_trl(name: str, small_store: Path, tmp_path: Path) -> None:
    """The last of them is an SFTTrainer as well."""
    room = import_module("trl.experimental.gkd") if name == "GKDTrainer" else trl
    other = type("Other", (DistillationTrainer, getattr(room, name)), {})
    with pytest.raises(ConfigError, match=f"Other: expected TRL's SFTTrainer, found {name}, which makes batches"):
        other(build_model("llama"), arguments(tmp_path), train_dataset=TeacherCache(str(small_store)))


def test_an_expert_model(small_store: Path, tmp_path: Path) -> None:
    cache = some(small_store, 4)
    args = arguments(tmp_path, router_aux_loss_coef=0.0)
    run = trainer(tmp_path, cache, build_model("mixtral"), args=args, callbacks=[gradients := Gradients()])
    loss, expected = plain(run.model, cache)
    assert run.train().training_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(gradients.found, expected, rtol=1e-4, atol=1e-6)


def test_a_multimodal_student(small_store: Path, tmp_path: Path) -> None:
    class Processor(ProcessorMixin):  # type: ignore[misc]
        def __init__(self, tokenizer: Any) -> None:
            self.tokenizer = tokenizer

    cache = some(small_store, 4)
    run = trainer(tmp_path, cache, build_model("qwen3_vl"), processing_class=Processor(make_tokenizer()))
    loss, _ = plain(run.model, cache)
    assert run.train().training_loss == pytest.approx(loss, rel=1e-5)


def test_tokens_are_counted_without_padding(small_store: Path, tmp_path: Path) -> None:
    """Whatever id the tokenizer pads with."""
    cache, tokenizer = some(small_store, 4), make_tokenizer()
    tokenizer.pad_token = "<|end|>"
    args = arguments(tmp_path, include_num_input_tokens_seen="non_padding", gradient_accumulation_steps=2,
                     per_device_train_batch_size=2)  # fmt: skip
    run = trainer(tmp_path, cache, args=args, processing_class=tokenizer)
    run.train()
    assert run.state.num_input_tokens_seen == sum(cache.lengths)


def test_trl_is_not_imported() -> None:
    """Nor peft by distill.hf: both are what users have or have not."""
    for file in Path(distill.__file__).parent.rglob("*.py"):
        assert not re.search(r"^\s*(import|from) trl\b", file.read_text(), re.MULTILINE), file
    assert DistillationLoss().alpha == 1
