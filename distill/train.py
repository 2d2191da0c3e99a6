"""Train a student from a store: what the teacher said once is read again and again, the teacher never runs.

    python -m distill.train                                                   # the demo's store, one worker
    torchrun --nproc_per_node 8 -m distill.train configs/train_eight_gpus.yaml store.path=outputs/mine.zarr

1. open      the store; hold samples out                                      distill.cache
2. build     the student: a checkpoint, random, or some of the teacher's layers   distill.student
3. read      shuffled batches, this worker's share                            distill.shuffle
4. step      the loss per token of all workers' batches, gradient, AdamW      distill.loss
5. measure   on what was held out, now and then                               distill.evaluate
6. keep      a checkpoint now and then; at the end the student, with save_pretrained

The same command again goes on from the newest checkpoint, with the losses that an undisturbed run has.
"""

import logging
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill import __version__
from distill.config import TrainConfig
from distill.errors import ConfigError, StoreError
from distill.fingerprint import differences
from distill.log import Session
from distill.nodes import PROBE, check_nodes
from distill.parallel import Grid, gradients_summed, refuse_other_launchers, wrap
from distill.processes import obey_parent_only, signals_blocked
from distill.settings import help_text, load, to_yaml

if TYPE_CHECKING:
    import torch

    from distill.cache import TeacherCache
    from distill.samples import Batch
    from distill.shuffle import ShuffledBatches

logger = logging.getLogger("distill.train")  # __name__ is __main__ here


def main(arguments: Sequence[str]) -> int:
    """Run with these command-line arguments; return the exit status: 0 done, 1 failed, 2 bad usage or input."""
    if {"--help", "-h"} & {*arguments}:
        print(help_text(TrainConfig, "[torchrun --nproc_per_node N | python] -m distill.train"))
        return 0
    grid = Grid.from_environment()
    session = Session(grid.rank)
    return session.run(lambda: train(load(TrainConfig, arguments), grid, session))


def train(config: TrainConfig, grid: Grid, session: Session) -> None:
    """The whole run, as the worker that `grid` says."""
    # Imported here: torch, transformers and zarr take seconds, which --help or a misspelt key should not.
    import torch.distributed as dist

    from distill import checkpoint, student
    from distill.cache import TeacherCache
    from distill.device import pick_device
    from distill.evaluate import evaluate
    from distill.loss import DistillationLoss
    from distill.metrics import Metrics, summary
    from distill.watch import Watch

    refuse_other_launchers()
    loss = DistillationLoss(**asdict(config.loss))
    device = pick_device("device", config.device, grid.local_rank, grid.local_world_size)
    session.open(config.log_dir, grid.log_name)
    board = grid.board()
    check_nodes(grid, board, config, config.output)
    cache = TeacherCache(config.store.path, config.store.options)
    teacher = cache.attributes["teacher"]
    source = student.find(config.student, teacher["model"], teacher["revision"])
    student.check(source, loss, cache)
    training, held_out = split(cache, config)
    batches = training.shuffled(
        config.batch.samples, config.seed, grid.rank, grid.world_size, config.batch.packed, config.batch.window_blocks
    )
    micro_batches = batches.batches_per_epoch(config.batch.readers)
    steps_per_epoch = -(-micro_batches // config.batch.accumulate)
    total_steps = config.optimizer.steps or config.optimizer.epochs * steps_per_epoch
    output = Path(config.output)
    settings = fingerprint_of(config, cache, source, grid.world_size, total_steps)
    if (latest := checkpoint.newest(output / "checkpoints")) is not None:
        step, theirs = checkpoint.read_settings(latest)
        if differing := differences(theirs, settings, "the checkpoint"):
            raise ConfigError(
                f"output: {output} has another run's checkpoints; choose another folder, or delete it:\n  "
                + "\n  ".join(differing)
            )
    elif (
        output.is_dir()
        and any(not entry.name.startswith(PROBE) for entry in output.iterdir())
        and not (output / "metrics.jsonl").is_file()
    ):
        raise ConfigError(
            f"output: expected a new or empty folder, or one of an earlier run, found other files in {output}"
        )
    else:
        step = 0
    if step == total_steps and (output / "tokenizer_config.json").is_file():  # the last file of a saved student
        if grid.rank == 0:
            logger.info("%s is complete already: nothing to do", output)
            logger.info(summary(output))
        return

    together = replace(grid, shard_size=grid.world_size)  # in lockstep
    with (
        Watch(board, together, config.timeout_seconds, session.abort) as watch,
        grid.process_group(device, config.timeout_seconds),
    ):
        model = student.build(config.student, source, config.seed)
        board.meet("students are built", grid.world_size)  # however long that takes
        watch.follow(model)
        learner = student.Learner(model, loss, cache.temperatures)
        if config.batch.packed and student.sees_neighbours(model):
            raise ConfigError("batch.packed: expected false for this student: samples in one row would see each other")
        model.train()
        module = wrap(learner, config.parallel, device)
        optimizer, scheduler = optimizer_of(module, config, total_steps)
        if latest is not None:
            checkpoint.restore(latest, module, optimizer, scheduler)
        session.how_to_go_on = "the same command goes on from the newest checkpoint"
        metrics = Metrics(output, step, visible=grid.rank == 0)
        if grid.rank == 0:
            (output / "config.yaml").write_text(to_yaml(config))
            parameters = sum(weight.numel() for weight in model.parameters())
            logger.info(
                "distill %s, %d worker(s), %s: %s of %s parameters, %s training samples, %s held out, %s",
                __version__, grid.world_size, config.parallel, type(model).__name__, f"{parameters:,}",
                f"{len(training):,}", f"{len(held_out):,}", f"from step {step} of {total_steps}",
            )  # fmt: skip
        dtype = autocast_dtype(config, device)

        def measure(step: int) -> None:
            with precision(device, dtype):
                found = evaluate(module, held_out, config.batch.samples, device)
            metrics.add({"step": step, "held_out": found})

        bar = session.step_bar(total_steps, step, "student")
        session.graceful = True
        if step == 0 and len(held_out):
            measure(0)
        stream = micro_batches_from(batches, config, step, steps_per_epoch, device)
        while step < total_steps:
            optimizer.zero_grad(set_to_none=True)
            parts = take_step(stream, config.batch.accumulate, micro_batches, step % steps_per_epoch)
            watch.beat()
            mean, tokens = accumulate(module, parts, grid.world_size, device, dtype)
            if not math.isfinite(mean):
                raise FloatingPointError(f"the loss is {mean} at step {step + 1}")
            norm = clip(module, config.optimizer.clip)
            rate = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            step += 1
            metrics.add({"step": step, "loss": mean, "tokens": tokens, "learning_rate": rate, "grad_norm": norm})
            last = step == total_steps
            stopping = summed(float(session.stopping is not None), device) > 0  # a signal may reach one worker only
            if len(held_out) and (last or step % config.evaluation.every == 0):
                measure(step)
            if last or stopping or step % config.checkpoint_every == 0:
                watch.rest()
                checkpoint.save(output / "checkpoints", step, settings, module, optimizer, scheduler)
            bar.set_postfix_str(f"loss {mean:.3f}", refresh=False)
            bar.update()  # after the checkpoint, which a console that is gone must not prevent
            if stopping and not last:
                dist.barrier()  # the checkpoint is in its place
                session.how_to_go_on = f"a checkpoint of step {step} is there, and the same command goes on from it"
                session.leave(session.stopping or signal.SIGTERM)
        session.graceful = False
        watch.rest()
        bar.close()
        student.save(module, model, source.tokenizer, output)
        if grid.rank == 0:
            logger.info(summary(output))


def split(cache: "TeacherCache", config: TrainConfig) -> "tuple[TeacherCache, TeacherCache]":
    """What is trained on, and what is held out. Raises ConfigError where nothing is left to train on."""
    training, held_out = cache.split(config.evaluation.samples, config.seed)
    if not len(training):
        raise ConfigError(
            f"evaluation.samples: expected fewer than the {len(cache)} samples of {cache.path}, found "
            f"{config.evaluation.samples}: nothing is left to train on"
        )
    return training, held_out


def fingerprint_of(
    config: TrainConfig, cache: "TeacherCache", source: Any, world_size: int, total_steps: int
) -> dict[str, Any]:
    """What the losses of a run follow from, as a flat mapping; a checkpoint of another one is not gone on with."""
    found: dict[str, Any] = {
        "store": cache.attributes["fingerprint"],
        **{name.replace("teacher", "student"): value for name, value in source.fingerprint.items()},
        "workers": world_size,
        "steps": total_steps,
        "evaluation.samples": config.evaluation.samples,
    }
    for section in ("student", "loss", "optimizer", "batch"):
        found |= {f"{section}.{name}": value for name, value in asdict(getattr(config, section)).items()}
    return found | {"parallel": config.parallel, "autocast": config.autocast, "seed": config.seed}


def optimizer_of(module: "torch.nn.Module", config: TrainConfig, total_steps: int) -> tuple[Any, Any]:
    """AdamW, with weight decay on matrices only, and its schedule: linear warm-up, then cosine to a tenth."""
    import torch

    settings = config.optimizer
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in trained if weight.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [weight for weight in trained if weight.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=settings.learning_rate, betas=(0.9, 0.95), fused=True
    )
    warmup = max(1, round(settings.warmup * total_steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def micro_batches_from(
    batches: "ShuffledBatches", config: TrainConfig, step: int, steps_per_epoch: int, device: "torch.device"
) -> "Iterator[Batch]":
    """Batches on `device`, epoch after epoch, from the first of optimizer step `step` (counted from 0) on."""
    import torch
    from torch.utils.data import DataLoader

    # A remote store's client does not survive a fork; else a fork saves each reader seconds of imports.
    start_method = "forkserver" if "://" in config.store.path else "fork"
    readers = config.batch.readers
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=readers,
        worker_init_fn=obey_parent_only,
        persistent_workers=readers > 0,
        pin_memory=device.type == "cuda",
        multiprocessing_context=start_method if readers else None,
        generator=torch.Generator().manual_seed(config.seed),  # else it draws from the student's random numbers
    )
    epoch, within = divmod(step, steps_per_epoch)
    while True:
        batches.set_epoch(epoch, within * config.batch.accumulate)
        try:
            with signals_blocked():
                iterator = iter(loader)
            for batch in iterator:
                yield {name: values.to(device, non_blocking=True) for name, values in batch.items()}
        except StoreError as error:  # from a reader, with the reader's traceback for a message
            raise StoreError(str(error).strip().rpartition("StoreError: ")[2]) from error
        epoch, within = epoch + 1, 0


def take_step(stream: "Iterator[Batch]", accumulate: int, per_epoch: int, step_in_epoch: int) -> "list[Batch]":
    """The batches of one optimizer step: `accumulate`, or what the epoch has left."""
    return [next(stream) for _ in range(min(accumulate, per_epoch - step_in_epoch * accumulate))]


def accumulate(
    module: "torch.nn.Module", parts: "list[Batch]", world_size: int, device: "torch.device", dtype: "torch.dtype"
) -> tuple[float, int]:
    """Add the gradient of the mean loss over the tokens of all workers' `parts`; return that mean and the tokens."""
    tokens = summed(sum(int(part["loss_mask"].sum()) for part in parts), device)
    # Gradients are averaged over workers: times their number, they are those of the mean over tokens.
    scale, value = world_size / max(1.0, tokens), 0.0
    for number, part in enumerate(parts):
        with gradients_summed(module, now=number == len(parts) - 1):
            with precision(device, dtype):
                total = module(part)
            (total * scale).backward()
        value += float(total.detach())
    return summed(value, device) / max(1.0, tokens), int(tokens)


def summed(value: float, device: "torch.device") -> float:
    """The sum of `value` over all workers."""
    import torch
    import torch.distributed as dist

    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.item()


def clip(module: "torch.nn.Module", largest: float) -> float:
    """Scale the gradient down to a norm of at most `largest`; return what it was."""
    import torch

    norm: Any = torch.nn.utils.clip_grad_norm_(module.parameters(), largest)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def autocast_dtype(config: TrainConfig, device: "torch.device") -> "torch.dtype":
    """The dtype of matrix products: float32 means no autocast."""
    import torch

    on_gpu = config.autocast == "auto" and device.type == "cuda"
    return torch.bfloat16 if on_gpu or config.autocast == "bfloat16" else torch.float32


def precision(device: "torch.device", dtype: "torch.dtype") -> Any:
    """A context in which matrix products have `dtype`."""
    import torch

    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
