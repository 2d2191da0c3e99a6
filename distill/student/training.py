"""The state of a training run, and its steps."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distill.config import TrainConfig
from distill.errors import ConfigError
from distill.reading.cache import TeacherCache
from distill.reading.samples import Batch
from distill.student import checkpoint
from distill.student.evaluate import evaluate
from distill.student.gradients import accumulate, clip, precision, wrap
from distill.student.loss import DistillationLoss
from distill.student.model import Learner, save, sees_neighbours
from distill.student.optimizer import optimizer_of


class Training:
    """A student with its loss, its optimizer and its schedule, on this worker's device. All workers call it together.

    step: the optimizer steps that are done
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Any,
        loss: DistillationLoss,
        temperatures: Sequence[float],
        total_steps: int,
        device: torch.device,
    ) -> None:
        """model: the student. temperatures: of the store. Raises ConfigError where the student cannot be packed."""
        learner = Learner(model, loss, temperatures)
        if config.batch.packed and sees_neighbours(model):
            raise ConfigError("batch.packed: expected false for this student: samples in one row would see each other")
        model.train()
        on_gpu = config.autocast == "auto" and device.type == "cuda"
        self._dtype = torch.bfloat16 if on_gpu or config.autocast == "bfloat16" else torch.float32
        self._config, self._device, self._model = config, device, model
        self._module = wrap(learner, config.parallel, device)
        self._optimizer, self._scheduler = optimizer_of(self._module, config.optimizer, total_steps)
        self.step = 0

    def take_step(self, parts: Sequence[Batch]) -> dict[str, float]:
        """One optimizer step from this worker's micro-batches `parts`; returns what metrics.jsonl says of it.

        Raises FloatingPointError where the loss is not finite; the weights are then as before.
        """
        self._optimizer.zero_grad(set_to_none=True)
        mean, tokens = accumulate(self._module, parts, dist.get_world_size(), self._device, self._dtype)
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss is {mean} at step {self.step + 1}")
        norm = clip(self._module, self._config.optimizer.clip)
        rate = self._scheduler.get_last_lr()[0]
        self._optimizer.step()
        self._scheduler.step()
        self.step += 1
        return {"step": self.step, "loss": mean, "tokens": tokens, "learning_rate": rate, "grad_norm": norm}

    def evaluate(self, held_out: TeacherCache) -> dict[str, Any]:
        """The held-out figures, as `evaluate` describes them, in the form of metrics.jsonl."""
        with precision(self._device, self._dtype):
            found = evaluate(self._module, held_out, self._config.batch.samples, self._device)
        return {"step": self.step, "held_out": found}

    def save_checkpoint(self, folder: Path, settings: dict[str, Any]) -> None:
        """Write a checkpoint of this step into `folder`."""
        checkpoint.save(folder, self.step, settings, self._module, self._optimizer, self._scheduler)

    def restore(self, saved: Path) -> None:
        """Continue from the checkpoint `saved`."""
        self.step = checkpoint.restore(saved, self._module, self._optimizer, self._scheduler)

    def save_student(self, tokenizer: Any, folder: Path) -> None:
        """Write the student and its tokenizer, as from_pretrained reads them, into `folder`."""
        save(self._module, self._model, tokenizer, folder)
