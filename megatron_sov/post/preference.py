"""Preference losses: pairs (DPO, IPO, SimPO, ORPO, SimPER), groups with rewards (GrouPER), and single
responses (KTO).

Losses are functions of log-probabilities of whole responses, in float64. P is the number of pairs. The margin
of a pair is the log ratio of policy to reference of the chosen response minus that of the rejected response.
Each pair, or group, counts the same at any length: denominators count pairs, or groups, of the whole global
batch.

For KTO (arXiv 2402.01306) each response is followed by a response to another prompt, after its own prompt.
The log ratios of these mismatched responses estimate the divergence of the policy (z_0), one number per
global batch, which takes an extra forward pass before the losses.
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
from megatron_sov.model.config.post_training import REFERENCE_METHODS, PreferenceConfig
from megatron_sov.post import policy, reference
from megatron_sov.post.reference import score_documents
from megatron_sov.post.sft import ResponseSpans, find_learned_labels, find_responses
from megatron_sov.post.shared_prompts import share_prompts
from megatron_sov.runs.obs.meters import Meter
from megatron_sov.runs.obs.validation import VALIDATION
from megatron_sov.train.data.requirements import NeededColumn
from megatron_sov.train.data.rounds import ADVANTAGE, GROUP_SHARE
from megatron_sov.train.data.token_shards import Documents, Source
from megatron_sov.train.guards.gate import GateView
from megatron_sov.train.objectives.data_batches import ObjectiveContext
from megatron_sov.train.objectives.data_objective import DataObjective
from megatron_sov.train.objectives.microbatch import MicroBatch
from megatron_sov.train.objectives.objective import GlobalBatch, LossSums, per_source, with_denominators

PREFERENCE, CHOSEN = "preference", "chosen"
"""Loss terms: preferences, and cross-entropy on chosen responses."""
PAIRS_RIGHT, MARGIN, CHOSEN_LIKELIER = "pairs_right", "margin", "chosen_likelier"
"""Meters for pairs, see `compute_pair_meters` and `measure_pairs`."""
HELDOUT_PAIRS = "heldout_pairs"
"""Event with the meters for a source's held-out pairs."""
MAX_PAIRS = 2048
"""Limit for measured held-out pairs per source."""
LogprobsOf = Callable[[Documents, range], np.ndarray]
"""(documents, indices) -> log-probabilities of their tokens, see `score_documents`."""
ReferenceOf = Callable[[Source], np.ndarray | None]
"""Source -> reference log-probabilities for `find_heldout_documents`; None if unknown."""
MADE_BY = "`sov-data unpaired`, and then `sov-data pack --format preference --column desirable`,"


def dpo(margins: torch.Tensor, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """Return the loss of each pair by direct preference optimisation, [P] (arXiv 2305.18290, eq. 7;
    smoothing: eq. 3 of "A note on DPO with noisy preferences", Mitchell 2023).

    Args:
        margins: [P] differences of sums over responses, or of means (Tülu 3, arXiv 2411.15124, eq. 6).
        beta: strength of the reference.
        label_smoothing: share of pairs with the wrong order.
    """
    # logsigmoid instead of log(sigmoid): large margins between long responses would round to log 0.
    return (-(1 - label_smoothing) * logsigmoid(beta * margins)
            - label_smoothing * logsigmoid(-beta * margins))


def ipo(margins: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the loss of each pair by identity preference optimisation, [P] (arXiv 2310.12036, eq. 17).

    Args:
        margins: [P] differences of means over responses, as in the authors' code.
        beta: the paper's tau.
    """
    return (margins - 1 / (2 * beta)) ** 2


def kto(ratios: torch.Tensor, desirable: torch.Tensor, distance: float, beta: float,
        desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> torch.Tensor:
    """Return the loss of each response by Kahneman-Tversky optimisation, [N] (arXiv 2402.01306, eq. 8),
    without the constant weight of each response.

    Args:
        ratios: [N] log ratio of policy to reference of each response.
        desirable: [N] bool: responses that were judged good.
        distance: z_0, the estimated divergence of the policy from the reference.
        beta: strength of the reference.
        desirable_weight: weight of good responses.
        undesirable_weight: weight of bad responses.
    """
    # The distance is constant within a step: only the ratios have a gradient.
    scaled = beta * (ratios - distance)
    return torch.where(desirable, desirable_weight * (1 - scaled.sigmoid()),
                       undesirable_weight * (1 - (-scaled).sigmoid()))


def simper(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Return the loss of each pair by SimPER, [P] (arXiv 2502.00883, eq. 6): it raises the inverse perplexity
    of chosen responses and lowers that of rejected responses.

    Args:
        chosen: [P] mean log-probabilities of the chosen responses.
        rejected: [P] mean log-probabilities of the rejected responses.
    """
    return rejected.exp() - chosen.exp()


def simpo(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, gamma: float,
          label_smoothing: float = 0.0) -> torch.Tensor:
    """Return the loss of each pair by SimPO, [P] (arXiv 2405.14734, eq. 6): `dpo` of means without a
    reference, with a target margin.

    Args:
        chosen: [P] mean log-probabilities of the chosen responses.
        rejected: [P] mean log-probabilities of the rejected responses.
        beta: slope of the loss in the difference of the means.
        gamma: the target margin, in units of beta times log-probability, as in the paper.
        label_smoothing: see `dpo`.
    """
    return dpo(chosen - rejected - gamma / beta, beta, label_smoothing)


def orpo(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Return the odds ratio loss of each pair by ORPO, [P] (arXiv 2403.07691, eq. 7), without the weight and
    the cross-entropy of its eq. 6.

    Args:
        chosen: [P] mean log-probabilities of the chosen responses.
        rejected: [P] mean log-probabilities of the rejected responses.
    """
    return -logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(means: torch.Tensor) -> torch.Tensor:
    """Return log(p / (1 - p)) for p = exp(means), finite if p rounds to 1."""
    # Above one half expm1 keeps the digits of 1 - p, below one half log1p does.
    certain = means.clamp(max=-2.0**-40)
    return certain - torch.where(certain > -math.log(2), (-certain.expm1()).log(), (-certain.exp()).log1p())


def grouper(means: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Return the loss of each response by GrouPER, [R] (K-EXAONE's technical report): SimPER over groups.

    Args:
        means: [R] mean log-probabilities of the responses.
        advantages: [R] from -1 for the worst response of a group to 1 for the best.
    """
    return -advantages * means.exp()


def compare_values(asked: PreferenceConfig, sums: torch.Tensor, lengths: torch.Tensor,
                    reference_sums: torch.Tensor | None = None) -> torch.Tensor:
    """Return the value by which a method compares each response, [2 P] float64, without `beta`.

    Args:
        asked: the settings of the method.
        sums: [2 P] float64 log-probabilities of chosen and rejected responses, alternating.
        lengths: [2 P] tokens of the responses.
        reference_sums: [2 P] log-probabilities by the reference; None: the method has no reference.
    """
    ratios = sums if reference_sums is None else sums - reference_sums
    # DPO compares whole responses, other methods means over tokens.
    return ratios if asked.method == "dpo" else ratios / lengths.clamp(min=1)


def compute_pair_meters(asked: PreferenceConfig, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the meters "pairs_right" and "margin" of each pair, [P] float64.

    They equal TRL's rewards/accuracies and rewards/margins, except that a tie counts half: a model that
    equals its reference has an accuracy of 50 %, not 0 %.

    Args:
        asked: the method and its strength.
        values: [2 P] from `compare_values`.
    """
    strength = 1.0 if asked.method in ("simper", "orpo") else asked.effective_beta
    rewards = strength * values
    margins = rewards[0::2] - rewards[1::2]
    return {PAIRS_RIGHT: (margins > 0).double() + (margins == 0).double() / 2, MARGIN: margins}


def find_heldout_documents(source: Source) -> range:
    """Return a source's measured held-out documents, chosen and rejected alternating."""
    if not source.num_tokens.get("heldout"):
        return range(0)
    return range(min(len(source.open_split("heldout").lengths), 2 * MAX_PAIRS))


def measure_heldout_pairs(view: GateView, sources: Sequence[Source], reference_of: ReferenceOf | None
                          ) -> dict[str, dict[str, Any]]:
    """Measure the held-out pairs of a run, and record them; called by all processes together.

    Args:
        view: the run.
        sources: preferences.
        reference_of: see `ReferenceOf`; if it returns None, pair meters are left out. None: the method has
            no reference.
    """
    seq_len, size = view.config.data.max_seq_len(), view.config.train.micro_batch_size

    def logprobs_of(documents: Documents, chosen: range) -> np.ndarray:
        return score_documents(view, documents, chosen, seq_len, size)

    source_figures = measure_pairs(sources, logprobs_of, seq_len, view.config.preference, reference_of)
    for name, figures in source_figures.items():
        view.events.write(HELDOUT_PAIRS, step=view.step, source=name, **figures)
    return source_figures


def measure_pairs(sources: Sequence[Source], logprobs_of: LogprobsOf, seq_len: int,
                  asked: PreferenceConfig | None = None,
                  reference_of: ReferenceOf | None = None) -> dict[str, dict[str, Any]]:
    """Measure the held-out pairs in each source.

    Args:
        sources: preferences.
        logprobs_of: computes log-probabilities by the model.
        seq_len: number of tokens of a document that the model reads.
        asked: method whose meters are measured too; None: no meters.
        reference_of: see `measure_heldout_pairs`.

    Returns:
        Source -> `pairs`; `chosen_likelier`, the share of pairs whose chosen response has the greater
        log-probability per token; with `asked` the means of `compute_pair_meters`. Ties count half. Pairs
        with a response that begins after `seq_len` tokens are left out.
    """
    source_figures = {}
    for source in sources:
        chosen = find_heldout_documents(source)
        if not chosen:
            continue
        documents = source.open_split("heldout")
        learned = [_learned_tokens(documents, document, seq_len) for document in chosen]
        lengths = torch.tensor([float(mask.sum()) for mask in learned], dtype=torch.float64)
        # A pair's documents are neighbours, the chosen response first.
        is_complete = (lengths.reshape(-1, 2) > 0).all(dim=1)
        if not is_complete.any():
            continue
        both = is_complete.repeat_interleave(2)
        sums, lengths = _learned_sums(logprobs_of(documents, chosen), learned)[both], lengths[both]
        means = sums / lengths
        figures = {CHOSEN_LIKELIER: _share_above(means[0::2] - means[1::2])}
        numbers = None if reference_of is None else reference_of(source)
        if asked is not None and (reference_of is None or numbers is not None):
            reference_sums = None if numbers is None else _learned_sums(numbers, learned)[both]
            meters = compute_pair_meters(asked, compare_values(asked, sums, lengths, reference_sums))
            figures |= {name: float(values.mean()) for name, values in meters.items()}
        source_figures[source.name] = {"pairs": int(is_complete.sum()), **figures}
    return source_figures


def _share_above(differences: torch.Tensor) -> float:
    """Return the share of positive numbers; 0 counts half."""
    return float(((differences > 0).double() + (differences == 0).double() / 2).mean())


def _learned_tokens(documents: Documents, document: int, seq_len: int) -> np.ndarray:
    """Return the learned tokens in a document up to `seq_len`, [tokens] bool."""
    length = int(documents.lengths[document])
    learned: np.ndarray = ((documents.types(document, 0, length) == TYPE_RESPONSE)
                           & (documents.loss_weights(document, 0, length) > 0))
    # The first token is not a label; tokens after a sample's last label have no number.
    learned[:1] = learned[seq_len + 1:] = False
    return learned


def _learned_sums(logprobs: np.ndarray, learned: Sequence[np.ndarray]) -> torch.Tensor:
    """Return the sum of learned log-probabilities per document, [documents] float64.

    Args:
        logprobs: [tokens of all documents].
        learned: [tokens] bool for each document.
    """
    ends = np.cumsum([len(mask) for mask in learned])[:-1]
    return torch.tensor([float(numbers[mask].astype(np.float64).sum())
                         for numbers, mask in zip(np.split(logprobs, ends), learned, strict=True)],
                        dtype=torch.float64)


class PairLearning(DataObjective):
    """Objective ``sum of pair losses / pairs + chosen_coeff * CE(chosen) / chosen tokens``, with multi-token
    prediction on chosen responses."""

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
            self.coefficients = {PREFERENCE: self._asked.effective_beta, CHOSEN: 1.0}
        if self._asked.chosen_coeff > 0:
            self.coefficients[CHOSEN] = self._asked.chosen_coeff
        self.coefficients |= self._mtp_coefficient

    def prepare(self, batch: GlobalBatch) -> GlobalBatch:
        """Count pairs and chosen tokens in the global batch."""
        hosts = [m.host for m in batch.micro_batches]
        responses = [find_responses(m) for m in hosts]
        targets = {PREFERENCE: sum(float(r.select_pairs().sum()) for r in responses)}
        chosen = [self._cross_entropy_batch(m, r) for m, r in zip(hosts, responses, strict=True)]
        if CHOSEN in self.coefficients:
            targets[CHOSEN] = sum(float(m.weights.double().sum()) for m in chosen)
        return with_denominators(batch, targets | self._count_mtp_targets(chosen))

    def loss(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> LossSums:
        responses = find_responses(batch)
        # One pass through the head serves the preference, the cross-entropy and the logged losses.
        logprobs = head.logprobs(hidden[0], batch.labels)
        sums = responses.sum_labels(logprobs)
        losses, compared = self._compute_losses(sums, batch, responses)
        complete = responses.select_pairs()
        terms = self._compute_terms((losses * complete).sum(), logprobs, hidden, head,
                            self._cross_entropy_batch(batch, responses))
        # Truncated pairs have numbers too; `whole` removes them from every sum.
        meters, means = compute_pair_meters(self._asked,
                                            compared.detach()), responses.average_labels(logprobs.detach())
        values = (meters[PAIRS_RIGHT], meters[MARGIN], means[0::2], means[1::2])
        return LossSums(terms, _logged_losses(logprobs, batch, find_learned_labels(batch), self._num_sources),
                        meters={name: ((value * complete).sum(), complete.sum())
                                for name, value in zip(self.meters, values, strict=True)})

    def _cross_entropy_batch(self, batch: MicroBatch, responses: ResponseSpans) -> MicroBatch:
        return _restrict_weights(batch, responses.select_side(0))

    def _compute_terms(self, loss: torch.Tensor, logprobs: torch.Tensor, hidden: list[torch.Tensor],
                       head: Head,
               chosen: MicroBatch) -> dict[str, torch.Tensor]:
        """Return the terms for a micro-batch: the preference `loss`, and cross-entropy on `chosen`."""
        terms = {PREFERENCE: loss}
        if CHOSEN in self.coefficients:
            # `where` instead of a product: labels that are not learned may have log p = -inf.
            terms[CHOSEN] = -logprobs.double().where(chosen.weights > 0, 0.0).sum()
        return terms | self._compute_mtp_sum(hidden, head, chosen)

    def _compute_losses(self, sums: torch.Tensor, batch: MicroBatch,
                responses: ResponseSpans) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses [P] and `compare_values` [2 P] for the pairs.

        Args:
            sums: [2 P] log-probabilities of chosen and rejected responses, alternating.
            batch: the micro-batch.
            responses: the learned labels.
        """
        preference = self._asked
        means = compare_values(preference, sums, responses.lengths)
        chosen, rejected = means[0::2], means[1::2]
        if preference.method == "simper":
            return simper(chosen, rejected), means
        if preference.method == "orpo":
            return orpo(chosen, rejected), means
        return simpo(chosen, rejected, preference.effective_beta, preference.simpo_gamma,
                     preference.label_smoothing), means


class PairLearningWithReference(PairLearning):
    """`PairLearning` with losses relative to the initial model."""

    columns = {reference.COLUMN: NeededColumn("`megatron-sov prefer`")}
    comparable_loss = True

    def _compute_losses(self, sums: torch.Tensor, batch: MicroBatch,
                responses: ResponseSpans) -> tuple[torch.Tensor, torch.Tensor]:
        ratios = compare_values(self._asked, sums, responses.lengths,
                                 self._reference_sums(sums, batch, responses))
        return self.pair_loss(ratios[0::2] - ratios[1::2]), ratios

    def _reference_sums(self, sums: torch.Tensor, batch: MicroBatch, responses: ResponseSpans
                        ) -> torch.Tensor:
        """Return the reference log-probabilities of the responses, [2 P]; `sums` are the policy's."""
        return responses.sum_labels(batch.columns[reference.COLUMN])

    def pair_loss(self, margins: torch.Tensor) -> torch.Tensor:
        """Return the loss of each pair, [P] float64. Override it in a subclass to define your own.

        Args:
            margins: [P] log ratio of policy to reference of the chosen response, minus that of the rejected
                response: sums with method dpo, otherwise means over tokens.
        """
        preference = self._asked
        if preference.method == "ipo":
            return ipo(margins, preference.effective_beta)
        return dpo(margins, preference.effective_beta, preference.label_smoothing)


class GroupLearning(DataObjective):
    """GrouPER: objective ``sum over responses of loss / responses of its group / groups``, with multi-token
    prediction on all responses."""

    formats = ("chat",)
    columns: Mapping[str, NeededColumn] = dict.fromkeys((ADVANTAGE, GROUP_SHARE), NeededColumn(
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
        """Count the groups in the global batch; a group split over batches counts in each batch by its
        share."""
        hosts = [m.host for m in batch.micro_batches]
        # A group's shares add up to 1 over all batches.
        groups = sum(float(find_responses(m).average_labels(m.columns[GROUP_SHARE]).sum()) for m in hosts)
        learning = [_restrict_weights(m, find_learned_labels(m)) for m in hosts]
        return with_denominators(batch, {PREFERENCE: groups} | self._count_mtp_targets(learning))

    def loss(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> LossSums:
        responses = find_responses(batch)
        logprobs = head.logprobs(hidden[0], batch.labels)
        means = responses.average_labels(logprobs)
        advantages, shares = (responses.average_labels(batch.columns[name])
                              for name in (ADVANTAGE, GROUP_SHARE))
        terms = {PREFERENCE: (grouper(means, advantages) * shares).sum()}
        terms |= self._compute_mtp_sum(hidden, head, _restrict_weights(batch, find_learned_labels(batch)))
        better, worse = ((advantages > 0).double(), (advantages < 0).double())
        return LossSums(terms, _logged_losses(logprobs, batch, find_learned_labels(batch), self._num_sources),
                        meters={"better_logprob": ((means.detach() * better).sum(), better.sum()),
                                "worse_logprob": ((means.detach() * worse).sum(), worse.sum())})


def select_objective(config: RunConfig) -> type[PairLearning | GroupLearning | UnpairedLearning]:
    method = config.preference.method
    if method == "kto":
        return UnpairedLearning
    if method == "grouper":
        return GroupLearning
    return PairLearningWithReference if method in REFERENCE_METHODS else PairLearning


def _restrict_weights(batch: MicroBatch, labels: torch.Tensor) -> MicroBatch:
    """Set the weights outside `labels` [T] bool to 0."""
    return dataclasses.replace(batch, weights=batch.weights * labels)


def _logged_losses(logprobs: torch.Tensor, batch: MicroBatch, counted: torch.Tensor,
                   num_sources: int) -> torch.Tensor:
    """Return the cross-entropy on `counted` labels [T] bool per source, see `per_source`."""
    return per_source((-logprobs.detach()).where(counted, 0.0), counted.to(batch.weights.dtype),
                      batch.sources, num_sources)


class UnpairedLearning(PairLearning):
    """KTO: objective ``sum of response losses / responses + chosen_coeff * CE(good) / good tokens``, with
    multi-token prediction on good responses."""

    columns = {reference.COLUMN: NeededColumn("`megatron-sov prefer`"), DESIRABLE: NeededColumn(MADE_BY)}
    meters = ("desirable_reward", "undesirable_reward", "distance")
    comparable_loss = True
    headline = (Meter("desirable_reward", "reward of good responses", better="higher"),
                Meter("undesirable_reward", "of bad ones", better="lower"))

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        self._distance = 0.0
        """z_0 in the current step."""

    def collect(self, policy: object, step: int) -> GlobalBatch:
        """Return the next batch in the data order, and compute z_0, which all losses in the step use."""
        batch = super().collect(policy, step)
        self._distance = _estimate_distance(policy, batch)
        return batch

    def loss(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> LossSums:
        preference, responses = self._asked, find_responses(batch)
        logprobs = head.logprobs(hidden[0], batch.labels)
        # Even documents are the judged responses; odd documents are mismatched, for `_estimate_distance`.
        ratios = _log_ratios(responses, logprobs, batch)[0::2]
        desirable, complete = _is_desirable(responses, batch), responses.select_pairs()
        losses = kto(ratios, desirable, self._distance, beta=preference.effective_beta,
                     desirable_weight=preference.desirable_weight,
                     undesirable_weight=preference.undesirable_weight)
        terms = self._compute_terms((losses * complete).sum(), logprobs, hidden, head,
                            self._cross_entropy_batch(batch, responses))
        rewards, sides = preference.effective_beta * ratios.detach(), (desirable.double(),
                                                                       (~desirable).double())
        counted = find_learned_labels(batch) & responses.select_side(0)
        return LossSums(
            terms, _logged_losses(logprobs, batch, counted, self._num_sources),
            meters={name: ((rewards * side * complete).sum(), (side * complete).sum())
                    for name, side in zip(self.meters, sides, strict=False)}
            | {"distance": (self._distance * complete.sum(), complete.sum())})

    def _cross_entropy_batch(self, batch: MicroBatch, responses: ResponseSpans) -> MicroBatch:
        desirable = _is_desirable(responses, batch)
        # Back to a flag per document: the mismatched neighbour is not learned.
        good = torch.stack([desirable, torch.zeros_like(desirable)], 1)
        is_good = responses.spread_to_labels(good.flatten().double()) > 0
        return _restrict_weights(batch, responses.select_side(0) & is_good)


def _estimate_distance(policy: object, batch: GlobalBatch) -> float:
    """Return z_0 on the last pipeline stage: the mean log ratio over mismatched responses in the global
    batch, at least 0."""
    def outputs(hidden: list[torch.Tensor], head: Head, micro_batch: MicroBatch) -> torch.Tensor:
        responses = find_responses(micro_batch)
        ratios = _log_ratios(responses, head.logprobs(hidden[0], micro_batch.labels), micro_batch)[1::2]
        whole = responses.select_pairs()
        return torch.stack([(ratios * whole).sum(), whole.sum()])

    # Other pipeline stages have no outputs, add 0 and share the sum.
    sums_of_batches = policy.map(batch.micro_batches, outputs)  # type: ignore[attr-defined]
    total, count = torch.stack(sums_of_batches).sum(0).tolist() if sums_of_batches else (0.0, 0.0)
    sums = sum_dict({"total": total, "count": count}, collectives.all_reduce_dp)
    # A negative estimate for a divergence is noise.
    return max(sums["total"] / sums["count"], 0.0) if sums["count"] else 0.0


def _log_ratios(responses: ResponseSpans, logprobs: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Return the log ratio between policy and reference per response, [R]."""
    return responses.sum_labels(logprobs) - responses.sum_labels(batch.columns[reference.COLUMN])


def _is_desirable(responses: ResponseSpans, batch: MicroBatch) -> torch.Tensor:
    """Return the responses that were judged good, [R / 2] bool."""
    return responses.average_labels(batch.columns[DESIRABLE])[0::2] > 0.5


ROUND_METERS = (Meter(policy.REWARD, better="higher", heldout=f"{VALIDATION}.reward"),
             Meter(policy.RESPONSE_TOKENS, "response length", "tokens"),
             Meter(policy.GROUPS_LEARNING, "groups that learn", "share", "higher"))


class LearningOfRounds(DataObjective):
    """Mixin: preferences among the model's own responses (`policy.method = preference`), with shared prompts.
    Rounds publish the better response of a pair first, like packed pairs."""

    formats = (ROLLOUTS,)
    comparable_loss = False

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        self._config = context.config

    def prepare(self, batch: GlobalBatch) -> GlobalBatch:
        """Count denominators by the next class, then share prompts."""
        counted = super().prepare(batch)  # type: ignore[misc]  # the next class of the inheritance order
        return share_prompts(counted, self._config)


class RoundPairs(LearningOfRounds, PairLearning):
    """`PairLearning` on rounds."""

    headline = (ROUND_METERS[0], PairLearning.headline[0], *ROUND_METERS[1:])


class RoundPairsWithReference(LearningOfRounds, PairLearningWithReference):
    """`PairLearningWithReference` on rounds: the reference is the policy that began the round, or the run."""

    headline = RoundPairs.headline

    def _reference_sums(self, sums: torch.Tensor, batch: MicroBatch, responses: ResponseSpans
                        ) -> torch.Tensor:
        reference_sums = responses.sum_labels(batch.columns[_reference_column(self._config)])
        # The first step in a round has NaN: its weights are the weights that began the round.
        return torch.where(reference_sums.isnan(), sums.detach(), reference_sums)


class RoundGroups(LearningOfRounds, GroupLearning):
    """`GroupLearning` on rounds."""

    headline = (ROUND_METERS[0], *GroupLearning.headline, *ROUND_METERS[1:])


def _reference_column(config: RunConfig) -> str:
    return policy.OLD if config.policy.reference == "round" else policy.REFERENCE


def build_round_objective(config: RunConfig) -> policy.PolicyObjective:
    """Return the objective factory for `policy.method = preference`."""
    method, needed = config.preference.method, NeededColumn("`megatron-sov rl train`")
    kind: type[LearningOfRounds] = RoundPairs
    columns: dict[str, NeededColumn] = {}
    if method == "grouper":
        kind, columns = RoundGroups, dict.fromkeys((ADVANTAGE, GROUP_SHARE), needed)
    elif method in REFERENCE_METHODS:
        kind, columns = RoundPairsWithReference, {_reference_column(config): needed}
    return policy.PolicyObjective((ROLLOUTS,), columns, kind)
