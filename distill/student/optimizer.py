"""AdamW and its schedule."""

import math
from typing import Any

import torch
from torch import nn

from distill.config import OptimizerConfig


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
