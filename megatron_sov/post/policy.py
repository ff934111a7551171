"""Policy-gradient losses for reinforcement learning (GRPO, DAPO, GSPO, CISPO), and the training objective.

`PolicyLoss` combines the parts that `PolicyConfig` selects: importance ratios of the policy to the weights
at the start of the round, a surrogate that bounds the step, the aggregation over tokens or responses, a
divergence from a reference model, a distillation signal from a teacher, and a correction for the difference
between the log-probabilities of the generation engine and the trainer.

Shapes: T labels in a row, R responses. Arguments with the same meaning everywhere: `logprobs`, [T], log
p(label) by the policy, differentiable and finite; `reference`, [T], log p(label) by the reference model;
`ratios` and `advantages`, [T]; `responses`, the learned labels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from megatron_sov.base.documents import ROLLOUTS
from megatron_sov.base.errors import UserError
from megatron_sov.chat.encode import TYPE_TEXT
from megatron_sov.engine.model.logprobs import Head
from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.post_training import Aggregation, PolicyConfig, PolicyParts, Ratio
from megatron_sov.post.sft import ResponseSpans, find_learned_labels, find_responses
from megatron_sov.post.shared_prompts import share_prompts
from megatron_sov.runs.obs.meters import Meter
from megatron_sov.runs.obs.validation import VALIDATION
from megatron_sov.train.data.requirements import NeededColumn
from megatron_sov.train.data.rounds import ROUNDS_SOURCE
from megatron_sov.train.data.sources import TEXTS, Source, open_sources
from megatron_sov.train.data.views import TEXT_FORMAT, view_as_text
from megatron_sov.train.objectives.data_batches import ObjectiveContext
from megatron_sov.train.objectives.data_objective import DataObjective
from megatron_sov.train.objectives.microbatch import MicroBatch
from megatron_sov.train.objectives.objective import GlobalBatch, LossSums, per_source, with_denominators

REWARD, RESPONSE_TOKENS, GROUPS_LEARNING = "reward", "response_tokens", "groups_learning"
"""Meters of a round, shown at every step."""
REVERSE_KL = "reverse_kl"
"""Meter: KL(student || teacher), in nats per token."""
MAX_LOG_RATIO = 20.0
"""Bound for log-probability ratios, in nats, as in verl's losses."""
POLICY, KL = "policy", "kl"
"""Loss terms: `compute_surrogate_loss`, and the divergence from the reference model."""
ADVANTAGE, BEHAVIOUR, OLD, REFERENCE, TEACHER = (
    "advantage", "behaviour_logprobs", "old_logprobs", "reference_logprobs", "teacher_logprobs")
"""Columns: the response's advantage, and log p(label) by four models: the generation engine, the trainer
at the round's start (NaN for labels in the first step), the run's initial model, a teacher."""
KNOWLEDGE = "knowledge"
"""Loss term: cross-entropy on packed text."""
MAX_CLIP_SHARE, MAX_ENGINE_KL = 0.05, 0.05
"""Limits for `clip_share` and `engine_kl` in a round's first step, beyond which `doubt` warns. Published
engines differ from trainers by a KL of about 1e-3 nats per token (arXiv 2510.11370)."""
Columns = Mapping[str, torch.Tensor]
LabelLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(`ratios`, `logprobs`, `advantages`), [T] tensors, -> losses [T]."""
Measured = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Meter -> sum and count over the labels in a row."""


class PolicyLoss:
    """Loss ``-sum(weight * engine_correction * surrogate) + kl_coeff * divergence``, summed over labels."""

    def __init__(self, policy: PolicyConfig, max_new_tokens: int, loss: LabelLoss | None = None) -> None:
        """Select the columns, terms and meters for `policy`; `loss` replaces `compute_surrogate_loss`."""
        self._loss = loss or partial(compute_surrogate_loss, parts=policy.parts)
        self._policy, self._parts, self._max_new_tokens = policy, policy.parts, max_new_tokens
        self.coefficients = {POLICY: 1.0}
        if self._parts.kl != "none" and self._parts.kl_coeff > 0:
            self.coefficients[KL] = self._parts.kl_coeff
        # Ratios never use the log-probabilities of the engine: a clip as narrow as in GSPO would mistake
        # rounding in the engine for a policy step and drop responses below the group mean.
        self.columns = (ADVANTAGE, BEHAVIOUR, OLD, *([REFERENCE] if KL in self.coefficients else []),
                        *([TEACHER] if self._parts.opd_coeff else []))
        self._has_masks = policy.correction.endswith("mask") or policy.geo_bounds is not None
        self.meters = ("ratio", "clip_share", "entropy_estimate", "engine_gap", "engine_kl",
                       *(["masked_share"] if self._has_masks else []),
                       *(["reference_kl"] if KL in self.coefficients else []),
                       *([REVERSE_KL] if self._parts.opd_coeff else []))

    def count_denominators(self, responses: ResponseSpans) -> dict[str, float]:
        """Count, on the host, what `responses` add to the denominator of each term.

        Masked labels count, as in IcePop and TRL; otherwise the remaining labels would weigh more.
        """
        kinds = {POLICY: self._parts.aggregation,
                 KL: "sequence" if self._parts.kl == "sequence" else self._parts.aggregation}
        return {term: count_denominator(responses, kinds[term], self._max_new_tokens)
                for term in self.coefficients}

    def compute_terms(self, logprobs: torch.Tensor, columns: Columns,
                      responses: ResponseSpans) -> tuple[dict[str, torch.Tensor], Measured]:
        """Sum the loss terms and meters over a row, [] float64.

        Args:
            logprobs: [T] log p(label) by the policy, differentiable; -inf is allowed for labels that are not
                learned.
            columns: column name -> [T], for `self.columns`.
            responses: the learned labels.
        """
        # The first step runs at the weights of the start of the round, where ratios are 1.
        old = columns[OLD].double()
        columns = {**columns, OLD: torch.where(old.isnan(), logprobs.detach().double(), old)}
        # The engine error has a separate factor and never enters the ratio.
        engine_factors = compute_engine_correction(columns[OLD], columns[BEHAVIOUR], responses, self._policy)
        is_learned = responses.index < len(responses)
        # `where` instead of a product: labels that are not learned may have log p = -inf.
        logprobs = torch.where(is_learned, logprobs.double(), 0.0)
        columns = {name: torch.where(is_learned, columns[name].double(), 0.0) for name in self.columns}
        ratios = compute_importance_ratios(logprobs, columns[OLD], responses, self._parts.ratio)
        if self._parts.opd_coeff:
            # On-policy distillation. `old` is log p of the student before the step, so the advantage has no
            # gradient, and advantage * grad log p is the gradient of KL(student || teacher).
            signal = self._parts.opd_coeff * (columns[TEACHER] - columns[OLD])
            columns[ADVANTAGE] = columns[ADVANTAGE] + signal
        losses = self._loss(ratios, logprobs, columns[ADVANTAGE]) * engine_factors
        weights = compute_label_weights(responses, self._parts.aggregation)
        terms = {POLICY: (losses * weights).sum()}
        if KL in self.coefficients:
            if self._parts.kl == "sequence":
                # Without label weights, because the denominator counts responses.
                terms[KL] = sequence_kl(logprobs, columns[REFERENCE], responses).sum()
            else:
                terms[KL] = (self._estimate_kl(logprobs, columns[REFERENCE], ratios) * weights).sum()
        with torch.no_grad():
            meters = self._compute_meters(ratios, logprobs, columns, engine_factors)
            return terms, {name: (torch.where(is_learned, values.double(), 0.0).sum(), is_learned.sum())
                           for name, values in meters.items()}

    def _estimate_kl(self, logprobs: torch.Tensor, reference: torch.Tensor, ratios: torch.Tensor
                     ) -> torch.Tensor:
        """Return `policy.kl`'s estimate of the divergence from the reference per label, [T] float64."""
        if self._parts.kl == "k1":
            return k1(logprobs, reference)
        return k3(logprobs, reference) * (ratios if self._parts.kl_weighted else 1)

    def _compute_meters(self, ratios: torch.Tensor, logprobs: torch.Tensor, columns: Columns,
                        engine_factors: torch.Tensor) -> Columns:
        """Return the meters per label, [T], masked labels included: a mask must not hide the cause."""
        old, behaviour = columns[OLD], columns[BEHAVIOUR]
        meters = {"ratio": ratios,
                  "clip_share": find_clipped_tokens(ratios, columns[ADVANTAGE], self._parts),
                  "entropy_estimate": -logprobs, "engine_gap": old - behaviour,
                  "engine_kl": k3(behaviour, old)}
        if self._has_masks:
            meters["masked_share"] = engine_factors == 0
        if KL in self.coefficients:
            meters["reference_kl"] = k3(logprobs, columns[REFERENCE])
        if self._parts.opd_coeff:
            meters[REVERSE_KL] = old - columns[TEACHER]
        return meters


def exp_clamped(log_ratios: torch.Tensor) -> torch.Tensor:
    """Exponentiate log-probability ratios, clamped to +-MAX_LOG_RATIO to keep gradients finite."""
    return log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


# Estimators of KL(policy || reference) over responses of the policy: equal expectations, different gradients
# (arXiv 2506.09477). The plain gradient of k1 has expectation 0, which is why k1 and `sequence_kl` use
# value * grad log p, with the gradient of KL(policy || reference) as expectation. k3 is differentiated
# directly. Alone, as in GRPO, k3 has the expected gradient of KL(reference || policy); times the
# differentiable ratio (`kl_weighted`, as in DeepSeek-V3.2 and TRL), of KL(policy || reference).
def k1(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return ``logprobs - reference``, [T] float64, with the score-function gradient."""
    return _score_gradient(logprobs.double() - reference.double())


def k3(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return ``q / p - log(q / p) - 1`` for p of the policy and q of the reference, [T] float64, never
    negative (arXiv 2402.03300, equation 4)."""
    log_ratios = reference.double() - logprobs.double()
    return exp_clamped(log_ratios) - log_ratios - 1


def sequence_kl(logprobs: torch.Tensor, reference: torch.Tensor, responses: ResponseSpans) -> torch.Tensor:
    """Return ``logprobs - reference`` of whole responses, [R] float64, with the score-function gradient."""
    return _score_gradient(responses.sum_labels(logprobs) - responses.sum_labels(reference))


def _score_gradient(log_ratios: torch.Tensor) -> torch.Tensor:
    """Return `log_ratios` with the gradient ``log_ratios * grad log_ratios``."""
    value = log_ratios.detach()
    return value + value * (log_ratios - value)


def compute_importance_ratios(logprobs: torch.Tensor, old: torch.Tensor, responses: ResponseSpans, kind: Ratio
                              ) -> torch.Tensor:
    """Return the importance ratio per label, [T] float64, differentiable; 1 for labels without learning.

    `kind` token: ``exp(logprobs - old)`` per label (GRPO, arXiv 2402.03300, equation 3); sequence: the
    geometric mean over the response (GSPO, arXiv 2507.18071, equation 7).
    """
    # `where` instead of a product: labels that are not learned may have log p = -inf.
    log_ratios = torch.where(responses.index < len(responses), logprobs.double() - old.double(), 0.0)
    if kind == "sequence":
        # The mean of the log ratios keeps long responses from leaving the clip range by length alone.
        log_ratios = responses.spread_to_labels(responses.average_labels(log_ratios))
    return exp_clamped(log_ratios)


def compute_label_weights(responses: ResponseSpans, kind: Aggregation) -> torch.Tensor:
    """Return the weight per label, [T] float64; 0 for labels that are not learned.

    `sequence` weighs responses equally (1 / length per label); other kinds weigh labels equally.
    """
    if kind == "sequence":
        return responses.spread_to_labels(1 / responses.lengths.clamp(min=1))
    return responses.spread_to_labels(torch.ones_like(responses.lengths))


def count_denominator(responses: ResponseSpans, kind: Aggregation, max_new_tokens: int) -> float:
    """Count, on the host, what `responses` add to the step's denominator.

    `kind` token: tokens (DAPO, arXiv 2503.14476, equation 8); sequence: responses, with the mean over the
    tokens of each (GRPO, arXiv 2402.03300, equation 3); constant: responses times `max_new_tokens`, the
    length limit (Dr. GRPO, arXiv 2503.20783, section 3.2).
    """
    if kind == "token":
        return float(responses.lengths.sum())
    count = float((responses.lengths > 0).sum())
    return count * max_new_tokens if kind == "constant" else count


def compute_surrogate(ratios: torch.Tensor, logprobs: torch.Tensor, advantages: torch.Tensor,
                      parts: PolicyParts) -> torch.Tensor:
    """Return the surrogate objective per label, [T] float64, to be maximized.

    `parts.clip` two_sided: PPO (arXiv 1707.06347, equation 7) with separate bounds (DAPO, arXiv 2503.14476,
    equation 8); cispo: the ratio is a weight with an upper bound (arXiv 2506.13585, equations 4 and 5,
    without the lower bound, which the authors leave out); none: plain importance sampling. At ratios of 1
    every kind has the gradient of REINFORCE: advantage * grad log p.
    """
    advantages = advantages.double()
    if parts.clip == "cispo":
        # The bounded ratio is a weight without gradient: clipped labels still contribute.
        return ratios.clamp(max=1 + parts.clip_high).detach() * advantages * logprobs.double()
    if parts.clip == "none":
        return ratios * advantages
    # The minimum is pessimistic: gains are bounded, losses are corrected in full.
    return torch.min(ratios * advantages, ratios.clamp(1 - parts.clip_low, 1 + parts.clip_high) * advantages)


def compute_surrogate_loss(ratios: torch.Tensor, logprobs: torch.Tensor, advantages: torch.Tensor,
                           parts: PolicyParts) -> torch.Tensor:
    """Return the negative surrogate per label, [T] float64."""
    return -compute_surrogate(ratios, logprobs, advantages, parts)


def find_clipped_tokens(ratios: torch.Tensor, advantages: torch.Tensor, parts: PolicyParts) -> torch.Tensor:
    """Return the clipped labels, [T] bool: without gradient (two_sided) or with a bounded weight (cispo)."""
    above = ratios > 1 + parts.clip_high
    if parts.clip == "cispo":
        return above
    if parts.clip == "none":
        return torch.zeros_like(above)
    # The bound acts on the side to which the advantage pushes.
    return (above & (advantages > 0)) | ((ratios < 1 - parts.clip_low) & (advantages < 0))


def compute_engine_correction(old: torch.Tensor, behaviour: torch.Tensor, responses: ResponseSpans,
                              policy: PolicyConfig) -> torch.Tensor:
    """Return the factor ``exp(old - behaviour)``, bounded or masked, [T] float64; 0 for masked labels.

    `old` and `behaviour`, [T], are log p(label) by the trainer and by the engine that sampled the tokens.
    `policy.correction` truncate clamps the ratio ("Your efficient RL framework secretly brings you off-policy
    RL training", Yao et al. 2025), mask drops labels outside of the bounds (IcePop); token: ratio per label,
    sequence: the product over the response. `policy.geo_bounds` add geometric rejection ("When speed kills
    stability", Liu et al. 2025; `seq_mean_k1` in verl).
    """
    is_learned = responses.index < len(responses)
    # Labels that are not learned get a ratio of 1, for arbitrary `old` and `behaviour`.
    log_ratios = torch.where(is_learned, old.double() - behaviour.double(), 0.0)
    accepted = torch.ones_like(log_ratios)
    if bounds := policy.geo_bounds:
        # The mean of the log ratios, because equal bounds must suit responses of every length.
        means = exp_clamped(responses.average_labels(log_ratios))
        is_accepted = (means >= bounds[0]) & (means <= bounds[1])
        accepted = responses.spread_to_labels(is_accepted.double()).where(is_learned, 1.0)
    if policy.correction == "none":
        return accepted
    level, _, kind = policy.correction.partition("_")
    if level == "sequence":
        log_ratios = responses.spread_to_labels(responses.sum_labels(log_ratios))
    ratio = exp_clamped(log_ratios)
    low, high = policy.correction_low, policy.correction_bound
    if kind == "truncate":
        return accepted * ratio.clamp(low, high)
    return accepted * torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


class PolicyLearning(DataObjective):
    """Objective ``policy + kl_coeff * kl + knowledge_coeff * CE(text) / text_tokens``, with multi-token
    prediction on the learned labels.

    Override `policy_loss` in a subclass to define your own loss per token (docs/own_code.md).
    """

    formats = (ROLLOUTS,)
    comparable_loss = False
    headline: tuple[Meter, ...] = (Meter(REWARD, better="higher", heldout=f"{VALIDATION}.reward"),
                                   Meter(RESPONSE_TOKENS, "response length", "tokens"),
                                   Meter(GROUPS_LEARNING, "groups that learn", "share", "higher"))

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        policy, rollout = context.config.policy, context.config.rollout
        self._rollout, self._parts = rollout, policy.parts
        self._temperature = rollout.temperature
        self._loss = PolicyLoss(policy, rollout.max_new_tokens, self.policy_loss)
        self.meters = self._loss.meters
        if self._parts.opd_coeff:
            self.headline = (Meter(REVERSE_KL, "KL to the teacher", "nats", "lower"), *self.headline)
        self.coefficients = dict(self._loss.coefficients)
        if policy.has_text:
            self.coefficients[KNOWLEDGE] = policy.parts.knowledge_coeff
        self.coefficients |= self._mtp_coefficient
        self._config = context.config

    @classmethod
    def columns_by(cls, config: RunConfig) -> Mapping[str, NeededColumn]:
        columns = PolicyLoss(config.policy, config.rollout.max_new_tokens).columns
        return dict.fromkeys(columns, NeededColumn("`megatron-sov rl train`", (ROLLOUTS,)))

    def policy_loss(self, ratio: torch.Tensor, logprobs: torch.Tensor, advantage: torch.Tensor
                    ) -> torch.Tensor:
        """Return the loss per response token, [T] float64.

        Args:
            ratio: [T] importance ratio of the policy to the weights at the start of the round,
                differentiable.
            logprobs: [T] log p by the policy, differentiable.
            advantage: [T] advantage of the response that contains the token, teacher signal included.
        """
        return compute_surrogate_loss(ratio, logprobs, advantage, self._parts)

    def prepare(self, batch: GlobalBatch) -> GlobalBatch:
        """Count the denominators in the global batch, then share prompts inside micro-batches."""
        hosts = [m.host for m in batch.micro_batches]
        counts = [self._loss.count_denominators(find_responses(m)) for m in hosts]
        # Counted before the first forward pass: the mean must not depend on the split into micro-batches.
        targets = {term: sum(count[term] for count in counts) for term in self._loss.coefficients}
        if KNOWLEDGE in self.coefficients:
            targets[KNOWLEDGE] = sum(float((m.weights.double() * _is_text(m)).sum()) for m in hosts)
        # Sharing removes prompt labels only, and no denominator counts prompt labels.
        return share_prompts(with_denominators(batch, targets | self._count_mtp_targets(hosts)), self._config)

    def doubt(self, step: int, meters: Mapping[str, float]) -> str:
        """Return a warning if a round's first step exceeds `MAX_CLIP_SHARE` or `MAX_ENGINE_KL`; see
        `train.objectives.objective.get_doubt`."""
        # Later steps have moved the policy and may clip for good reasons.
        is_first = (step - 1) % self._rollout.steps_per_round == 0
        if is_first and (share := meters.get("clip_share", 0.0)) > MAX_CLIP_SHARE:
            return (f"{share:.0%} of the tokens are clipped in a round's first step, whose ratios are 1 but "
                    "for rounding: policy.clip_low and policy.clip_high are narrower than the trainer's own "
                    "rounding; widen them, or raise train.precision")
        if is_first and (gap := meters.get("engine_kl", 0.0)) > MAX_ENGINE_KL:
            # A store may contain a stale round although rollout.max_staleness is 0.
            return (f"engine_kl = {gap:.2g} a token: look at staleness_steps of the round; above 0, older "
                    "weights wrote its responses: lower rollout.max_staleness; at 0 the engine's model or "
                    "precision is far from the trainer's; see engine_gap in docs/policy_methods.md")
        return ""

    def loss(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> LossSums:
        """Sum the losses over responses and text in a micro-batch."""
        # The head is applied to learned labels only: most labels belong to prompts.
        is_needed = (find_learned_labels(batch.host) if KNOWLEDGE in self.coefficients
                     else batch.host.weights > 0)
        logprobs = head.logprobs(hidden[0], batch.labels, self._temperature, is_needed)
        # Text labels belong to no response, hence these sums leave text out.
        terms, meters = self._loss.compute_terms(logprobs, batch.columns, find_responses(batch))
        losses = -logprobs.detach()
        if KNOWLEDGE in self.coefficients:
            terms[KNOWLEDGE], losses = self._text_loss(hidden[0], head, batch, losses)
        terms |= self._compute_mtp_sum(hidden, head, batch)
        is_counted = batch.weights > 0
        by_source = per_source(losses.where(is_counted, 0.0), is_counted.to(losses.dtype), batch.sources,
                               self._num_sources)
        return LossSums(terms, by_source, meters)

    def _text_loss(self, hidden: torch.Tensor, head: Head, batch: MicroBatch,
                   losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the cross-entropy over text labels at temperature 1, and fill the text labels in `losses` [T].
        Micro-batches without text skip the second pass through the head."""
        if not bool((_is_text(batch.host) & (batch.host.weights > 0)).any()):
            return losses.new_zeros(()), losses
        is_text = _is_text(batch)
        sums, text_losses = head.cross_entropy(hidden, batch.labels, {KNOWLEDGE: batch.weights * is_text})
        return sums[KNOWLEDGE], torch.where(is_text, text_losses, losses)


def _is_text(batch: MicroBatch) -> torch.Tensor:
    return batch.types == TYPE_TEXT


def has_auxiliary_gradients(config: RunConfig) -> bool:
    """Return whether a step with advantages 0 has gradients: from a divergence, a teacher, preferences,
    multi-token prediction (`mtp_loss_coeff`), expert balancing, or a custom loss."""
    model, parts = config.model, config.policy.parts
    uses_other_loss = config.objective.name != "policy" or not config.policy.learns_from_rewards
    has_divergence = parts.kl != "none" and parts.kl_coeff > 0
    sets_biases = model.router_bias_update == "quantile" or model.router_bias_update_rate > 0
    has_balancing = model.num_moe_layers() and (model.seq_aux_loss_coeff or sets_biases)
    has_mtp = model.num_mtp_layers > 0 and model.mtp_loss_coeff > 0
    return uses_other_loss or has_divergence or bool(has_balancing) or has_mtp


@dataclass(frozen=True)
class PolicyObjective:
    """Factory for an objective, with the required data."""

    formats: tuple[str, ...]
    """See `train.objectives.objective.get_formats`."""
    columns: Mapping[str, NeededColumn]
    """See `train.objectives.objective.get_columns`."""
    kind: type[DataObjective] = PolicyLearning

    def __call__(self, context: ObjectiveContext) -> DataObjective:
        return self.kind(context)


def build_policy_objective(config: RunConfig) -> PolicyObjective:
    return PolicyObjective((ROLLOUTS, *([TEXT_FORMAT] if config.policy.has_text else [])),
                           PolicyLearning.columns_by(config))


def open_text_sources(config: RunConfig) -> tuple[Source, ...]:
    """Open the packed text in `data.paths`, and with `policy.knowledge_coeff` chats as text.

    With `policy.method = gkd`, text and chats keep the labels that `distill` learns. Raises `UserError`:
    `data.paths` cannot be read, hold another format, or do not fit the vocabulary of the model.
    """
    if not config.data.paths:
        return ()
    policy = config.policy
    sources = open_sources(config.data.paths, config.model.vocab_size,
                           TEXTS if policy.has_text or policy.learns_distributions else (TEXT_FORMAT,))
    if policy.learns_distributions:
        return tuple(sources)
    return tuple(map(view_as_text, sources))


def check_sources(config: RunConfig, sources: list[Source]) -> None:
    """Raise `UserError` if text or on-policy share lack data, or a source is named `ROUNDS_SOURCE`."""
    if [source.name for source in sources].count(ROUNDS_SOURCE) > 1:
        raise UserError(f"--data: the source name {ROUNDS_SOURCE!r} is reserved for the rounds of the run; "
                        "pack the data under another name")
    policy = config.policy
    used = [source for source in sources if source.share > 0 and source.num_tokens["train"]]
    if policy.on_policy_share < 1 and not used:
        raise UserError(f"policy.on_policy_share = {policy.on_policy_share:g}: the other rounds learn from "
                        "data; add --data, or set it to 1")
    if policy.has_text and not any(source.format == TEXT_FORMAT for source in used):
        raise UserError(f"policy.knowledge_coeff = {config.policy.parts.knowledge_coeff} needs text; add "
                        "--data with packed text to train on, or set it to 0")
