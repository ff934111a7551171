"""Preference losses: pairs (DPO, IPO, SimPO, ORPO, SimPER) and groups with rewards (GrouPER).

Losses are functions of log-probabilities of whole responses, in float64. P is the number of pairs. `chosen`
and `rejected`, [P], are mean log-probabilities per token. The margin of a pair is the log ratio log p(policy)
- log p(reference) of the chosen response, minus the log ratio of the rejected response. Pairs and groups
count equally at any length: denominators count the pairs, or groups, in the global batch.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from megatron_sov.base.documents import ROLLOUTS
from megatron_sov.chat.encode import TYPE_RESPONSE
from megatron_sov.engine.model.logprobs import Head
from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.post_training import REFERENCE_METHODS, PreferenceConfig
from megatron_sov.post import policy, reference
from megatron_sov.post.document_logprobs import score_documents
from megatron_sov.post.sft import ResponseSpans, find_learned_labels, find_responses
from megatron_sov.post.shared_prompts import share_prompts
from megatron_sov.runs.obs.meters import Meter
from megatron_sov.train.data.requirements import NeededColumn
from megatron_sov.train.data.rounds import ADVANTAGE, GROUP_SHARE
from megatron_sov.train.data.sources import Source
from megatron_sov.train.data.token_shards import Documents
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
"""Event with the meters for the held-out pairs in a source."""
MAX_PAIRS = 2048
"""Limit for measured held-out pairs per source."""
LogprobScorer = Callable[[Documents, range], np.ndarray]
"""(documents, indices) -> log p per token in the documents at `indices`, see `score_documents`."""
ReferenceReader = Callable[[Source], np.ndarray | None]
"""Source -> reference log p for the tokens of `find_heldout_documents`; None if unknown."""


def dpo(margins: torch.Tensor, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """Return DPO losses, [P]: ``-log sigmoid(beta * margin)`` (arXiv 2305.18290, eq. 7; smoothing: eq. 3 in
    "A note on DPO with noisy preferences", Mitchell 2023).

    Args:
        margins: [P] differences of sums over responses, or of means (Tülu 3, arXiv 2411.15124, eq. 6).
        beta: strength of the reference.
        label_smoothing: share of pairs with the wrong order.
    """
    # logsigmoid instead of log(sigmoid): large margins between long responses would round to log 0.
    return (-(1 - label_smoothing) * logsigmoid(beta * margins)
            - label_smoothing * logsigmoid(-beta * margins))


def ipo(margins: torch.Tensor, beta: float) -> torch.Tensor:
    """Return IPO losses, [P]: ``(margin - 1 / (2 beta))^2`` (arXiv 2310.12036, eq. 17).

    Args:
        margins: [P] differences of means over responses, as in the code of the authors.
        beta: tau in the paper.
    """
    return (margins - 1 / (2 * beta)) ** 2


def simper(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Return SimPER losses, [P]: ``exp(rejected) - exp(chosen)`` (arXiv 2502.00883, eq. 6)."""
    return rejected.exp() - chosen.exp()


def simpo(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, gamma: float,
          label_smoothing: float = 0.0) -> torch.Tensor:
    """Return SimPO losses, [P]: ``-log sigmoid(beta (chosen - rejected) - gamma)`` (arXiv 2405.14734, eq. 6).

    Args:
        chosen, rejected: see the module.
        beta: slope of the loss in the difference of the means.
        gamma: the target margin, in units of beta times log-probability, as in the paper.
        label_smoothing: see `dpo`.
    """
    return dpo(chosen - rejected - gamma / beta, beta, label_smoothing)


def orpo(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Return ORPO's odds ratio losses, [P]: ``-log sigmoid(log_odds(chosen) - log_odds(rejected))`` (arXiv
    2403.07691, eq. 7), without the weight and the cross-entropy in eq. 6."""
    return -logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(means: torch.Tensor) -> torch.Tensor:
    """Return ``log(p / (1 - p))`` for ``p = exp(means)``, finite if p rounds to 1."""
    # expm1 keeps the digits of 1 - p above one half, log1p below.
    certain = means.clamp(max=-2.0**-40)
    return certain - torch.where(certain > -math.log(2), (-certain.expm1()).log(), (-certain.exp()).log1p())


def grouper(means: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Return GrouPER losses, [R]: ``-advantage * exp(mean)``, with `advantages` from -1 for the worst
    response in a group to 1 for the best (K-EXAONE's technical report)."""
    return -advantages * means.exp()


def compare_values(preference: PreferenceConfig, sums: torch.Tensor, lengths: torch.Tensor,
                   reference_sums: torch.Tensor | None = None) -> torch.Tensor:
    """Return the value per response that `preference.method` compares, [2 P] float64, without `beta`.

    Args:
        preference: the settings of the method.
        sums: [2 P] float64 log-probabilities for chosen and rejected responses, alternating.
        lengths: [2 P] tokens of the responses.
        reference_sums: [2 P] log-probabilities by the reference; None: the method has no reference.
    """
    ratios = sums if reference_sums is None else sums - reference_sums
    # DPO compares whole responses, other methods means over tokens.
    return ratios if preference.method == "dpo" else ratios / lengths.clamp(min=1)


def compute_pair_meters(preference: PreferenceConfig, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the meters `PAIRS_RIGHT` and `MARGIN` per pair, [P] float64.

    Both equal rewards/accuracies and rewards/margins of TRL, except that a tie counts half: a model equal to
    the reference has an accuracy of 50 %, not 0 %.

    Args:
        preference: the method and its strength.
        values: [2 P] from `compare_values`.
    """
    strength = 1.0 if preference.method in ("simper", "orpo") else preference.effective_beta
    rewards = strength * values
    margins = rewards[0::2] - rewards[1::2]
    return {PAIRS_RIGHT: (margins > 0).double() + (margins == 0).double() / 2, MARGIN: margins}


def find_heldout_documents(source: Source) -> range:
    """Return the indices of the measured held-out documents in a source, chosen and rejected alternating."""
    if not source.num_tokens.get("heldout"):
        return range(0)
    return range(min(len(source.open_split("heldout").lengths), 2 * MAX_PAIRS))


def measure_heldout_pairs(view: GateView, sources: Sequence[Source], read_reference: ReferenceReader | None
                          ) -> dict[str, dict[str, Any]]:
    """Measure a run's held-out pairs, and record events `HELDOUT_PAIRS`; called by all processes.

    Args:
        view: the run.
        sources: preferences.
        read_reference: if the `ReferenceReader` returns None, pair meters are left out. None: the method has
            no reference.
    """
    seq_len, size = view.config.data.max_seq_len(), view.config.train.micro_batch_size

    def compute_logprobs(documents: Documents, indices: range) -> np.ndarray:
        return score_documents(view, documents, indices, seq_len, size)

    source_figures = measure_pairs(sources, compute_logprobs, seq_len, view.config.preference, read_reference)
    for name, figures in source_figures.items():
        view.events.write(HELDOUT_PAIRS, step=view.step, source=name, **figures)
    return source_figures


def measure_pairs(sources: Sequence[Source], compute_logprobs: LogprobScorer, seq_len: int,
                  preference: PreferenceConfig | None = None,
                  read_reference: ReferenceReader | None = None) -> dict[str, dict[str, Any]]:
    """Measure the held-out pairs per source.

    Args:
        sources: preferences.
        compute_logprobs: computes log-probabilities by the model.
        seq_len: tokens of a document that the model reads.
        preference: method for `compute_pair_meters`; None: no meters.
        read_reference: see `measure_heldout_pairs`.

    Returns:
        Source -> `pairs`; `chosen_likelier`, the share of pairs in which the chosen response has the greater
        log-probability per token; with `preference` the means of `compute_pair_meters`. Ties count half.
        Pairs with a response that begins after `seq_len` tokens are left out.
    """
    source_figures = {}
    for source in sources:
        indices = find_heldout_documents(source)
        if not indices:
            continue
        documents = source.open_split("heldout")
        masks = [_find_learned_tokens(documents, index, seq_len) for index in indices]
        lengths = torch.tensor([float(mask.sum()) for mask in masks], dtype=torch.float64)
        # The documents of a pair are neighbours, the chosen response first.
        is_complete = (lengths.reshape(-1, 2) > 0).all(dim=1)
        if not is_complete.any():
            continue
        is_measured = is_complete.repeat_interleave(2)
        lengths = lengths[is_measured]
        sums = _sum_learned_tokens(compute_logprobs(documents, indices), masks)[is_measured]
        figures = {CHOSEN_LIKELIER: _compute_chosen_likelier(sums / lengths)}
        reference_logprobs = None if read_reference is None else read_reference(source)
        if preference is not None and (read_reference is None or reference_logprobs is not None):
            reference_sums = None
            if reference_logprobs is not None:
                reference_sums = _sum_learned_tokens(reference_logprobs, masks)[is_measured]
            values = compare_values(preference, sums, lengths, reference_sums)
            meters = compute_pair_meters(preference, values)
            figures |= {name: float(column.mean()) for name, column in meters.items()}
        source_figures[source.name] = {"pairs": int(is_complete.sum()), **figures}
    return source_figures


def _compute_chosen_likelier(means: torch.Tensor) -> float:
    """Return `chosen_likelier` for mean log-probabilities [2 P], chosen and rejected alternating."""
    differences = means[0::2] - means[1::2]
    # Equal means count half.
    return float(((differences > 0).double() + (differences == 0).double() / 2).mean())


def _find_learned_tokens(documents: Documents, document: int, seq_len: int) -> np.ndarray:
    """Return the learned tokens up to `seq_len` in a document, [tokens] bool."""
    length = int(documents.lengths[document])
    learned: np.ndarray = ((documents.types(document, 0, length) == TYPE_RESPONSE)
                           & (documents.loss_weights(document, 0, length) > 0))
    # The first token is not a label; tokens after the last label of a sample have no log-probability.
    learned[:1] = learned[seq_len + 1:] = False
    return learned


def _sum_learned_tokens(logprobs: np.ndarray, masks: Sequence[np.ndarray]) -> torch.Tensor:
    """Sum `logprobs` [tokens of all documents] over learned tokens -> [documents] float64."""
    ends = np.cumsum([len(mask) for mask in masks])[:-1]
    sums = [float(document_logprobs[mask].astype(np.float64).sum())
            for document_logprobs, mask in zip(np.split(logprobs, ends), masks, strict=True)]
    return torch.tensor(sums, dtype=torch.float64)


class PairLearning(DataObjective):
    """Objective ``sum(pair_losses) / pairs + chosen_coeff * CE(chosen) / chosen_tokens``, with multi-token
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
        self._preference = context.config.preference
        self.coefficients = {PREFERENCE: 1.0}
        if self._preference.method == "orpo":  # eq. 6 of the paper
            self.coefficients = {PREFERENCE: self._preference.effective_beta, CHOSEN: 1.0}
        if self._preference.chosen_coeff > 0:
            self.coefficients[CHOSEN] = self._preference.chosen_coeff
        self.coefficients |= self._mtp_coefficient

    def prepare(self, batch: GlobalBatch) -> GlobalBatch:
        """Count pairs and chosen tokens in the global batch."""
        hosts = [m.host for m in batch.micro_batches]
        responses = [find_responses(m) for m in hosts]
        targets = {PREFERENCE: sum(float(r.select_pairs().sum()) for r in responses)}
        chosen = [_restrict_weights(m, r.select_side(0)) for m, r in zip(hosts, responses, strict=True)]
        if CHOSEN in self.coefficients:
            targets[CHOSEN] = sum(float(m.weights.double().sum()) for m in chosen)
        return with_denominators(batch, targets | self._count_mtp_targets(chosen))

    def loss(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> LossSums:
        responses = find_responses(batch)
        # One pass through the head serves the preference, the cross-entropy and the logged losses.
        logprobs = head.logprobs(hidden[0], batch.labels)
        sums = responses.sum_labels(logprobs)
        losses, compared = self._compute_losses(sums, batch, responses)
        is_complete = responses.select_pairs()
        chosen = _restrict_weights(batch, responses.select_side(0))
        terms = {PREFERENCE: (losses * is_complete).sum()}
        if CHOSEN in self.coefficients:
            # `where` instead of a product: labels that are not learned may have log p = -inf.
            terms[CHOSEN] = -logprobs.double().where(chosen.weights > 0, 0.0).sum()
        terms |= self._compute_mtp_sum(hidden, head, chosen)
        # Truncated pairs have values too; `is_complete` removes them from every sum.
        meters = compute_pair_meters(self._preference, compared.detach())
        means = responses.average_labels(logprobs.detach())
        values = (meters[PAIRS_RIGHT], meters[MARGIN], means[0::2], means[1::2])
        return LossSums(terms, _logged_losses(logprobs, batch, find_learned_labels(batch), self._num_sources),
                        meters={name: ((value * is_complete).sum(), is_complete.sum())
                                for name, value in zip(self.meters, values, strict=True)})

    def _compute_losses(self, sums: torch.Tensor, batch: MicroBatch,
                        responses: ResponseSpans) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses [P] and `compare_values` [2 P] for pairs; `sums`, [2 P], are log-probabilities
        for chosen and rejected responses, alternating."""
        preference = self._preference
        means = compare_values(preference, sums, responses.lengths)
        chosen, rejected = means[0::2], means[1::2]
        if preference.method == "simper":
            return simper(chosen, rejected), means
        if preference.method == "orpo":
            return orpo(chosen, rejected), means
        return simpo(chosen, rejected, preference.effective_beta, preference.simpo_gamma,
                     preference.label_smoothing), means


class PairLearningWithReference(PairLearning):
    """`PairLearning` with losses relative to a reference model, DPO and IPO."""

    columns = {reference.COLUMN: NeededColumn("`megatron-sov prefer`")}
    comparable_loss = True

    def _compute_losses(self, sums: torch.Tensor, batch: MicroBatch,
                        responses: ResponseSpans) -> tuple[torch.Tensor, torch.Tensor]:
        ratios = compare_values(self._preference, sums, responses.lengths,
                                self._reference_sums(sums, batch, responses))
        return self.pair_loss(ratios[0::2] - ratios[1::2]), ratios

    def _reference_sums(self, sums: torch.Tensor, batch: MicroBatch, responses: ResponseSpans
                        ) -> torch.Tensor:
        """Return response log-probabilities by the reference, [2 P]; `sums`: by the policy."""
        return responses.sum_labels(batch.columns[reference.COLUMN])

    def pair_loss(self, margins: torch.Tensor) -> torch.Tensor:
        """Return the loss per pair, [P] float64; override `pair_loss` in a subclass to define your own.

        Args:
            margins: [P] log p(policy) - log p(reference) of the chosen response, minus the same difference
                of the rejected response: sums over tokens for method dpo, otherwise means.
        """
        preference = self._preference
        if preference.method == "ipo":
            return ipo(margins, preference.effective_beta)
        return dpo(margins, preference.effective_beta, preference.label_smoothing)


class GroupLearning(DataObjective):
    """GrouPER: ``sum(loss / responses_in_group) / groups`` over responses, with multi-token prediction."""

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
        """Count the groups in the batch; a group that spans batches counts by its share in each."""
        hosts = [m.host for m in batch.micro_batches]
        # The shares of a group add up to 1 over all batches.
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
        is_better, is_worse = (advantages > 0).double(), (advantages < 0).double()
        return LossSums(terms, _logged_losses(logprobs, batch, find_learned_labels(batch), self._num_sources),
                        meters={"better_logprob": ((means.detach() * is_better).sum(), is_better.sum()),
                                "worse_logprob": ((means.detach() * is_worse).sum(), is_worse.sum())})


def select_objective(config: RunConfig) -> type[PairLearning | GroupLearning]:
    method = config.preference.method
    if method == "grouper":
        return GroupLearning
    return PairLearningWithReference if method in REFERENCE_METHODS else PairLearning


def _restrict_weights(batch: MicroBatch, labels: torch.Tensor) -> MicroBatch:
    """Set the weights outside `labels`, [T] bool, to 0."""
    return dataclasses.replace(batch, weights=batch.weights * labels)


def _logged_losses(logprobs: torch.Tensor, batch: MicroBatch, counted: torch.Tensor,
                   num_sources: int) -> torch.Tensor:
    """Return the cross-entropy per source on `counted` labels, [T] bool; see `per_source`."""
    return per_source((-logprobs.detach()).where(counted, 0.0), counted.to(batch.weights.dtype),
                      batch.sources, num_sources)


class RoundLearning(DataObjective):
    """Mixin: preferences among the policy's responses (`policy.method = preference`), with shared prompts.
    Rounds publish a pair's better response first, like packed pairs."""

    formats = (ROLLOUTS,)
    comparable_loss = False

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        self._config = context.config

    def prepare(self, batch: GlobalBatch) -> GlobalBatch:
        """Count denominators, then share prompts."""
        counted = super().prepare(batch)  # type: ignore[misc]  # the next class of the inheritance order
        return share_prompts(counted, self._config)


class RoundPairs(RoundLearning, PairLearning):
    """`PairLearning` on rounds."""

    headline = (policy.PolicyLearning.headline[0], PairLearning.headline[0],
                *policy.PolicyLearning.headline[1:])


class RoundPairsWithReference(RoundLearning, PairLearningWithReference):
    """`PairLearningWithReference` on rounds; reference: the policy at the round's start, or the run."""

    headline = RoundPairs.headline

    def _reference_sums(self, sums: torch.Tensor, batch: MicroBatch, responses: ResponseSpans
                        ) -> torch.Tensor:
        reference_sums = responses.sum_labels(batch.columns[_reference_column(self._config)])
        # NaN marks the first step of the round, which runs at the weights of the reference.
        return torch.where(reference_sums.isnan(), sums.detach(), reference_sums)


class RoundGroups(RoundLearning, GroupLearning):
    """`GroupLearning` on rounds."""

    headline = (policy.PolicyLearning.headline[0], *GroupLearning.headline,
                *policy.PolicyLearning.headline[1:])


def _reference_column(config: RunConfig) -> str:
    return policy.OLD if config.policy.reference == "round" else policy.REFERENCE


def build_round_objective(config: RunConfig) -> policy.PolicyObjective:
    """Return the objective factory for `policy.method = preference`."""
    method, needed = config.preference.method, NeededColumn("`megatron-sov rl train`")
    kind: type[RoundLearning] = RoundPairs
    columns: dict[str, NeededColumn] = {}
    if method == "grouper":
        kind, columns = RoundGroups, dict.fromkeys((ADVANTAGE, GROUP_SHARE), needed)
    elif method in REFERENCE_METHODS:
        kind, columns = RoundPairsWithReference, {_reference_column(config): needed}
    return policy.PolicyObjective((ROLLOUTS,), columns, kind)
