"""Learning rate as a function of the step."""

from __future__ import annotations

import math

from megatron_sov.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Return the learning rate of optimizer step `step` (0-based) of `num_steps`.

    Linear warm-up over `warmup_steps` (at most half the run), then by schedule:
    cosine: ``min + (lr - min) * (1 + cos(pi t)) / 2`` over the rest (Loshchilov and Hutter, arXiv 1608.03983);
    wsd: constant, then linear to min over the last `decay_share` of the run, at most all that follows the warm-up (MiniCPM,
    arXiv 2404.06395); constant.  Phases of the curriculum do not begin it anew, another run does.
    """
    warmup = min(config.warmup_steps, num_steps // 2)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        decay = max(1, min(round(num_steps * config.decay_share), num_steps - warmup))
        done = max(0.0, (step + 1 - (num_steps - decay)) / decay)
        return config.lr - (config.lr - config.min_lr) * done
    done = (step + 1 - warmup) / max(1, num_steps - warmup)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * done)) / 2
