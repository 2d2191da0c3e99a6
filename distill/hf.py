"""Distillation with the Trainer of Hugging Face transformers, which needs accelerate.

    train, held_out = TeacherCache("outputs/demo.zarr").split(64)
    trainer = DistillationTrainer(
        model, args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer,
        distillation_loss=DistillationLoss(alpha=0.9),
    )
    trainer.train()

With a Trainer of your own: ``class Mine(DistillationTrainer, MyTrainer)``.
"""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset
from transformers import Trainer

from distill.config import TeacherConfig
from distill.errors import ConfigError
from distill.reading.cache import TeacherCache
from distill.reading.samples import Batch, Sample, collate, empty_sample
from distill.student.loss import DistillationLoss
from distill.student.model import check, sees_neighbours
from distill.teacher.source import Source


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that learns from a TeacherCache with a DistillationLoss.

    The loss of a step is the mean over the tokens to learn from, of all accumulation steps and all workers together.
    eval_loss is the same mean over the whole eval_dataset. The logits of a whole batch are in memory at once only where
    the model changes them after its output head (soft-capping, scale). Samples are read in the Trainer's random order,
    and each reads a chunk of the store: set args.dataloader_num_workers, so that the model need not wait.
    """

    loss_is_scaled_for_ga = True
    eval_dataset: Any

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
        Raises ConfigError for other datasets, for a loss or a model that does not match a store, and for arguments that
        would have no effect; StoreError where the tokenizer, processing_class, gives other ids than the teacher's.
        """
        for name in ("data_collator", "compute_loss_func", "compute_metrics"):
            if (found := kwargs.pop(name, None)) is not None:
                raise ConfigError(f"{name}: expected none, as batches and their loss are made here, found {found!r}")
        super().__init__(model=model, args=args, data_collator=partial(collate, packed=packed), **kwargs)
        self.args.remove_unused_columns = False
        self.model_accepts_loss_kwargs = True  # before transformers 5.23 it means what loss_is_scaled_for_ga means
        self.distillation_loss = distillation_loss or DistillationLoss()
        self._temperatures: list[float] = []
        self._head_is_last: bool | None = None
        self._evaluated = [0.0, 0.0]  # sum of the losses, number of tokens
        if self.args.n_gpu > 1:
            raise ConfigError(f"expected a process for each of {self.args.n_gpu} GPUs, found one: start with torchrun")
        if self.args.label_smoothing_factor:
            raise ConfigError(f"label_smoothing_factor: expected 0, found {self.args.label_smoothing_factor}")
        if packed and sees_neighbours(self.model):
            raise ConfigError("packed: expected false for this model: samples in one row would see each other")
        if self.train_dataset is not None:
            self._check("train_dataset", self.train_dataset)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self._padded(cache) for name, cache in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = self._padded(self.eval_dataset)

    def _check(self, name: str, cache: Any) -> None:
        if not isinstance(cache, TeacherCache):
            raise ConfigError(f"{name}: expected a distill.TeacherCache, found {type(cache).__name__}")
        if self.processing_class is None:
            raise ConfigError("processing_class: expected the student's tokenizer, found none")
        check(Source(Path(), TeacherConfig(), self.model.config, self.processing_class), self.distillation_loss, cache)
        self._temperatures = self._temperatures or cache.temperatures
        if cache.temperatures != self._temperatures:
            raise ConfigError(f"{name}: expected temperatures {self._temperatures}, found {cache.temperatures}")

    def _padded(self, cache: Any) -> Dataset[Sample]:
        """`cache` and empty samples, so that all workers' batches are full; else real samples would be repeated."""
        self._check("eval_dataset", cache)
        missing = -len(cache) % (self.args.eval_batch_size * self.args.world_size)
        nothing: Any = [empty_sample(cache.attributes["k"], len(cache.temperatures))] * missing
        return ConcatDataset([cache, nothing])

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The DataLoader of this TeacherCache; by default of eval_dataset, by name if that is a dict."""
        known = isinstance(eval_dataset, str | ConcatDataset | None)
        return super().get_eval_dataloader(eval_dataset if known else self._padded(eval_dataset))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The batches of a step, and the number of tokens that all workers together learn from in it."""
        batches = list(islice(epoch_iterator, num_batches))
        count = sum((batch["loss_mask"].sum().to(device) for batch in batches), torch.tensor(0, device=device))
        return batches, self.accelerator.gather(count).sum().clamp(min=1)

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The batch's sum of losses / `num_items_in_batch` x the number of workers, since DDP averages over workers.

        Without num_items_in_batch: the batch's own mean. return_outputs: return (loss, {}), since no logits are kept.
        """
        forward = {"input_ids": inputs["input_ids"], "position_ids": inputs["position_ids"], "use_cache": False}
        head = self.model.get_output_embeddings()
        if self._head_is_last is None:
            self._head_is_last = _is_last(head, model, inputs["input_ids"][:1, :8])
        if self._head_is_last:  # the loss takes the place of the head: inside of what DDP, FSDP and autocast wrap
            logits_of, loss, temperatures = head.forward, self.distillation_loss, self._temperatures
            head.forward = lambda hidden: loss.from_hidden(hidden, logits_of, inputs, temperatures).view(1, 1, 1)
            try:
                total = model(**forward).logits
            finally:
                head.forward = logits_of
            if total.numel() != 1:
                raise ConfigError("model: expected a forward that calls the output head, found a compiled or fused one")
        else:
            total = self.distillation_loss.from_logits(model(**forward).logits, inputs, self._temperatures)
        if num_items_in_batch is None:
            mean = total.sum() / inputs["loss_mask"].sum().clamp(min=1)
        else:
            mean = total.sum() * (self.accelerator.num_processes / num_items_in_batch)
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


@torch.no_grad()
def _is_last(head: nn.Module, model: Any, ids: Tensor) -> bool:
    """Whether the model's logits are what its head returns, without soft-capping or scale."""
    returned: list[Tensor] = []
    handle = head.register_forward_hook(lambda *call: returned.append(call[2].clone()))
    training = model.training
    logits = model.eval()(input_ids=ids, use_cache=False).logits
    model.train(training)
    handle.remove()
    return len(returned) == 1 and torch.equal(returned[0].float(), logits.float())
