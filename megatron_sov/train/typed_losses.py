"""Losses by what a label is: text, or a discrete token of a sound or a picture.  Its id tells."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from megatron_sov.config import RunConfig
from megatron_sov.train.microbatch import MicroBatch

TEXT, AUDIO, IMAGE = "text_loss", "audio_loss", "image_loss"
"""Meters: mean loss of the labels of a type that are learned."""


class TypedLosses:
    """The blocks of a model's vocabulary with the weights of their labels."""

    def __init__(self, config: RunConfig) -> None:
        blocks = ((AUDIO, config.model.audio_tokens, config.objective.audio_weight),
                  (IMAGE, config.model.image_tokens, config.objective.image_weight))
        self._blocks = [(name, block, weight) for name, block, weight in blocks if block is not None]
        self._scales = any(weight != 1 for _, _, weight in self._blocks)
        self.meters = (TEXT, *(name for name, _, _ in self._blocks)) if self._blocks else ()

    def weighted(self, batch: MicroBatch) -> MicroBatch:
        """Return a micro-batch whose labels weigh what their types do besides, on the host and on the
        device."""
        if not self._scales:
            return batch
        found = self._scaled(batch)
        return found if batch.on_host is None else dataclasses.replace(
            found, on_host=self._scaled(batch.on_host))

    def _scaled(self, batch: MicroBatch) -> MicroBatch:
        weights = batch.weights
        for _, block, weight in self._blocks:
            inside = (batch.labels >= block.first) & (batch.labels < block.end)
            weights = torch.where(inside, weights * weight, weights)
        return dataclasses.replace(batch, weights=weights)

    def measured(self, losses: torch.Tensor,
                 batch: MicroBatch) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return meter -> sum and count of the losses [n] of labels that weigh anything; the weight itself
        is no
        part of it."""
        if not self._blocks:
            return {}
        learned = batch.weights > 0
        of = {name: (batch.labels >= block.first) & (batch.labels < block.end)
              for name, block, _ in self._blocks}
        of[TEXT] = ~torch.stack(list(of.values())).any(0)
        return {name: ((losses.detach().double() * (of[name] & learned)).sum(), (of[name] & learned).sum())
                for name in self.meters}
