"""Optimizer and schedule from the configuration: torch's AdamW, 8-bit ones (optim8bit.py), and how the learning rate goes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..launcher.schema import Optimization

BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch's defaults, and those of the published recipes we follow


def make_optimizer(
    named: Iterable[tuple[str, torch.nn.Parameter]], name: str, learning_rate: float, weight_decay: float
) -> Optimizer:
    """AdamW over the trainable parameters. Weight decay touches matrices only: not norms, not biases."""
    trainable = [(n, p) for n, p in named if p.requires_grad]
    matrices = {
        id(p) for _, p in trainable if len(getattr(p, "ds_shape", p.shape)) >= 2
    }  # ZeRO-3 keeps the shape there
    groups = [
        {"params": [p for _, p in trainable if id(p) in matrices], "weight_decay": weight_decay},
        {"params": [p for _, p in trainable if id(p) not in matrices], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, eps=EPSILON, fused=True)
    from . import optim8bit  # loads bitsandbytes

    kind = {
        "adamw-8bit": optim8bit.AdamW8bit,
        "adamw-8bit-kernel": optim8bit.KernelAdamW8bit,
        "paged-adamw-8bit": optim8bit.PagedAdamW8bit,
    }[name]
    return kind(groups, lr=learning_rate, betas=BETAS, eps=EPSILON)


def make_schedule(optimizer: Optimizer, optimization: Optimization, steps: int) -> LRScheduler:
    """Warm-up from 0, then cosine or linear to 0, or constant. `warmup` below 1 is a share of the steps. The factors are those of
    transformers' get_scheduler, to the bit; that function loads peft and bitsandbytes, a sixth of what a rank takes to start (measured
    on two loaded cores: 3.5 of 20 s)."""
    warm, shape = warmup_steps(optimization.warmup, steps), optimization.schedule

    def factor(step: int) -> float:
        if step < warm:
            return step / max(1, warm)
        if shape == "constant":
            return 1.0
        if shape == "linear":
            return max(0.0, (steps - step) / max(1, steps - warm))
        assert shape == "cosine"
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warm) / max(1, steps - warm)))))

    return LambdaLR(optimizer, factor)


def warmup_steps(warmup: float, steps: int) -> int:
    return round(warmup * steps) if warmup < 1 else int(warmup)
