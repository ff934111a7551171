"""Learning a teacher's distribution of the next token, over the labels that the data have learned.

What the teacher says was computed before (`post.teacher`), so that nothing of it is in memory but its output
head, on the last pipeline stage.
"""

from __future__ import annotations

import torch

from megatron_sov.errors import UserError
from megatron_sov.mcore.model.logprobs import Head
from megatron_sov.post.parts.kept_teacher import KeptTeacher
from megatron_sov.train.data_objective import DataObjective
from megatron_sov.train.microbatch import MicroBatch
from megatron_sov.train.objective import GlobalBatch, LossSums, per_source, with_denominators
from megatron_sov.train.objective_context import ObjectiveContext

DIVERGENCE, CROSS_ENTROPY = "divergence", "cross_entropy"


class Distillation(DataObjective):
    """``(divergence(teacher, student) + ce_coeff * CE) / learned tokens`` (+ multi-token prediction, which
    learns the data's tokens by cross-entropy)."""

    meters = ("kl", "entropy")

    def __init__(self, context: ObjectiveContext, teacher: KeptTeacher) -> None:
        """Begin.

        Args:
            context: the run's.
            teacher: has read the run's sources, in their order.

        Raises:
            UserError: a file of what is kept of the teacher is damaged.
        """
        super().__init__(context)
        teacher.verify(context.world)
        self._teacher = teacher
        self.coefficients = {DIVERGENCE: 1.0}
        if context.config.distillation.ce_coeff > 0:
            self.coefficients[CROSS_ENTROPY] = context.config.distillation.ce_coeff
        self.coefficients |= self._mtp_coefficient

    def prepare(self, batch: GlobalBatch) -> GlobalBatch:
        """Count the learned tokens of the global batch."""
        hosts = [m.host for m in batch.micro_batches]
        targets = {DIVERGENCE: sum(float(self._teacher.heard(m).double().sum()) for m in hosts)}
        if CROSS_ENTROPY in self.coefficients:
            targets[CROSS_ENTROPY] = sum(float(m.weights.double().sum()) for m in hosts)
        return with_denominators(batch, targets | self._mtp_targets(hosts))

    def loss(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> LossSums:
        """Return the summed divergence of the learned labels, and their cross-entropy where it is asked."""
        heard = self._teacher.heard(batch)
        terms, measured = head.divergence(hidden[0], self._teacher.at(batch, head), {DIVERGENCE: heard},
                                          self._teacher.divergence)
        if CROSS_ENTROPY in self.coefficients:
            terms |= head.cross_entropy(hidden[0], batch.labels, {CROSS_ENTROPY: batch.weights})[0]
        terms |= self._mtp_sum(hidden, head, batch)
        learned = (heard > 0).double()
        return LossSums(
            terms, per_source(measured.divergence, heard, batch.sources, self._num_sources),
            meters={name: ((getattr(measured, name) * learned).sum(), learned.sum()) for name in self.meters})

    def state(self) -> dict[str, str]:
        """Return whom is learned from, for the checkpoint."""
        return {"teacher": self._teacher.teacher}

    def restore(self, state: dict[str, str]) -> None:
        """Refuse to go on with another teacher.

        Raises:
            UserError: it is another.
        """
        if state["teacher"] != self._teacher.teacher:
            raise UserError(f"--teacher: is {self._teacher.teacher}, and the run has learned from "
                            f"{state['teacher']} so far; resume with that one, or start a new --run --from "
                            "its checkpoint")
