"""AdamW, and the gradient of the mean loss over the tokens of all workers: DistributedDataParallel or FSDP2."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from distill.config.train import OptimizerConfig
from distill.reading.samples import Batch


def wrap(module: nn.Module, mode: str, device: torch.device) -> nn.Module:
    """`module` on `device`, in DistributedDataParallel (mode ddp) or sharded layer by layer (mode fsdp: FSDP2)."""
    if mode == "ddp":
        module = module.to(device)
        return DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in list(module.modules()):
        for layer in part if isinstance(part, nn.ModuleList) else ():
            fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def precision(device: torch.device, dtype: torch.dtype) -> Any:
    """A context in which matrix products have `dtype`; float32 means no autocast."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def accumulate(
    module: nn.Module, parts: Sequence[Batch], world_size: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, int]:
    """Add the gradient of the mean loss over the tokens in all workers' `parts`; return that mean and their number.

    module: what `wrap` returns, around a Learner. parts: this worker's micro-batches of one optimizer step.
    """
    tokens = summed(sum(int(part["loss_mask"].sum()) for part in parts), device)
    # Gradients are averaged over workers. Times their number, they are those of the mean over tokens.
    scale, value = world_size / max(1.0, tokens), 0.0
    for number, part in enumerate(parts):
        with _gradients_shared(module, now=number == len(parts) - 1):
            with precision(device, dtype):
                total = module(part)
            (total * scale).backward()
        value += float(total.detach())
    return summed(value, device) / max(1.0, tokens), int(tokens)


@contextlib.contextmanager
def _gradients_shared(module: Any, now: bool) -> Iterator[None]:
    """Whether the backward pass inside shares gradients among the workers, or only adds to this worker's."""
    if hasattr(module, "no_sync"):
        with contextlib.nullcontext() if now else module.no_sync():
            yield
    else:
        module.set_requires_gradient_sync(now)
        yield


def summed(value: float, device: torch.device) -> float:
    """The sum of `value` over all workers."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.item()


def clip(module: nn.Module, largest: float) -> float:
    """Scale the gradient down to a norm of at most `largest`; return its norm before."""
    norm: Any = nn.utils.clip_grad_norm_(module.parameters(), largest)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def optimizer_of(module: nn.Module, config: OptimizerConfig, total_steps: int) -> tuple[Any, Any]:
    """AdamW, with weight decay on matrices only, and its schedule: linear warm-up, then cosine decay to a tenth."""
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in trained if weight.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [weight for weight in trained if weight.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.learning_rate, betas=(0.9, 0.95), fused=True
    )
    warmup = max(1, round(config.warmup * total_steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
