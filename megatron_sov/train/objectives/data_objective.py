"""What objectives have in common that learn from the data order: its batches,
and the term of multi-token prediction.

That term is the one of DeepSeek-V3 (arXiv 2412.19437, eq. 24-25): each further depth's cross-entropy, summed
over depths and divided by all their targets.  Without prediction layers there is no such term.
"""

from __future__ import annotations

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
"""Meters: mean loss of the labels of a type that are learned."""
MTP = "mtp"


# Losses by what a label is: text, or a discrete token of a sound or a picture. Its id tells.


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


class DataObjective:
    """The beginning of an `Objective` over the data order."""

    def __init__(self, context: ObjectiveContext) -> None:
        config = context.config
        self._batches, self._num_sources = context.batches, context.batches.num_sources
        self._depths = range(1, config.model.num_predictions + 1)
        self._mtp_coefficient = {MTP: config.model.mtp_loss_coeff} if self._depths else {}
        """Part of an objective's `coefficients`."""
        self._typed = TypedLosses(config)

    def collect(self, policy: Any, step: int) -> GlobalBatch:
        return self._batches.next()

    def _with_types(self, batch: GlobalBatch) -> GlobalBatch:
        """Return a batch whose labels weigh what the objective says of their types."""
        return dataclasses.replace(batch, micro_batches=tuple(map(self._typed.weighted, batch.micro_batches)))

    def _mtp_targets(self, micro_batches: Iterable[MicroBatch]) -> dict[str, float]:
        """Return this process's targets of the prediction term; weights of labels say which count.

        Args:
            micro_batches: on the host.
        """
        if not self._depths:
            return {}
        return {MTP: sum(float(shift_labels(m, depth).weights.double().sum()) for m in micro_batches
                         for depth in self._depths)}

    def _mtp_sum(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """Return the prediction term's sum over a micro-batch, see `Objective.loss`."""
        total = torch.zeros((), device=batch.weights.device)
        for depth in self._depths:
            there = shift_labels(batch, depth)
            total = total + head.cross_entropy(hidden[depth], there.labels, {MTP: there.weights})[0][MTP]
        return {MTP: total} if self._depths else {}


LM = "lm"


class LanguageModelling(DataObjective):
    """Cross-entropy on every token, plus multi-token prediction.

    Derive from it to change one thing, and name it by `--set objective.name=my_objective.py:Halved`:

    >>> class Halved(LanguageModelling):
    ...     def __init__(self, context):
    ...         super().__init__(context)
    ...         self.coefficients = {**self.coefficients, LM: 0.5}
    """

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        self.coefficients = {LM: 1.0} | self._mtp_coefficient
        self.meters = self._typed.meters

    def prepare(self, batch: GlobalBatch) -> GlobalBatch:
        """Count targets: every weighted label for the trunk, and those of all depths for
        multi-token prediction."""
        batch = self._with_types(batch)
        hosts = [m.host for m in batch.micro_batches]
        targets = {LM: sum(float(m.weights.double().sum()) for m in hosts)}
        return with_denominators(batch, targets | self._mtp_targets(hosts))

    def loss(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> LossSums:
        """Return the summed cross-entropy of the trunk and of the prediction depths."""
        terms, losses = head.cross_entropy(hidden[0], batch.labels, {LM: batch.weights})
        terms |= self._mtp_sum(hidden, head, batch)
        return LossSums(terms, per_source(losses, batch.weights, batch.sources, self._num_sources),
                        self._typed.measured(losses, batch))
