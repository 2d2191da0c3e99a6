"""Distillation with the Trainer of Hugging Face transformers, which needs accelerate.

    train, held_out = TeacherCache("outputs/demo.zarr").split(64)
    trainer = DistillationTrainer(
        model, args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer,
        distillation_loss=DistillationLoss(alpha=0.9),
    )
    trainer.train()

With a Trainer of your own: ``class Mine(DistillationTrainer, MyTrainer)``. With TRL's, which this does not import:
``class Mine(DistillationTrainer, SFTTrainer)``.
"""

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset
from transformers import ProcessorMixin, Trainer, TrainerCallback

from distill.config.generate import TeacherConfig
from distill.errors import ConfigError, NumericalError
from distill.reading.cache import TeacherCache
from distill.reading.samples import Batch, Sample, collate, empty_sample
from distill.student.learner import BatchLoss
from distill.student.loss import DistillationLoss
from distill.student.model import check
from distill.teacher.source import Source

_MADE_HERE = ("data_collator", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")
_TEXTS = "samples are token ids already"
_PACKED = "packed=True of the trainer puts the samples of each batch end to end"
_MASKED = "the store's loss_mask says which tokens are learned from"
_OF_TEXTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "packing": ((False,), _PACKED),
    "eval_packing": ((None, False), _PACKED),
    "padding_free": ((False,), _PACKED),
    "pad_to_multiple_of": ((None,), "a batch is as wide as its longest sample"),
    "completion_only_loss": ((None,), _MASKED),
    "assistant_only_loss": ((False,), _MASKED),
    "loss_type": (("nll",), "the loss is the trainer's distillation_loss"),
    "chat_template_path": ((None,), _TEXTS),
}
"""What an SFTConfig says of texts and their loss, and a cache has settled: the values that ask for nothing, and why."""


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that learns from a TeacherCache with a DistillationLoss.

    The loss of a step is the mean over the tokens to learn from, of all accumulation steps and all workers together.
    eval_loss is the same mean over the whole eval_dataset. The logits of a whole batch are in memory at once only where
    the model changes them after its output head (soft-capping, scale). Samples are read in the Trainer's random order,
    and each reads a chunk of the store: set args.dataloader_num_workers, so that the model need not wait.
    """

    loss_is_scaled_for_ga = True
    train_dataset: Any
    eval_dataset: Any
    _name = "distillation"  # what a model was trained with, as TRL's model cards say

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raise ConfigError for a class whose batches and loss would be those of a Trainer of TRL."""
        super().__init_subclass__(**kwargs)
        if (first := next(filter(_is_trl, cls.__mro__[: cls.__mro__.index(DistillationTrainer)]), None)) is not None:
            raise ConfigError(f"{cls.__name__}: expected DistillationTrainer before {first.__name__}, found it after")

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        distillation_loss: DistillationLoss | None = None,
        packed: bool = False,
        **kwargs: Any,
    ) -> None:
        """As a Trainer, where train_dataset and eval_dataset (or each of a dict of them) are TeacherCaches.

        distillation_loss: DistillationLoss() by default. packed: put samples end to end into as few rows as possible.
        All else is as the Trainer takes it that this one is mixed with, as SFTTrainer's peft_config.
        Raises ConfigError for other datasets, for a loss or a model that does not match a store, and for arguments that
        would have no effect; StoreError where the tokenizer, processing_class, gives other ids than the teacher's;
        DataError where nothing can be learned from a dataset. The first batch raises ConfigError where samples of one
        row would see each other, and a step raises NumericalError before weights become NaN or infinite.
        """
        for name in _MADE_HERE:
            if (found := kwargs.pop(name, None)) is not None:
                raise ConfigError(f"{name}: expected none, as batches and their loss are made here, found {found!r}")
        self._of_trl = _of_trl(type(self), args)
        cache = kwargs.get("train_dataset")
        if self._of_trl and cache is not None:
            _expect_cache("train_dataset", cache)
            if (found := kwargs.get("formatting_func")) is not None:
                raise ConfigError(f"formatting_func: expected none, found {found!r}: {_TEXTS}")
            # SFTTrainer takes a Dataset of texts, and looks at its first row to see what has to be done with them.
            kwargs["train_dataset"] = datasets.Dataset.from_dict({"sample": [0]})
        super().__init__(model=model, args=args, data_collator=collate, **kwargs)
        if self._of_trl:
            self.train_dataset = cache
        self.add_callback(_FiniteSteps(self.accelerator))
        self.add_callback(_Epochs())
        self.args.remove_unused_columns = False
        self.model_accepts_loss_kwargs = True  # before transformers 5.23 it means what loss_is_scaled_for_ga means
        self.distillation_loss = distillation_loss or DistillationLoss()
        self._temperatures: list[float] = []
        self._losses: BatchLoss | None = None
        self._packed = packed
        self._evaluated = [0.0, 0.0]  # sum of the losses, number of tokens
        if self.args.n_gpu > 1:
            raise ConfigError(f"expected a process for each of {self.args.n_gpu} GPUs, found one: start with torchrun")
        if self.args.label_smoothing_factor:
            raise ConfigError(f"label_smoothing_factor: expected 0, found {self.args.label_smoothing_factor}")
        if getattr(self, "aux_loss_enabled", False):  # by TRL, as the student's configuration says
            raise ConfigError(
                f"router_aux_loss_coef: expected 0, found {self.router_aux_loss_coef:g}: the loss here balances no "
                "experts' load"
            )
        if self.train_dataset is not None:
            self._check("train_dataset", self.train_dataset)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self._padded(cache) for name, cache in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = self._padded(self.eval_dataset)

    def _check(self, name: str, cache: Any) -> None:
        _expect_cache(name, cache)
        if self.processing_class is None:
            raise ConfigError("processing_class: expected the student's tokenizer, found none")
        tokenizer = self.processing_class
        tokenizer = tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer
        check(Source(Path(), TeacherConfig(), self.model.config, tokenizer), self.distillation_loss, cache)
        if len(cache) or name == "train_dataset":
            cache.check_trained(f"of {name}")
        longest = getattr(self.args, "max_length", None) if self._of_trl else None
        if longest is not None and cache.max_length > longest:
            raise ConfigError(
                f"max_length: expected None or at least {cache.max_length}, the longest sample of {cache.path}, found "
                f"{longest}: samples are not cut"
            )
        self._temperatures = self._temperatures or cache.temperatures
        if cache.temperatures != self._temperatures:
            raise ConfigError(f"{name}: expected temperatures {self._temperatures}, found {cache.temperatures}")

    def _padded(self, cache: Any, name: str = "eval_dataset") -> Dataset[Sample]:
        """`cache` and empty samples, so that all workers' batches are full; else real samples would be repeated."""
        self._check(name, cache)
        missing = -len(cache) % (self.args.eval_batch_size * self.args.world_size)
        nothing: Any = [empty_sample(cache.attributes["k"], len(cache.temperatures))] * missing
        return ConcatDataset([cache, nothing])

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """As SFTTrainer calls it on texts: samples of a cache need none of it."""
        return dataset

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The DataLoader of this TeacherCache; by default of eval_dataset, by name if that is a dict."""
        known = isinstance(eval_dataset, str | ConcatDataset | None)
        return super().get_eval_dataloader(eval_dataset if known else self._padded(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The DataLoader of this TeacherCache, for predict."""
        return super().get_test_dataloader(self._padded(test_dataset, "test_dataset"))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(self._lengths(train_dataset or self.train_dataset))

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return super()._get_eval_sampler(self._lengths(eval_dataset))

    def _lengths(self, dataset: Any) -> Any:
        """What a Trainer's samplers ask of a dataset: how long its samples are, in a column, none of them read."""
        if getattr(self.args, "train_sampling_strategy", None) not in ("group_by_length", "batch_rebalance"):
            return dataset
        parts: list[Any] = dataset.datasets if isinstance(dataset, ConcatDataset) else [dataset]
        lengths = chain(*(part.lengths if isinstance(part, TeacherCache) else [1] * len(part) for part in parts))
        return datasets.Dataset.from_dict({self.args.length_column_name: list(lengths)})

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The batches of a step, and the number of tokens that all workers together learn from in it."""
        batches = list(islice(epoch_iterator, num_batches))
        if getattr(self.args, "include_num_input_tokens_seen", None) == "non_padding":
            for batch in batches:  # else every id that is not the tokenizer's padding would be counted, as our 0 is
                first = batch["sample"][:, None] >= 0
                batch["attention_mask"] = torch.cat([first, batch["next_tokens"][:, :-1] >= 0], dim=1).long()
        count = sum((batch["loss_mask"].sum().to(device) for batch in batches), torch.tensor(0, device=device))
        return batches, self.accelerator.gather(count).sum().clamp(min=1)

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The batch's sum of losses / `num_items_in_batch` x the number of workers, since DDP averages over workers.

        Without num_items_in_batch: the batch's own mean. return_outputs: return (loss, {}), since no logits are kept.
        """
        self._losses = self._losses or BatchLoss(self.distillation_loss, self._temperatures, self._packed)
        total = self._losses.sum(model, self.model, inputs)
        if num_items_in_batch is None:
            mean = total / inputs["loss_mask"].sum().clamp(min=1)
        else:
            mean = total * (self.accelerator.num_processes / num_items_in_batch)
        return (mean, {}) if return_outputs else mean

    def prediction_step(self, model: Any, inputs: Batch, *_: Any, **__: Any) -> tuple[Tensor, None, None]:
        """The batch's mean loss; there are no predictions."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            mean = self.compute_loss(model, inputs)
        count = int(inputs["loss_mask"].sum())
        self._evaluated = [self._evaluated[0] + float(mean) * count, self._evaluated[1] + count]
        return mean, None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As a Trainer's, with the loss as a mean over tokens instead of batches."""
        self._evaluated = [0.0, 0.0]
        model, prepared = self.model, getattr(self.model, "_is_accelerate_prepared", False)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        model._is_accelerate_prepared = prepared  # else a train() after this would leave it without DDP
        total, count = self.accelerator.gather(torch.tensor([self._evaluated], device=self.args.device)).sum(dim=0)
        output.metrics[f"{metric_key_prefix}_loss"] = float(total / count.clamp(min=1))
        return output


def _is_trl(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "trl"


def _of_trl(kind: type, args: Any) -> bool:
    """Whether such a Trainer is TRL's SFTTrainer too. Raises ConfigError for its others, and for args about texts."""
    name = next((base.__name__ for base in kind.__mro__ if _is_trl(base)), None)
    if name is None:
        return False
    if name != "SFTTrainer":
        raise ConfigError(f"{kind.__name__}: expected TRL's SFTTrainer, found {name}, which makes batches of its own")
    for key, (nothing, why) in _OF_TEXTS.items():
        if (found := getattr(args, key, nothing[0])) not in nothing:
            raise ConfigError(f"{key}: expected {nothing[0]}, found {found}: {why}")
    return True


def _expect_cache(name: str, cache: Any) -> None:
    if not isinstance(cache, TeacherCache):
        raise ConfigError(f"{name}: expected a distill.TeacherCache, found {type(cache).__name__}")


class _Epochs(TrainerCallback):  # type: ignore[misc]
    """Tells a dataset the epoch. accelerate does that too, but not to two workers, nor in the middle of an epoch."""

    def on_epoch_begin(self, _: Any, state: Any, *__: Any, train_dataloader: Any = None, **___: Any) -> None:
        """Call set_epoch, before the epoch's DataLoader workers start."""
        if hasattr(train_dataloader.dataset, "set_epoch"):
            train_dataloader.dataset.set_epoch(int(state.epoch + 1e-6))  # it is a sum of fractions


class _FiniteSteps(TrainerCallback):  # type: ignore[misc]
    """Ends a training before an optimizer step with a gradient that is NaN or infinite."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def on_pre_optimizer_step(self, args: Any, state: Any, _: Any, model: Any = None, **__: Any) -> None:
        """Raise NumericalError, on all workers together. With float16 the scaler leaves such steps out by itself."""
        if self._accelerator.scaler is not None:
            return
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        local = (getattr(gradient, "to_local", lambda gradient=gradient: gradient)() for gradient in gradients)
        bad = sum((~gradient.isfinite()).any().float() for gradient in local)
        if self._accelerator.reduce(torch.as_tensor(bad, device=args.device), "sum"):
            raise NumericalError(f"step {state.global_step + 1}: the gradient is NaN or infinite")
