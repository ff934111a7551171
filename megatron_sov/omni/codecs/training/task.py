"""What a codec's trainer learns; the loop knows nothing of it."""

from __future__ import annotations

from typing import Protocol

from torch import nn
from torch.optim import Optimizer


class CodecTask(Protocol):
    """Networks and how they learn; a function of its settings, of the media, and of the step's number."""

    networks: nn.ModuleDict
    """Everything with weights, a discriminator too."""
    optimizers: dict[str, Optimizer]
    """Name -> optimizer over some of the weights."""

    def learn(self, step: int) -> dict[str, float]:
        """Take step `step` (the first is 1) and return its figures, "loss" among them.

        What is random comes from `draws.generator(seed, step)`, so that weights, optimizers and the number of
        steps are all there is to continue from.
        """
        ...

    def look(self) -> dict[str, float]:
        """Return figures on media that are not learned from; {} where there are none."""
        ...

    def codec(self) -> nn.Module:
        """Return what is written at the end; it has `.settings`."""
        ...
