"""How fast tokenizers and decoders of media learn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le
from torch.optim import Optimizer

END_SHARE = 0.1
"""Of the highest learning rate, at the last step."""


@dataclass(frozen=True)
class CodecSchedule:
    """Steps, order and learning rate: ours where a kind of network does not name a source."""

    steps: Annotated[int, Ge(1), Le(100000000)] = 100_000
    """Optimizer steps."""
    seed: Annotated[int, Ge(0), Le(2 ** 63 - 1)] = 0
    """Of weights, order and noise."""
    batch_size: Annotated[int, Ge(1), Le(1000000)] = 64
    """Pictures or pieces of sound in a step."""
    learning_rate: Annotated[float, Ge(0), Le(10)] = 3e-4
    """Of AdamW, at its highest."""
    warmup_steps: Annotated[int, Ge(0), Le(100000000)] = 100
    """From 0 up to it; then a cosine down to a tenth."""
    heldout_share: Annotated[float, Ge(0), Le(0.9)] = 0.05
    """Of the files; never learned from."""


    def set_rate(self, optimizer: Optimizer, step: int) -> float:
        """Give an optimizer the learning rate of a step, the first being 1, and return it."""
        gone = min(max(step - self.warmup_steps, 0) / max(self.steps - self.warmup_steps, 1), 1.0)
        down = END_SHARE + (1 - END_SHARE) * (1 + math.cos(math.pi * gone)) / 2
        rate = self.learning_rate * min(step / max(self.warmup_steps, 1), 1.0) * down
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate
