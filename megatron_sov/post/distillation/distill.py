"""Learning a teacher's distribution of the next token, over the labels that the data have learned; and how
far the student is from it on held-out documents, before the first step and after the last.

What the teacher says was computed before (`post.teacher`), so that nothing of it is in memory but its output
head, on the last pipeline stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_sov.base.errors import UserError
from megatron_sov.engine.data.order import OrderedSample
from megatron_sov.engine.data.rows import heldout_samples, join_rows, sample_row
from megatron_sov.engine.data.token_shards import Source
from megatron_sov.engine.mcore.model.logprobs import Head
from megatron_sov.engine.mcore.parallel import collectives
from megatron_sov.post.parts.kept_teacher import KeptTeacher
from megatron_sov.train.objectives.data_batches import ObjectiveContext
from megatron_sov.train.objectives.data_objective import DataObjective
from megatron_sov.train.objectives.microbatch import MicroBatch, from_row
from megatron_sov.train.objectives.objective import GlobalBatch, LossSums, per_source, with_denominators
from megatron_sov.train.stages.gate import GateView

DIVERGENCE, CROSS_ENTROPY = "divergence", "cross_entropy"
SPLIT = "heldout"


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


def measure_heldout(view: GateView, sources: Sequence[Source],
                    teacher: KeptTeacher) -> dict[str, dict[str, float]]:
    """Measure each source that has held-out documents, and record it; called by all processes together.

    Args:
        view: the run.
        sources: those that it reads, in their order.
        teacher: what is kept of it, held-out documents included.

    Returns:
        Source -> `tokens`, those that are learned of up to `data.heldout_tokens`, and means over them:
        `divergence`, the one that is learned, and `kl`, KL(teacher || student) in nats.
    """
    found = {}
    for index, source in enumerate(sources):
        if source.num_tokens.get(SPLIT, 0) > 1:
            tokens, divergence, kl = _sums(view, index, source, teacher).tolist()
            if tokens:
                found[source.name] = {"tokens": int(tokens), "divergence": divergence / tokens,
                                      "kl": kl / tokens}
                view.events.write("heldout_divergence", step=view.step, source=source.name,
                                  **found[source.name])
    return found


def _sums(view: GateView, index: int, source: Source, teacher: KeptTeacher) -> torch.Tensor:
    """Return [3] float64, on every process: learned tokens, and sums of divergence and KL over them."""
    config, world, shard = view.config, view.world, source.shard(SPLIT)
    seq_len, size = config.data.max_seq_len(), config.train.micro_batch_size
    samples = heldout_samples(shard, index, seq_len, config.data.heldout_tokens, whole=source.is_chat)
    samples += [OrderedSample(index, ())] * (-len(samples) % (size * world.dp_size))
    own = [from_row(join_rows([sample_row(s, shard, seq_len) for s in samples[i:i + size]]))
           for i in range(world.dp_rank * size, len(samples), size * world.dp_size)]

    def sums(hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> torch.Tensor:
        _, measured = head.divergence(hidden[0], teacher.at(batch, head, SPLIT), {}, teacher.divergence)
        learned = (teacher.heard(batch, SPLIT) > 0).double()
        return torch.stack([learned.sum(), (measured.divergence * learned).sum(),
                            (measured.kl * learned).sum()])

    parts = view.policy.map(own, sums)
    local = torch.stack(parts).sum(0).cpu() if parts else torch.zeros(3, dtype=torch.float64)
    return collectives.broadcast_from_last_stage(collectives.all_reduce_dp(local))
