"""Language modelling: cross-entropy of the next token, and of the ones after it where the
model predicts them."""

from __future__ import annotations

import torch

from megatron_sov.engine.mcore.model.logprobs import Head
from megatron_sov.train.objectives.data_objective import DataObjective
from megatron_sov.train.objectives.microbatch import MicroBatch
from megatron_sov.train.objectives.objective import GlobalBatch, LossSums, per_source, with_denominators
from megatron_sov.train.objectives.objective_context import ObjectiveContext

LM = "lm"


class LanguageModelling(DataObjective):
    """Cross-entropy on every token, plus multi-token prediction."""

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
