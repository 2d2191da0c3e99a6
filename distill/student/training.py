"""One training run: a student with its loss, optimizer and schedule, and the steps that it takes."""

import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distill.config.train import TrainConfig
from distill.errors import NumericalError
from distill.reading.cache import TeacherCache
from distill.reading.samples import Batch
from distill.run.session import Session
from distill.run.watch import Watch
from distill.student.checkpoint import Checkpoints
from distill.student.evaluate import evaluate
from distill.student.learner import Learner
from distill.student.loss import DistillationLoss
from distill.student.metrics import Metrics
from distill.student.model import save
from distill.student.optimizer import accumulate, clip, optimizer_of, precision, summed, wrap


class Training:
    """The state of a run. All workers call each method together.

    step: the optimizer steps that are done
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Any,
        loss: DistillationLoss,
        held_out: TeacherCache,
        checkpoints: Checkpoints,
        total_steps: int,
        device: torch.device,
    ) -> None:
        """Begin, or continue from the latest checkpoint. model: the student."""
        learner = Learner(model, loss, held_out.temperatures, config.batch.packed)
        model.train()
        on_gpu = config.autocast == "auto" and device.type == "cuda"
        self._dtype = torch.bfloat16 if on_gpu or config.autocast == "bfloat16" else torch.float32
        self._config, self._model, self._device = config, model, device
        self._held_out, self._checkpoints, self._total_steps = held_out, checkpoints, total_steps
        rollouts = loss.divergence == "on_policy" or "sampled_logprob" in held_out.arrays
        self._on_policy = rollouts and "next_logprob" in held_out.arrays
        self._module = wrap(learner, config.parallel, device)
        self._optimizer, self._scheduler = optimizer_of(self._module, config.optimizer, total_steps)
        checkpoints.restore(self._module, self._optimizer, self._scheduler)
        self.step = checkpoints.step
        self._metrics = Metrics(Path(config.output), self.step, visible=dist.get_rank() == 0)

    def learn(self, batches: Iterator[list[Batch]], session: Session, watch: Watch) -> None:
        """Take the steps that are left, with evaluations and checkpoints; stop at a checkpoint when a signal comes.

        batches: this worker's micro-batches of each step
        """
        config = self._config
        bar = session.bar(self._total_steps, self.step, "student", "step")
        session.graceful = True
        if self.step == 0:
            self._evaluate()
        watch.beat()  # the first batches have to come in time
        for parts in batches:
            watch.beat()
            loss = self._take_step(parts)
            last = self.step == self._total_steps
            stopping = summed(float(session.stopping is not None), self._device) > 0  # it may reach one worker only
            if last or self.step % config.evaluation.every == 0:
                self._evaluate()
            if last or stopping or self.step % config.checkpoint_every == 0:
                watch.rest()
                self._check_weights()
                self._checkpoints.save(self.step, self._module, self._optimizer, self._scheduler)
                watch.beat()
            bar.step(f"loss {loss:.3f}")  # after the checkpoint, which is written even if the console is gone
            if stopping and not last:
                dist.barrier()  # the checkpoint is in its place
                there = f"a checkpoint of step {self.step} is there"
                session.how_to_go_on = f"{there}, and the same command continues from it"
                session.leave(session.stopping or signal.SIGTERM)
        session.graceful = False
        watch.rest()
        bar.close()

    def _take_step(self, parts: list[Batch]) -> float:
        """One optimizer step; returns the loss.

        Raises NumericalError where loss or gradient are not finite, before a weight changes.
        """
        self._optimizer.zero_grad(set_to_none=True)
        mean, tokens = accumulate(self._module, parts, dist.get_world_size(), self._device, self._dtype)
        norm = clip(self._module, self._config.optimizer.clip)
        for name, value in (("loss", mean), ("norm of the gradient", norm)):
            if not math.isfinite(value):
                raise NumericalError(f"step {self.step + 1}: the {name} is {value}; no weight was changed by it")
        rate = self._scheduler.get_last_lr()[0]
        self._optimizer.step()
        self._scheduler.step()
        self.step += 1
        figures = {"step": self.step, "loss": mean, "tokens": tokens, "learning_rate": rate, "grad_norm": norm}
        self._metrics.add(figures)
        return mean

    def _check_weights(self) -> None:
        """Raise NumericalError where a step has made a weight NaN or infinite: what is kept is always finite."""
        local = (getattr(weight, "to_local", lambda weight=weight: weight)() for weight in self._module.parameters())
        if summed(sum(int((~weight.detach().isfinite()).sum()) for weight in local), self._device):
            raise NumericalError(f"after step {self.step} weights are NaN or infinite; no checkpoint of it was written")

    def _evaluate(self) -> None:
        """Measure the student on what is held out, if anything is."""
        if len(self._held_out):
            with precision(self._device, self._dtype):
                found = evaluate(
                    self._module, self._held_out, self._config.batch.samples, self._device, self._on_policy
                )
            self._metrics.add({"step": self.step, "held_out": found})

    def save_student(self, tokenizer: Any) -> None:
        """Write the student and its tokenizer, as from_pretrained reads them, into the run's output."""
        save(self._module, self._model, tokenizer, Path(self._config.output))
