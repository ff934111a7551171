"""What objectives have in common that learn from the data order: its batches,
and the term of multi-token prediction.

That term is the one of DeepSeek-V3 (arXiv 2412.19437, eq. 24-25): each further depth's cross-entropy, summed
over depths and divided by all their targets.  Without prediction layers there is no such term.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from megatron_sov.mcore.model.logprobs import Head
from megatron_sov.train.microbatch import MicroBatch, shifted
from megatron_sov.train.objective import GlobalBatch
from megatron_sov.train.objective_context import ObjectiveContext
from megatron_sov.train.typed_losses import TypedLosses

MTP = "mtp"


class DataObjective:
    """The beginning of an `Objective` over the data order."""

    def __init__(self, context: ObjectiveContext) -> None:
        config = context.config
        self._batches, self._num_sources = context.batches, context.batches.num_sources
        self._depths = range(1, config.model.num_mtp_layers + 1)
        self._mtp_coefficient = {MTP: config.model.mtp_loss_coeff} if self._depths else {}
        """Part of an objective's `coefficients`."""
        self._typed = TypedLosses(config)

    def collect(self, policy: Any, step: int) -> GlobalBatch:
        """Return the next batch of the data order."""
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
        return {MTP: sum(float(shifted(m, depth).weights.double().sum()) for m in micro_batches
                         for depth in self._depths)}

    def _mtp_sum(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """Return the prediction term's sum over a micro-batch, see `Objective.loss`."""
        total = torch.zeros((), device=batch.weights.device)
        for depth in self._depths:
            there = shifted(batch, depth)
            total = total + head.cross_entropy(hidden[depth], there.labels, {MTP: there.weights})[0][MTP]
        return {MTP: total} if self._depths else {}
