"""Language modelling: cross-entropy of the next token, and of the ones after it where the model predicts them."""

from __future__ import annotations

from typing import Any

import torch

from megatron_sov.config import RunConfig
from megatron_sov.mcore.model.logprobs import Head
from megatron_sov.train.data_batches import DataBatches
from megatron_sov.train.microbatch import MicroBatch, shifted_targets
from megatron_sov.train.objective import GlobalBatch, LossSums, per_source, with_denominators

LM, MTP = "lm", "mtp"


class LanguageModelling:
    """Cross-entropy on every token, plus the multi-token prediction terms (DeepSeek-V3, arXiv 2412.19437, eq. 24-25)."""

    def __init__(self, config: RunConfig, batches: DataBatches) -> None:
        self._batches = batches
        self._depths = config.model.num_mtp_layers
        self._num_sources = batches.num_sources
        self.coefficients = {LM: 1.0}
        if self._depths:
            self.coefficients[MTP] = config.model.mtp_loss_coeff

    def collect(self, policy: Any, step: int) -> GlobalBatch:
        """Return the next batch of the data order."""
        return self._batches.next()

    def prepare(self, batch: GlobalBatch) -> GlobalBatch:
        """Count targets: every weighted label for the trunk, and the mean over depths for multi-token prediction."""
        targets = {LM: sum(float(m.weights.double().sum()) for m in batch.micro_batches)}
        if self._depths:
            targets[MTP] = sum(float(shifted_targets(m, d)[1].double().sum()) for m in batch.micro_batches
                               for d in range(1, self._depths + 1))
        return with_denominators(batch, targets)

    def loss(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> LossSums:
        """Return the summed cross-entropy of the trunk and of the prediction depths."""
        losses = -head.logprobs(hidden[0], batch.labels)
        terms = {LM: (losses * batch.weights).sum()}
        for depth in range(1, self._depths + 1):
            labels, weights = shifted_targets(batch, depth)
            terms[MTP] = terms.get(MTP, 0.0) - (head.logprobs(hidden[depth], labels) * weights).sum()
        return LossSums(terms, per_source(losses, batch.weights, batch.sources, self._num_sources))
