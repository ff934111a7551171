"""Learning from responses that were judged: pairs (DPO, IPO, SimPO, ORPO, SimPER), groups with rewards
(GrouPER), and single ones, good or bad (KTO); accuracy and margin of pairs, in training and held out.

Losses are functions of the responses' log-probabilities, in float64.  P: pairs, chosen and rejected; a margin
is what the chosen response has before the rejected one, of the logarithm of policy over reference.  Each
pair, or group, counts the same, whatever its length: denominators are numbers of pairs, or of groups, of the
whole global batch.

Of KTO (arXiv 2402.01306) each response has a response to another prompt next to it, after its own prompt: how
much likelier than to the reference these are to the model estimates how far it has gone in all (the paper's
z_0).  That is one number for the whole global batch, and is found before its losses, by a forward pass more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from megatron_sov.base.documents import ROLLOUTS
from megatron_sov.base.documents.records import DESIRABLE
from megatron_sov.chat.encode import TYPE_RESPONSE
from megatron_sov.engine.model.logprobs import Head
from megatron_sov.engine.parallel import collectives
from megatron_sov.engine.parallel.values import sum_dict
from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.post_training import WITH_REFERENCE, PreferenceConfig
from megatron_sov.post import policy, reference
from megatron_sov.post.reference import document_logprobs
from megatron_sov.post.sft import Responses, learned, responses_of
from megatron_sov.post.shared_prompts import share_prompts
from megatron_sov.runs.obs.meters import Meter
from megatron_sov.runs.obs.validation import VALIDATION
from megatron_sov.train.data.requirements import NeededColumn
from megatron_sov.train.data.rounds import ADVANTAGE, SHARE
from megatron_sov.train.data.token_shards import Documents, Source
from megatron_sov.train.objectives.data_batches import ObjectiveContext
from megatron_sov.train.objectives.data_objective import DataObjective
from megatron_sov.train.objectives.microbatch import MicroBatch
from megatron_sov.train.objectives.objective import GlobalBatch, LossSums, per_source, with_denominators
from megatron_sov.train.stages.gate import GateView

PREFERENCE, CHOSEN = "preference", "chosen"
"""Parts of a loss: of preferences, and cross-entropy of responses that were chosen."""
PAIRS_RIGHT, MARGIN, CHOSEN_LIKELIER = "pairs_right", "margin", "chosen_likelier"
"""Figures of pairs: see `pair_meters` and `measure_pairs`."""
HELDOUT_PAIRS = "heldout_pairs"
"""Event with the figures of a source's held-out pairs."""


def dpo(margins: torch.Tensor, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """Return [P] losses of direct preference optimisation (arXiv 2305.18290, eq. 7; smoothing: eq. 3 of
    "A note on DPO with noisy preferences", Mitchell 2023).

    Args:
        margins: [P], of sums over responses, or of means (Tülu 3, arXiv 2411.15124, eq. 6).
        beta: strength of the reference.
        label_smoothing: share of pairs that are the wrong way round.
    """
    # logsigmoid, not log of sigmoid: margins of long responses are large, and would round to log 0.
    return (-(1 - label_smoothing) * logsigmoid(beta * margins)
            - label_smoothing * logsigmoid(-beta * margins))


def ipo(margins: torch.Tensor, beta: float) -> torch.Tensor:
    """Return [P] losses of identity preference optimisation (arXiv 2310.12036, eq. 17).

    Args:
        margins: [P] of means over responses, as the paper's authors have it in their code.
        beta: the paper's tau.
    """
    return (margins - 1 / (2 * beta)) ** 2


def kto(ratios: torch.Tensor, desirable: torch.Tensor, distance: float, beta: float,
        desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> torch.Tensor:
    """Return [N] losses of Kahneman-Tversky optimisation (arXiv 2402.01306, eq. 8), without the constant
    weight of each response.

    Args:
        ratios: [N] logarithm of policy over reference of each response.
        desirable: [N] bool: which of them were judged good.
        distance: z_0, how far the policy has gone from the reference in all.
        beta: strength of the reference.
        desirable_weight: of good ones.
        undesirable_weight: of bad ones.
    """
    # Only the ratios have a gradient: the distance is a number of the whole step.
    ahead = beta * (ratios - distance)
    return torch.where(desirable, desirable_weight * (1 - ahead.sigmoid()),
                       undesirable_weight * (1 - (-ahead).sigmoid()))


def simper(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Return [P] losses of SimPER (arXiv 2502.00883, eq. 6): inverse perplexities, those of the chosen
    responses up, those of the rejected ones down.

    Args:
        chosen: [P] means of log-probabilities over the chosen responses.
        rejected: the same of the rejected ones.
    """
    return rejected.exp() - chosen.exp()


def simpo(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, gamma: float,
          label_smoothing: float = 0.0) -> torch.Tensor:
    """Return [P] losses of SimPO (arXiv 2405.14734, eq. 6): `dpo` without a reference, over means, with a
    margin that the chosen response has to have.

    Args:
        chosen: [P] means of log-probabilities over the chosen responses.
        rejected: the same of the rejected ones.
        beta: how steeply the loss falls with the difference of the means.
        gamma: the margin, in units of beta times log-probability, as in the paper.
        label_smoothing: as of `dpo`.
    """
    return dpo(chosen - rejected - gamma / beta, beta, label_smoothing)


def orpo(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Return [P] odds ratio losses of ORPO (arXiv 2403.07691, eq. 7), without the weight and the
    cross-entropy that stand beside them in its eq. 6.

    Args:
        chosen: [P] means of log-probabilities over the chosen responses.
        rejected: the same of the rejected ones.
    """
    return -logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(means: torch.Tensor) -> torch.Tensor:
    """Return log(p / (1 - p)) of p = exp(means), finite where p rounds to 1."""
    # p = 1 has infinite odds.  Above one half expm1 keeps the digits of 1 - p, below it log1p does.
    certain = means.clamp(max=-2.0**-40)
    return certain - torch.where(certain > -math.log(2), (-certain.expm1()).log(), (-certain.exp()).log1p())


def grouper(means: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Return [R] losses of GrouPER (K-EXAONE's technical report): SimPER over groups.

    Args:
        means: [R] means of log-probabilities over the responses.
        advantages: [R] from -1, the worst of a group, to 1, the best.
    """
    return -advantages * means.exp()


def compared_values(asked: PreferenceConfig, sums: torch.Tensor, lengths: torch.Tensor,
                    reference_sums: torch.Tensor | None = None) -> torch.Tensor:
    """Return [2 P] float64: the value by which a method compares each response, before its strength.

    Args:
        asked: the method.
        sums: [2 P] float64 log-probabilities of the responses, chosen and rejected in turn.
        lengths: [2 P] tokens of the responses.
        reference_sums: [2 P] the same sums of the reference; None: the method has no reference.
    """
    ratios = sums if reference_sums is None else sums - reference_sums
    # DPO compares whole responses, all other methods the means over their tokens.
    return ratios if asked.method == "dpo" else ratios / lengths.clamp(min=1)


def pair_meters(asked: PreferenceConfig, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return "pairs_right" and "margin" [P] float64 of pairs, in training and on held-out pairs.

    TRL's rewards/accuracies and rewards/margins, except that a tie counts half: a model that equals its
    reference has an accuracy of 50 %, not 0 %.

    Args:
        asked: the method and its strength.
        values: [2 P] as `compared_values` returns them.
    """
    strength = 1.0 if asked.method in ("simper", "orpo") else asked.strength
    rewards = strength * values
    margins = rewards[0::2] - rewards[1::2]
    return {PAIRS_RIGHT: (margins > 0).double() + (margins == 0).double() / 2, MARGIN: margins}


MAX_PAIRS = 2048
"""Most held-out pairs of a source that are measured."""
LogprobsOf = Callable[[Documents, range], np.ndarray]
"""(documents, which of them) -> their tokens' log-probabilities as `document_logprobs` returns them."""
ReferenceOf = Callable[[Source], np.ndarray | None]
"""Source -> the reference's log-probabilities of `heldout_documents`; None: they are not known."""


def heldout_documents(source: Source) -> range:
    """Return the held-out documents of a source that are measured: chosen and rejected in turn."""
    if not source.num_tokens.get("heldout"):
        return range(0)
    return range(min(len(source.shard("heldout").lengths), 2 * MAX_PAIRS))


def measure_heldout_pairs(view: GateView, sources: Sequence[Source], reference_of: ReferenceOf | None
                          ) -> dict[str, dict[str, Any]]:
    """Measure the held-out pairs of a run, and record them; called by all processes together.

    Args:
        view: the run.
        sources: preferences.
        reference_of: source -> the reference's log-probabilities of `heldout_documents`; None: the method
            has no reference.  Where it returns None, `pair_meters` are left out.
    """
    seq_len, size = view.config.data.max_seq_len(), view.config.train.micro_batch_size
    found = measure_pairs(sources, lambda documents, chosen: document_logprobs(
        view, documents, chosen, seq_len, size), seq_len, view.config.preference, reference_of)
    for name, figures in found.items():
        view.events.write(HELDOUT_PAIRS, step=view.step, source=name, **figures)
    return found


def measure_pairs(sources: Sequence[Source], logprobs_of: LogprobsOf, seq_len: int,
                  asked: PreferenceConfig | None = None,
                  reference_of: ReferenceOf | None = None) -> dict[str, dict[str, Any]]:
    """Measure the held-out pairs of each source that has some.

    Args:
        sources: preferences.
        logprobs_of: computes the model's log-probabilities.
        seq_len: tokens of a document that are read.
        asked: the method whose meters are measured too; None: none.
        reference_of: see `measure_heldout_pairs`.

    Returns:
        Source -> `pairs`; `chosen_likelier`, the share of pairs whose chosen response has the greater
        log-probability per token; with `asked` the means of `pair_meters`.  Ties count half.  A pair with a
        response that begins after `seq_len` tokens is left out.
    """
    found = {}
    for source in sources:
        chosen = heldout_documents(source)
        if not chosen:
            continue
        documents = source.shard("heldout")
        learned = [_learned_tokens(documents, document, seq_len) for document in chosen]
        lengths = torch.tensor([float(mask.sum()) for mask in learned], dtype=torch.float64)
        # A pair's documents follow each other, the chosen one first.
        whole = (lengths.reshape(-1, 2) > 0).all(dim=1)
        if not whole.any():
            continue
        both = whole.repeat_interleave(2)
        sums, lengths = _learned_sums(logprobs_of(documents, chosen), learned)[both], lengths[both]
        means = sums / lengths
        figures = {CHOSEN_LIKELIER: _share_above(means[0::2] - means[1::2])}
        numbers = None if reference_of is None else reference_of(source)
        if asked is not None and (reference_of is None or numbers is not None):
            reference_sums = None if numbers is None else _learned_sums(numbers, learned)[both]
            meters = pair_meters(asked, compared_values(asked, sums, lengths, reference_sums))
            figures |= {name: float(values.mean()) for name, values in meters.items()}
        found[source.name] = {"pairs": int(whole.sum()), **figures}
    return found


def _share_above(differences: torch.Tensor) -> float:
    """Return the share of numbers above 0; a 0 counts half."""
    return float(((differences > 0).double() + (differences == 0).double() / 2).mean())


def _learned_tokens(documents: Documents, document: int, seq_len: int) -> np.ndarray:
    """Return [tokens] bool: the learned tokens of a document, as far as `seq_len` reaches."""
    length = int(documents.lengths[document])
    learned: np.ndarray = ((documents.types(document, 0, length) == TYPE_RESPONSE)
                           & (documents.loss_weights(document, 0, length) > 0))
    # The first token is no label; those after the last label of a sample have no number.
    learned[:1] = learned[seq_len + 1:] = False
    return learned


def _learned_sums(logprobs: np.ndarray, learned: Sequence[np.ndarray]) -> torch.Tensor:
    """Return [documents] float64: the sum of each document's learned log-probabilities.

    Args:
        logprobs: [tokens of all documents].
        learned: of each document, [tokens] bool.
    """
    ends = np.cumsum([len(mask) for mask in learned])[:-1]
    return torch.tensor([float(numbers[mask].astype(np.float64).sum())
                         for numbers, mask in zip(np.split(logprobs, ends), learned, strict=True)],
                        dtype=torch.float64)


MADE_BY = "`sov-data unpaired`, and then `sov-data pack --format preference --column desirable`,"


class PairLearning(DataObjective):
    """``sum of the pairs' losses / pairs + chosen_coeff * CE(chosen) / its tokens`` (+ multi-token prediction
    on chosen responses)."""

    formats = ("preference",)
    columns: Mapping[str, NeededColumn] = {}
    meters: tuple[str, ...] = (PAIRS_RIGHT, MARGIN, "chosen_logprob", "rejected_logprob")
    comparable_loss = False
    headline: tuple[Meter, ...] = (
        Meter(PAIRS_RIGHT, "pairs right", "share", "higher", heldout=f"{HELDOUT_PAIRS}.{PAIRS_RIGHT}"),
        Meter(MARGIN, better="higher", heldout=f"{HELDOUT_PAIRS}.{MARGIN}"))

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        self._asked = context.config.preference
        self.coefficients = {PREFERENCE: 1.0}
        if self._asked.method == "orpo":  # its eq. 6
            self.coefficients = {PREFERENCE: self._asked.strength, CHOSEN: 1.0}
        if self._asked.chosen_coeff > 0:
            self.coefficients[CHOSEN] = self._asked.chosen_coeff
        self.coefficients |= self._mtp_coefficient

    def prepare(self, batch: GlobalBatch) -> GlobalBatch:
        """Count the pairs of the global batch, and the chosen responses' tokens."""
        hosts = [m.host for m in batch.micro_batches]
        found = [responses_of(m) for m in hosts]
        targets = {PREFERENCE: sum(float(r.whole_pairs().sum()) for r in found)}
        chosen = [self._cross_entropy_batch(m, r) for m, r in zip(hosts, found, strict=True)]
        if CHOSEN in self.coefficients:
            targets[CHOSEN] = sum(float(m.weights.double().sum()) for m in chosen)
        return with_denominators(batch, targets | self._mtp_targets(chosen))

    def loss(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> LossSums:
        responses = responses_of(batch)
        # One pass of the head serves the preference, cross-entropy and what the log shows.
        logprobs = head.logprobs(hidden[0], batch.labels)
        sums = responses.sums(logprobs)
        losses, compared = self._losses(sums, batch, responses)
        whole = responses.whole_pairs()
        terms = self._terms((losses * whole).sum(), logprobs, hidden, head,
                            self._cross_entropy_batch(batch, responses))
        # A pair that was cut off still has numbers; `whole` takes them out of every sum.
        found, means = pair_meters(self._asked, compared.detach()), responses.means(logprobs.detach())
        values = (found[PAIRS_RIGHT], found[MARGIN], means[0::2], means[1::2])
        return LossSums(terms, _logged_losses(logprobs, batch, learned(batch), self._num_sources),
                        meters={name: ((value * whole).sum(), whole.sum())
                                for name, value in zip(self.meters, values, strict=True)})

    def _cross_entropy_batch(self, batch: MicroBatch, responses: Responses) -> MicroBatch:
        return _only(batch, responses.of_side(0))

    def _terms(self, loss: torch.Tensor, logprobs: torch.Tensor, hidden: list[torch.Tensor], head: Head,
               chosen: MicroBatch) -> dict[str, torch.Tensor]:
        """Return the terms of a micro-batch: its preference `loss`, and what is learned of `chosen`."""
        terms = {PREFERENCE: loss}
        if CHOSEN in self.coefficients:
            # not a product: what is not learned may be impossible
            terms[CHOSEN] = -logprobs.double().where(chosen.weights > 0, 0.0).sum()
        return terms | self._mtp_sum(hidden, head, chosen)

    def _losses(self, sums: torch.Tensor, batch: MicroBatch,
                responses: Responses) -> tuple[torch.Tensor, torch.Tensor]:
        """Return [P] losses of the pairs, and [2 P] `compared_values`.

        Args:
            sums: [2 P] log-probabilities of the responses, chosen and rejected in turn.
            batch: theirs.
            responses: where they stand.
        """
        asked = self._asked
        means = compared_values(asked, sums, responses.lengths)
        chosen, rejected = means[0::2], means[1::2]
        if asked.method == "simper":
            return simper(chosen, rejected), means
        if asked.method == "orpo":
            return orpo(chosen, rejected), means
        return simpo(chosen, rejected, asked.strength, asked.simpo_gamma, asked.label_smoothing), means


class PairLearningWithReference(PairLearning):
    """The same with losses that compare the model with the one that it started from."""

    columns = {reference.COLUMN: NeededColumn("`megatron-sov prefer`")}
    comparable_loss = True

    def _losses(self, sums: torch.Tensor, batch: MicroBatch,
                responses: Responses) -> tuple[torch.Tensor, torch.Tensor]:
        ratios = compared_values(self._asked, sums, responses.lengths,
                                 self._reference_sums(sums, batch, responses))
        return self.pair_loss(ratios[0::2] - ratios[1::2]), ratios

    def _reference_sums(self, sums: torch.Tensor, batch: MicroBatch, responses: Responses) -> torch.Tensor:
        """Return [2 P] log-probabilities of the responses by the reference; `sums` are the policy's."""
        return responses.sums(batch.columns[reference.COLUMN])

    def pair_loss(self, margins: torch.Tensor) -> torch.Tensor:
        """Return [P] float64 the loss of each pair; a class of your own says it otherwise.

        Args:
            margins: [P] logarithm of policy over reference of the chosen response, less that of the rejected
                one: of whole responses with method dpo, else means over their tokens.
        """
        asked = self._asked
        return (ipo(margins, asked.strength) if asked.method == "ipo"
                else dpo(margins, asked.strength, asked.label_smoothing))


class GroupLearning(DataObjective):
    """GrouPER: ``sum over responses of loss / responses of its group / groups`` (+ multi-token prediction on
    all responses)."""

    formats = ("chat",)
    columns: Mapping[str, NeededColumn] = dict.fromkeys((ADVANTAGE, SHARE), NeededColumn(
        "`sov-data groups`, and then `sov-data pack --format chat --column advantage --column group_share`,"))
    meters = ("better_logprob", "worse_logprob")
    comparable_loss = False
    headline: tuple[Meter, ...] = (
        Meter("better_logprob", "log p of better responses", better="higher"),
        Meter("worse_logprob", "of worse ones", better="lower"))

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        self.coefficients = {PREFERENCE: 1.0} | self._mtp_coefficient

    def prepare(self, batch: GlobalBatch) -> GlobalBatch:
        """Count the groups of the global batch: parts of a group that lie in other batches count there."""
        hosts = [m.host for m in batch.micro_batches]
        # The shares of a group add up to 1, in whichever batches its responses are.
        groups = sum(float(responses_of(m).means(m.columns[SHARE]).sum()) for m in hosts)
        learning = [_only(m, learned(m)) for m in hosts]
        return with_denominators(batch, {PREFERENCE: groups} | self._mtp_targets(learning))

    def loss(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> LossSums:
        responses = responses_of(batch)
        logprobs = head.logprobs(hidden[0], batch.labels)
        means = responses.means(logprobs)
        advantages, shares = (responses.means(batch.columns[name]) for name in (ADVANTAGE, SHARE))
        terms = {PREFERENCE: (grouper(means, advantages) * shares).sum()}
        terms |= self._mtp_sum(hidden, head, _only(batch, learned(batch)))
        better, worse = ((advantages > 0).double(), (advantages < 0).double())
        return LossSums(terms, _logged_losses(logprobs, batch, learned(batch), self._num_sources),
                        meters={"better_logprob": ((means.detach() * better).sum(), better.sum()),
                                "worse_logprob": ((means.detach() * worse).sum(), worse.sum())})


def objective_of(config: RunConfig) -> type[PairLearning | GroupLearning | UnpairedLearning]:
    method = config.preference.method
    if method == "kto":
        return UnpairedLearning
    if method == "grouper":
        return GroupLearning
    return PairLearningWithReference if method in WITH_REFERENCE else PairLearning


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
    headline = (Meter("desirable_reward", "reward of good responses", better="higher"),
                Meter("undesirable_reward", "of bad ones", better="lower"))

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        self._distance = 0.0
        """The paper's z_0 for the step that is computed."""

    def collect(self, policy: object, step: int) -> GlobalBatch:
        """Return the next batch of the data order, with its distance from the reference found."""
        # Before the losses: every response of the step is compared with one distance.
        batch = super().collect(policy, step)
        self._distance = _distance(policy, batch)
        return batch

    def loss(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> LossSums:
        asked, responses = self._asked, responses_of(batch)
        logprobs = head.logprobs(hidden[0], batch.labels)
        # Even documents are the judged responses; the odd ones are mismatched, and `_distance` reads them.
        ratios = _ratios(responses, logprobs, batch)[0::2]
        desirable, whole = _desirable(responses, batch), responses.whole_pairs()
        losses = kto(ratios, desirable, self._distance, asked.strength, asked.desirable_weight,
                                 asked.undesirable_weight)
        terms = self._terms((losses * whole).sum(), logprobs, hidden, head,
                            self._cross_entropy_batch(batch, responses))
        rewards, sides = asked.strength * ratios.detach(), (desirable.double(), (~desirable).double())
        own = learned(batch) & responses.of_side(0)
        return LossSums(
            terms, _logged_losses(logprobs, batch, own, self._num_sources),
            meters={name: ((rewards * side * whole).sum(), (side * whole).sum())
                    for name, side in zip(self.meters, sides, strict=False)}
            | {"distance": (self._distance * whole.sum(), whole.sum())})

    def _cross_entropy_batch(self, batch: MicroBatch, responses: Responses) -> MicroBatch:
        desirable = _desirable(responses, batch)
        # One number for each document again: the mismatched neighbour teaches nothing.
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

    # Forward only, on the last stage; other stages and ranks add nothing and share the sum.
    found = policy.map(batch.micro_batches, outputs)  # type: ignore[attr-defined]
    total, count = torch.stack(found).sum(0).tolist() if found else (0.0, 0.0)
    sums = sum_dict({"total": total, "count": count}, collectives.all_reduce_dp)
    # A negative estimate of a divergence is noise.
    return max(sums["total"] / sums["count"], 0.0) if sums["count"] else 0.0


def _ratios(responses: Responses, logprobs: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Return [R] how much likelier each response is than to the reference, as a logarithm."""
    return responses.sums(logprobs) - responses.sums(batch.columns[reference.COLUMN])


def _desirable(responses: Responses, batch: MicroBatch) -> torch.Tensor:
    """Return [R / 2] bool: which responses were judged good."""
    return responses.means(batch.columns[DESIRABLE])[0::2] > 0.5


# Rounds of a model's own responses (`policy.method = preference`): the same losses.  The better response of a
# pair is published first, as it is packed.

OF_ROUNDS = (Meter(policy.REWARD, better="higher", heldout=f"{VALIDATION}.reward"),
             Meter(policy.RESPONSE_TOKENS, "response length", "tokens"),
             Meter(policy.GROUPS_LEARNING, "groups that learn", "share", "higher"))


class LearningOfRounds(DataObjective):
    """Stands before a class of losses, and has it learn from rounds: a prompt is computed once in a
    micro-batch."""

    formats = (ROLLOUTS,)
    comparable_loss = False

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        self._config = context.config

    def prepare(self, batch: GlobalBatch) -> GlobalBatch:
        """As the class of losses does; what it counts is counted before prompts are shared."""
        counted = super().prepare(batch)  # type: ignore[misc]  # of the class behind this one
        return share_prompts(counted, self._config)


class RoundPairs(LearningOfRounds, PairLearning):
    """`PairLearning` of rounds."""

    headline = (OF_ROUNDS[0], PairLearning.headline[0], *OF_ROUNDS[1:])


class RoundPairsWithReference(LearningOfRounds, PairLearningWithReference):
    """`PairLearningWithReference` of rounds: the reference begins the round, or the run."""

    headline = RoundPairs.headline

    def _reference_sums(self, sums: torch.Tensor, batch: MicroBatch, responses: Responses) -> torch.Tensor:
        found = responses.sums(batch.columns[_reference_of(self._config)])
        # a round's first step is at the weights that begin it, and has no numbers but its own
        return torch.where(found.isnan(), sums.detach(), found)


class RoundGroups(LearningOfRounds, GroupLearning):
    """`GroupLearning` of rounds."""

    headline = (OF_ROUNDS[0], *GroupLearning.headline, *OF_ROUNDS[1:])


def _reference_of(config: RunConfig) -> str:
    return policy.OLD if config.policy.reference == "round" else policy.REFERENCE


def round_objective_of(config: RunConfig) -> policy.PolicyObjective:
    """Return what makes the objective of `policy.method = preference`."""
    method, needed = config.preference.method, NeededColumn("`megatron-sov rl train`")
    kind: type[LearningOfRounds] = RoundPairs
    columns: dict[str, NeededColumn] = {}
    if method == "grouper":
        kind, columns = RoundGroups, dict.fromkeys((ADVANTAGE, SHARE), needed)
    elif method in WITH_REFERENCE:
        kind, columns = RoundPairsWithReference, {_reference_of(config): needed}
    return policy.PolicyObjective((ROLLOUTS,), columns, kind)
