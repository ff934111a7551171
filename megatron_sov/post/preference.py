"""Learning from responses that were judged: pairs (DPO, IPO, SimPO, ORPO, SimPER), groups with rewards
(GrouPER), and single ones, good or bad (KTO).

Each pair, or group, counts the same, whatever its length: denominators are numbers of pairs, or of groups, of
the whole global batch.

Of KTO (arXiv 2402.01306) each response stands beside a response to another prompt, behind its own prompt: how
much likelier than to the reference these are to the model estimates how far it has gone in all (the paper's
z_0).  That is one number for the whole global batch, and is found before its losses, by a forward pass more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from megatron_sov.base.documents.records import DESIRABLE
from megatron_sov.engine.data.requirements import NeededColumn
from megatron_sov.engine.mcore.model.logprobs import Head
from megatron_sov.engine.mcore.parallel import collectives
from megatron_sov.engine.mcore.parallel.values import sum_dict
from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.post_training import WITH_REFERENCE
from megatron_sov.post import reference
from megatron_sov.post.parts import preferences
from megatron_sov.post.parts.responses import Responses, learned, responses_of
from megatron_sov.train.objectives.data_batches import ObjectiveContext
from megatron_sov.train.objectives.data_objective import DataObjective
from megatron_sov.train.objectives.microbatch import MicroBatch
from megatron_sov.train.objectives.objective import GlobalBatch, LossSums, per_source, with_denominators

ADVANTAGE, SHARE = "advantage", "group_share"
"""Columns of groups: where a response stands in its group, and 1 / responses of the group."""
MADE_BY = "`sov-data unpaired`, and then `sov-data pack --format preference --column desirable`,"


class PairLearning(DataObjective):
    """``sum of the pairs' losses / pairs + chosen_coeff * CE(chosen) / its tokens`` (+ multi-token prediction
    on chosen responses)."""

    formats = ("preference",)
    columns: Mapping[str, NeededColumn] = {}
    meters: tuple[str, ...] = ("pairs_right", "margin", "chosen_logprob", "rejected_logprob")
    comparable_loss = False

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        self._asked = context.config.preference
        self.coefficients = {preferences.PREFERENCE: 1.0}
        if self._asked.method == "orpo":  # its eq. 6
            self.coefficients = {preferences.PREFERENCE: self._asked.strength, preferences.CHOSEN: 1.0}
        if self._asked.chosen_coeff > 0:
            self.coefficients[preferences.CHOSEN] = self._asked.chosen_coeff
        self.coefficients |= self._mtp_coefficient

    def prepare(self, batch: GlobalBatch) -> GlobalBatch:
        """Count the pairs of the global batch, and the chosen responses' tokens."""
        hosts = [m.host for m in batch.micro_batches]
        found = [responses_of(m) for m in hosts]
        targets = {preferences.PREFERENCE: sum(float(r.whole_pairs().sum()) for r in found)}
        chosen = [self._chosen(m, r) for m, r in zip(hosts, found, strict=True)]
        if preferences.CHOSEN in self.coefficients:
            targets[preferences.CHOSEN] = sum(float(m.weights.double().sum()) for m in chosen)
        return with_denominators(batch, targets | self._mtp_targets(chosen))

    def loss(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> LossSums:
        responses = responses_of(batch)
        logprobs = head.logprobs(hidden[0], batch.labels)
        sums = responses.sums(logprobs)
        losses, scores = self._losses(sums, batch, responses)
        whole = responses.whole_pairs()
        terms = self._terms((losses * whole).sum(), logprobs, hidden, head, self._chosen(batch, responses))
        margins, means = (scores[0::2] - scores[1::2]).detach(), responses.means(logprobs.detach())
        values = ((margins > 0).double(), margins, means[0::2], means[1::2])
        return LossSums(terms, _logged_losses(logprobs, batch, learned(batch), self._num_sources),
                        meters={name: ((value * whole).sum(), whole.sum())
                                for name, value in zip(self.meters, values, strict=True)})

    def _chosen(self, batch: MicroBatch, responses: Responses) -> MicroBatch:
        """Return the micro-batch with no other targets than those that cross-entropy learns."""
        return _only(batch, responses.of_side(0))

    def _terms(self, loss: torch.Tensor, logprobs: torch.Tensor, hidden: list[torch.Tensor], head: Head,
               chosen: MicroBatch) -> dict[str, torch.Tensor]:
        """Return the terms of a micro-batch: its preference `loss`, and what is learned of `chosen`."""
        terms = {preferences.PREFERENCE: loss}
        if preferences.CHOSEN in self.coefficients:
            # not a product: what is not learned may be impossible
            terms[preferences.CHOSEN] = -logprobs.double().where(chosen.weights > 0, 0.0).sum()
        return terms | self._mtp_sum(hidden, head, chosen)

    def _losses(self, sums: torch.Tensor, batch: MicroBatch,
                responses: Responses) -> tuple[torch.Tensor, torch.Tensor]:
        """Return [P] losses of the pairs, and [2 P] scores by which chosen and rejected are compared.

        Args:
            sums: [2 P] log-probabilities of the responses, chosen and rejected in turn.
            batch: theirs.
            responses: where they stand.
        """
        asked, means = self._asked, sums / responses.lengths.clamp(min=1)
        chosen, rejected = means[0::2], means[1::2]
        if asked.method == "simper":
            return preferences.simper(chosen, rejected), means
        if asked.method == "orpo":
            return preferences.orpo(chosen, rejected), means
        return (preferences.simpo(chosen, rejected, asked.strength, asked.simpo_gamma, asked.label_smoothing),
                asked.strength * means)


class PairLearningWithReference(PairLearning):
    """The same with losses that compare the model with the one that it started from."""

    columns = {reference.COLUMN: NeededColumn("`megatron-sov prefer`")}
    comparable_loss = True

    def _losses(self, sums: torch.Tensor, batch: MicroBatch,
                responses: Responses) -> tuple[torch.Tensor, torch.Tensor]:
        asked = self._asked
        ratios = sums - responses.sums(batch.columns[reference.COLUMN])
        if asked.method != "dpo":
            ratios = ratios / responses.lengths.clamp(min=1)
        margins = ratios[0::2] - ratios[1::2]
        losses = (preferences.ipo(margins, asked.strength) if asked.method == "ipo"
                  else preferences.dpo(margins, asked.strength, asked.label_smoothing))
        return losses, asked.strength * ratios


class GroupLearning(DataObjective):
    """GrouPER: ``sum over responses of loss / responses of its group / groups`` (+ multi-token prediction on
    all responses)."""

    formats = ("chat",)
    columns: Mapping[str, NeededColumn] = dict.fromkeys((ADVANTAGE, SHARE), NeededColumn(
        "`sov-data groups`, and then `sov-data pack --format chat --column advantage --column group_share`,"))
    meters = ("better_logprob", "worse_logprob")
    comparable_loss = False

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        self.coefficients = {preferences.PREFERENCE: 1.0} | self._mtp_coefficient

    def prepare(self, batch: GlobalBatch) -> GlobalBatch:
        """Count the groups of the global batch: parts of a group that lie in other batches count there."""
        hosts = [m.host for m in batch.micro_batches]
        groups = sum(float(responses_of(m).means(m.columns[SHARE]).sum()) for m in hosts)
        learning = [_only(m, learned(m)) for m in hosts]
        return with_denominators(batch, {preferences.PREFERENCE: groups} | self._mtp_targets(learning))

    def loss(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> LossSums:
        responses = responses_of(batch)
        logprobs = head.logprobs(hidden[0], batch.labels)
        means = responses.means(logprobs)
        advantages, shares = (responses.means(batch.columns[name]) for name in (ADVANTAGE, SHARE))
        terms = {preferences.PREFERENCE: (preferences.grouper(means, advantages) * shares).sum()}
        terms |= self._mtp_sum(hidden, head, _only(batch, learned(batch)))
        better, worse = ((advantages > 0).double(), (advantages < 0).double())
        return LossSums(terms, _logged_losses(logprobs, batch, learned(batch), self._num_sources),
                        meters={"better_logprob": ((means.detach() * better).sum(), better.sum()),
                                "worse_logprob": ((means.detach() * worse).sum(), worse.sum())})


def objective_of(config: RunConfig) -> type[PairLearning | GroupLearning | UnpairedLearning]:
    """Return what makes the objective of `preference.method`."""
    method = config.preference.method
    if method == "kto":
        return UnpairedLearning
    return (GroupLearning if method == "grouper" else PairLearningWithReference if method in WITH_REFERENCE
            else PairLearning)


def _only(batch: MicroBatch, labels: torch.Tensor) -> MicroBatch:
    """Return the micro-batch with no other targets than these labels [T] bool."""
    return dataclasses.replace(batch, weights=batch.weights * labels)


def _logged_losses(logprobs: torch.Tensor, batch: MicroBatch, counted: torch.Tensor,
                   num_sources: int) -> torch.Tensor:
    """Return what a log shows of each source: the cross-entropy of labels [T] bool, see `per_source`."""
    return per_source((-logprobs.detach()).where(counted, 0.0), counted.to(batch.weights.dtype),
                      batch.sources, num_sources)


class UnpairedLearning(PairLearning):
    """KTO: ``sum of the responses' losses / responses + chosen_coeff * CE(good ones) / its tokens`` (+
    multi-token prediction on good ones)."""

    columns = {reference.COLUMN: NeededColumn("`megatron-sov prefer`"), DESIRABLE: NeededColumn(MADE_BY)}
    meters = ("desirable_reward", "undesirable_reward", "distance")
    comparable_loss = True

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        self._distance = 0.0
        """The paper's z_0 for the step that is computed."""

    def collect(self, policy: object, step: int) -> GlobalBatch:
        """Return the next batch of the data order, with its distance from the reference found."""
        batch = super().collect(policy, step)
        self._distance = _distance(policy, batch)
        return batch

    def loss(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> LossSums:
        asked, responses = self._asked, responses_of(batch)
        logprobs = head.logprobs(hidden[0], batch.labels)
        ratios = _ratios(responses, logprobs, batch)[0::2]
        desirable, whole = _desirable(responses, batch), responses.whole_pairs()
        losses = preferences.kto(ratios, desirable, self._distance, asked.strength, asked.desirable_weight,
                                 asked.undesirable_weight)
        terms = self._terms((losses * whole).sum(), logprobs, hidden, head, self._chosen(batch, responses))
        rewards, sides = asked.strength * ratios.detach(), (desirable.double(), (~desirable).double())
        own = learned(batch) & responses.of_side(0)
        return LossSums(
            terms, _logged_losses(logprobs, batch, own, self._num_sources),
            meters={name: ((rewards * side * whole).sum(), (side * whole).sum())
                    for name, side in zip(self.meters, sides, strict=False)}
            | {"distance": (self._distance * whole.sum(), whole.sum())})

    def _chosen(self, batch: MicroBatch, responses: Responses) -> MicroBatch:
        desirable = _desirable(responses, batch)
        good = torch.stack([desirable, torch.zeros_like(desirable)], 1)
        return _only(batch, responses.of_side(0) & (responses.spread(good.flatten().double()) > 0))


def _distance(policy: object, batch: GlobalBatch) -> float:
    """Return z_0: the mean over the global batch of the log-ratios of mismatched responses, 0 where it is
    less; on the last pipeline stage, which alone needs it."""
    def outputs(hidden: list[torch.Tensor], head: Head, micro_batch: MicroBatch) -> torch.Tensor:
        responses = responses_of(micro_batch)
        ratios = _ratios(responses, head.logprobs(hidden[0], micro_batch.labels), micro_batch)[1::2]
        whole = responses.whole_pairs()
        return torch.stack([(ratios * whole).sum(), whole.sum()])

    found = policy.map(batch.micro_batches, outputs)  # type: ignore[attr-defined]
    total, count = torch.stack(found).sum(0).tolist() if found else (0.0, 0.0)
    sums = sum_dict({"total": total, "count": count}, collectives.all_reduce_dp)
    return max(sums["total"] / sums["count"], 0.0) if sums["count"] else 0.0


def _ratios(responses: Responses, logprobs: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Return [R] how much likelier each response is than to the reference, as a logarithm."""
    return responses.sums(logprobs) - responses.sums(batch.columns[reference.COLUMN])


def _desirable(responses: Responses, batch: MicroBatch) -> torch.Tensor:
    """Return [R / 2] bool: which responses were judged good."""
    return responses.means(batch.columns[DESIRABLE])[0::2] > 0.5
