"""Steps of a run on two workers: what is not finite stops it before a weight, a checkpoint or a student has it."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from distill import DistillationLoss, Learner, TeacherCache, collate
from distill.config.train import OptimizerConfig, TrainBatchConfig, TrainConfig
from distill.errors import DataError, NumericalError
from distill.reading.samples import empty_sample
from distill.run.grid import Grid
from distill.student.batches import StepBatches, split
from distill.student.training import Training
from tests.support import build_model, masked_store, two_workers


def test_what_is_not_finite_stops_the_run(small_store: Path, tmp_path: Path) -> None:
    two_workers(_worker, small_store, tmp_path)


def _worker(store: Path, folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    grid = Grid(rank=rank, world_size=2, local_rank=rank, local_world_size=2)
    for parallel in ("ddp", "fsdp"):
        config = TrainConfig(
            parallel=parallel, output=str(folder / parallel), batch=TrainBatchConfig(samples=2, readers=0),
            optimizer=OptimizerConfig(steps=9, learning_rate=1e-3),
        )  # fmt: skip
        cache = TeacherCache(str(store))
        model = build_model("llama", num_hidden_layers=1)
        keeper: Any = mock.Mock(step=0)
        training = Training(config, model, DistillationLoss(), cache[:0], keeper, 9, torch.device("cpu"))
        steps = StepBatches(cache, config, grid).read(0, torch.device("cpu"))
        training._take_step(next(steps))
        before = [_local(weight).clone() for weight in training._module.parameters()]
        with (
            mock.patch("distill.student.loss.forward_kl", _kl_with_bad_gradient if rank == 1 else _kl),
            pytest.raises(NumericalError, match="step 2: the norm of the gradient is nan"),
        ):
            training._take_step(next(steps))
        after = [_local(weight) for weight in training._module.parameters()]
        assert all(a.equal(b) for a, b in zip(before, after, strict=True))

        training._optimizer.param_groups[0]["lr"] = 1e39  # a finite gradient, and a step that is not
        training._take_step(next(steps))
        with pytest.raises(NumericalError, match="after step 2 weights are NaN or infinite"):
            training._check_weights()
        assert not keeper.save.called
    dist.destroy_process_group()


def _local(weight: Any) -> torch.Tensor:
    found: torch.Tensor = getattr(weight, "to_local", lambda: weight)().detach()
    return found


def _kl(logits: torch.Tensor, _: Any) -> torch.Tensor:
    return logits.square().sum(dim=1)


def _kl_with_bad_gradient(logits: torch.Tensor, _: Any) -> torch.Tensor:
    """A finite loss; its gradient is NaN, as that of a masked square root."""
    return torch.where(torch.tensor(True), logits, (logits * 0).sqrt() * torch.inf).square().sum(dim=1)


def test_data_without_a_trained_token(small_store: Path, tmp_path: Path) -> None:
    """Chats in which no assistant speaks: refused before the first step, for training and for what is held out."""
    config = TrainConfig()
    cache = TeacherCache(str(masked_store(small_store, tmp_path / "none", [])))
    with pytest.raises(DataError, match=r"none: expected tokens to learn from in the \d+ samples that are held out"):
        split(cache, config)
    with pytest.raises(DataError, match=r"in the 1,177 samples to train on, found none: loss_mask is false everywhere"):
        StepBatches(cache, config, Grid())
    with pytest.raises(DataError, match="found none: all are short"):
        TeacherCache(str(small_store))[:0].check_trained("of nobody")

    lengths = [len(sample["tokens"]) for sample in cache]
    last = next(i for i in range(100, 300) if lengths[i] > 1)
    one = TeacherCache(str(masked_store(small_store, tmp_path / "one", [last])))
    one[last : last + 1].shuffled(1)
    with pytest.raises(DataError):
        one[: last - 1].shuffled(1)
    batches = [batch["loss_mask"].sum().item() for batch in one.shuffled(4)]
    assert sum(batches) == 1  # the other batches have no token, and are fine


def test_an_empty_micro_batch_is_fine(small_store: Path) -> None:
    loss = DistillationLoss()
    learner = Learner(build_model("llama", num_hidden_layers=1), loss, [1.0, 2.0], packed=True)
    assert learner(collate([empty_sample(8, 2)])) == 0
