"""Objectives over packed data, in contrast to rollouts: next-token prediction, with a term for multi-token
prediction (MTP).

The MTP term follows DeepSeek-V3 (arXiv 2412.19437, eq. 24-25): the cross-entropies of all prediction depths,
summed and divided by the sum of their label weights. Models without prediction layers have no MTP term. A
label is learned if its weight is above 0."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from megatron_sov.engine.model.logprobs import Head
from megatron_sov.model.config import RunConfig
from megatron_sov.train.objectives.data_batches import ObjectiveContext
from megatron_sov.train.objectives.microbatch import MicroBatch, shift_labels
from megatron_sov.train.objectives.objective import GlobalBatch, LossSums, per_source, with_denominators

TEXT, AUDIO, IMAGE = "text_loss", "audio_loss", "image_loss"
"""Meters: mean loss over the learned text, audio or image labels."""
LM, MTP = "lm", "mtp"
"""Loss terms."""


class TypedLosses:
    """Loss weights and meters by label type: a label in the model's block of audio or image token ids has
    that type, any other label is text."""

    def __init__(self, config: RunConfig) -> None:
        blocks = ((AUDIO, config.model.audio_tokens, config.objective.audio_weight),
                  (IMAGE, config.model.image_tokens, config.objective.image_weight))
        self._blocks = [(name, block, weight) for name, block, weight in blocks if block is not None]
        self._changes_weights = any(weight != 1 for _, _, weight in self._blocks)
        self.meters = (TEXT, *(name for name, _, _ in self._blocks)) if self._blocks else ()

    def scale_weights(self, batch: MicroBatch) -> MicroBatch:
        """Multiply label weights by `objective.audio_weight` and `image_weight`, on host and device."""
        if not self._changes_weights:
            return batch
        scaled = self._scale_copy(batch)
        if batch.on_host is None:
            return scaled
        return dataclasses.replace(scaled, on_host=self._scale_copy(batch.on_host))

    def _find_typed_labels(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """Return meter -> mask [n] of the labels in its block of token ids."""
        return {name: (batch.labels >= block.first) & (batch.labels < block.end)
                for name, block, _ in self._blocks}

    def _scale_copy(self, batch: MicroBatch) -> MicroBatch:
        weights, masks = batch.weights, self._find_typed_labels(batch)
        for name, _, weight in self._blocks:
            weights = torch.where(masks[name], weights * weight, weights)
        return dataclasses.replace(batch, weights=weights)

    def compute_meters(self, losses: torch.Tensor,
                       batch: MicroBatch) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return meter -> (sum of the unweighted `losses` [n] over its learned labels, their count)."""
        if not self._blocks:
            return {}
        learned = batch.weights > 0
        masks = self._find_typed_labels(batch)
        masks[TEXT] = ~torch.stack(list(masks.values())).any(0)
        meters = {}
        for name in self.meters:
            mask = masks[name] & learned
            meters[name] = (losses.detach().double() * mask).sum(), mask.sum()
        return meters


class DataObjective:
    """Base class for objectives over the data order."""

    def __init__(self, context: ObjectiveContext) -> None:
        config = context.config
        self._batches, self._num_sources = context.batches, context.batches.num_sources
        self._mtp_depths = range(1, config.model.num_predictions + 1)
        self._mtp_coefficient = {MTP: config.model.mtp_loss_coeff} if self._mtp_depths else {}
        """MTP entry for `coefficients`."""
        self._typed = TypedLosses(config)

    def collect(self, policy: Any, step: int) -> GlobalBatch:
        """Return the next packed batch; `policy` and `step` matter to other objectives only."""
        return self._batches.next()

    def _scale_label_weights(self, batch: GlobalBatch) -> GlobalBatch:
        micro_batches = tuple(map(self._typed.scale_weights, batch.micro_batches))
        return dataclasses.replace(batch, micro_batches=micro_batches)

    def _count_mtp_targets(self, micro_batches: Iterable[MicroBatch]) -> dict[str, float]:
        """Return the MTP term's sum of label weights over depths and this rank's micro-batches (on host)."""
        if not self._mtp_depths:
            return {}
        return {MTP: sum(float(shift_labels(m, depth).weights.double().sum()) for m in micro_batches
                         for depth in self._mtp_depths)}

    def _compute_mtp_sum(self, hidden: list[torch.Tensor], head: Head,
                         batch: MicroBatch) -> dict[str, torch.Tensor]:
        """Return the MTP term's cross-entropy, summed over depths and labels; {} without MTP."""
        total = torch.zeros((), device=batch.weights.device)
        for depth in self._mtp_depths:
            shifted = shift_labels(batch, depth)
            terms, _ = head.cross_entropy(hidden[depth], shifted.labels, {MTP: shifted.weights})
            total = total + terms[MTP]
        return {MTP: total} if self._mtp_depths else {}


class LanguageModelling(DataObjective):
    """Cross-entropy on every token, plus multi-token prediction.

    Derive a class to change a part, and select the class by `--set objective.name=my_objective.py:Halved`:

    >>> class Halved(LanguageModelling):
    ...     def __init__(self, context):
    ...         super().__init__(context)
    ...         self.coefficients = {**self.coefficients, LM: 0.5}"""

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        self.coefficients = {LM: 1.0} | self._mtp_coefficient
        self.meters = self._typed.meters

    def prepare(self, batch: GlobalBatch) -> GlobalBatch:
        """Set the denominators: the sum of label weights, and for the MTP term their sum over all depths."""
        batch = self._scale_label_weights(batch)
        on_host = [micro_batch.host for micro_batch in batch.micro_batches]
        targets = {LM: sum(float(micro_batch.weights.double().sum()) for micro_batch in on_host)}
        return with_denominators(batch, targets | self._count_mtp_targets(on_host))

    def loss(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> LossSums:
        """Return summed cross-entropies for the trunk and the prediction depths."""
        terms, losses = head.cross_entropy(hidden[0], batch.labels, {LM: batch.weights})
        terms |= self._compute_mtp_sum(hidden, head, batch)
        return LossSums(terms, per_source(losses, batch.weights, batch.sources, self._num_sources),
                        self._typed.compute_meters(losses, batch))
