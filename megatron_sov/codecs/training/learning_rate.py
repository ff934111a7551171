"""How fast a codec learns at a step."""

from __future__ import annotations

import math

from torch.optim import Optimizer

END_SHARE = 0.1
"""Of the highest learning rate, at the last step."""


def set_learning_rate(optimizer: Optimizer, peak: float, step: int, warmup_steps: int, steps: int) -> None:
    """Give an optimizer its learning rate: up in a line to the peak, then down along half a cosine.

    Args:
        optimizer: all of its groups get the same.
        peak: the highest.
        step: the one that comes, from 1 on.
        warmup_steps: until the peak.
        steps: in all.
    """
    gone = min(max(step - warmup_steps, 0) / max(steps - warmup_steps, 1), 1.0)
    down = END_SHARE + (1 - END_SHARE) * (1 + math.cos(math.pi * gone)) / 2
    for group in optimizer.param_groups:
        group["lr"] = peak * min(step / max(warmup_steps, 1), 1.0) * down
