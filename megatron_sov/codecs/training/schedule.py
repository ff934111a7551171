"""How fast tokenizers and decoders of media learn."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.optim import Optimizer

from megatron_sov.codecs.sizes import outside

END_SHARE = 0.1
"""Of the highest learning rate, at the last step."""


@dataclass(frozen=True)
class Schedule:
    """Steps, order and learning rate: ours where a kind of network does not name a source."""

    steps: int = 100_000
    """Optimizer steps."""
    seed: int = 0
    """Of weights, order and noise."""
    batch_size: int = 64
    """Pictures or pieces of sound in a step."""
    learning_rate: float = 3e-4
    """Of AdamW, at its highest."""
    warmup_steps: int = 100
    """From 0 up to it; then a cosine down to a tenth."""
    heldout_share: float = 0.05
    """Of the files; never learned from."""

    def problems(self) -> list[str]:
        """Return one sentence for each setting that is not well."""
        return outside(self, steps=(1, 100_000_000), seed=(0, 2**63 - 1), batch_size=(1, 1_000_000),
                       learning_rate=(0, 10), warmup_steps=(0, 100_000_000), heldout_share=(0, 0.9))

    def set_rate(self, optimizer: Optimizer, step: int) -> float:
        """Give an optimizer the learning rate of a step, the first being 1, and return it."""
        gone = min(max(step - self.warmup_steps, 0) / max(self.steps - self.warmup_steps, 1), 1.0)
        down = END_SHARE + (1 - END_SHARE) * (1 + math.cos(math.pi * gone)) / 2
        rate = self.learning_rate * min(step / max(self.warmup_steps, 1), 1.0) * down
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate
