"""Learning from one's own responses by their rewards, as `PolicyConfig` puts it together: the parts of the
loss (GRPO and its kin), and the objective.

The parts need no model: ratios of the policy to the one that wrote a response; surrogates, which bound how
far one step goes on responses of an older policy; what each token counts in the mean over a step; divergence
from a reference; and the correction for an engine that computes other log-probabilities than the trainer: the
ratio of the trainer's policy to the engine's, both as they were when a response was written.

A group's responses begin with the same prompt, of which a micro-batch needs one (arXiv 2506.05433): what a
token becomes depends on it and those before it alone, so the tokens of a document before its first learned
label are the same numbers in every response to the prompt.  Labels, weights and columns of what is left out
are those of nothing that is learned.

Shapes: T labels of a row, R responses.  Columns are numbers [T] of each label.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import numpy as np
import torch

from megatron_sov.base.documents import ROLLOUTS
from megatron_sov.base.errors import UserError
from megatron_sov.chat.encode import TYPE_TEXT
from megatron_sov.engine.model.attention import SharedPrompts, Span
from megatron_sov.engine.model.gpu_settings import Here, own_attention_serves
from megatron_sov.engine.model.logprobs import Head
from megatron_sov.engine.model.specs import PRECISION, uses_transformer_engine
from megatron_sov.engine.parallel.device import to_device
from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.post_training import Aggregation, PolicyConfig, PolicyParts, Ratio
from megatron_sov.post.sft import Responses, learned, responses_of
from megatron_sov.runs.obs.meters import Meter
from megatron_sov.runs.obs.validation import VALIDATION
from megatron_sov.train.data.requirements import NeededColumn
from megatron_sov.train.data.rounds import SOURCE
from megatron_sov.train.data.token_shards import TEXTS, Source, open_sources
from megatron_sov.train.data.views import TEXT, as_text
from megatron_sov.train.objectives.data_batches import ObjectiveContext
from megatron_sov.train.objectives.data_objective import DataObjective
from megatron_sov.train.objectives.microbatch import MicroBatch
from megatron_sov.train.objectives.objective import GlobalBatch, LossSums, per_source, with_denominators


def _quotient(apart: torch.Tensor) -> torch.Tensor:
    """Return the quotient of probabilities whose logarithms are so far apart; beyond any that says something
    it stays as it is, since an infinite one would make gradients NaN."""
    return apart.clamp(-MOST_APART, MOST_APART).exp()


# Each of these is KL(policy || reference) in expectation over the policy's responses; their derivatives
# differ (arXiv 2506.09477).  The plain derivative of k1 is 0 in expectation and would teach nothing.  So it,
# and that of whole responses, is the value times the derivative of log p: in expectation the derivative of
# the divergence.  k3 is differentiated as it is: alone, as GRPO's authors have it, that is in expectation the
# derivative of KL(reference || policy); times the ratio, which is differentiated too (`kl_weighted`, as in
# DeepSeek-V3.2 and TRL), that of KL(policy || reference).
def k1(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return [T] float64 the difference of log-probabilities.

    Args:
        logprobs: [T] of the policy, differentiable, and finite.
        reference: [T].
    """
    return _by_score(logprobs.double() - reference.double())


def k3(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return [T] float64 ``q / p - log(q / p) - 1``, never negative (arXiv 2402.03300, equation 4)."""
    apart = reference.double() - logprobs.double()
    return _quotient(apart) - apart - 1


def of_sequences(logprobs: torch.Tensor, reference: torch.Tensor, responses: Responses) -> torch.Tensor:
    """Return [R] float64 the differences of log-probabilities of whole responses."""
    return _by_score(responses.sums(logprobs) - responses.sums(reference))


def _by_score(apart: torch.Tensor) -> torch.Tensor:
    """Return the difference, with its own size times its derivative as derivative."""
    value = apart.detach()
    return value + value * (apart - value)


REWARD, RESPONSE_TOKENS, GROUPS_LEARNING = "reward", "response_tokens", "groups_learning"
"""Meters of a round, which its steps show."""
REVERSE_KL = "reverse_kl"
"""Meter: KL(student || teacher), in nats a token."""
MOST_APART = 20.0
"""Of two logarithms of probabilities, in nats: as in verl's losses."""
POLICY, KL = "policy", "kl"
"""Terms."""
ADVANTAGE, BEHAVIOUR, OLD, REFERENCE, TEACHER = (
    "advantage", "behaviour_logprobs", "old_logprobs", "reference_logprobs", "teacher_logprobs")
"""Columns: the response's advantage; log p by the engine that wrote it; by the trainer before the round's
first step, NaN of a label that the first step learns; by the model that the run starts from; by a
teacher."""
Columns = Mapping[str, torch.Tensor]
LabelLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(ratios, log-probabilities, advantages), each [T] of the labels, -> [T] losses."""
Measured = dict[str, tuple[torch.Tensor, torch.Tensor]]


class PolicyLoss:
    """``-sum over labels of weight * importance * surrogate``, and the divergence from a reference."""

    def __init__(self, policy: PolicyConfig, max_new_tokens: int, loss: LabelLoss | None = None) -> None:
        """Begin.

        Args:
            policy: the settings.
            max_new_tokens: of the longest response.
            loss: of each label; None: that of the settings.
        """
        self._loss = loss or partial(surrogate_loss, parts=policy.parts)
        self._policy, self._parts, self._longest = policy, policy.parts, max_new_tokens
        self.coefficients = {POLICY: 1.0}
        if self._parts.kl != "none" and self._parts.kl_coeff > 0:
            self.coefficients[KL] = self._parts.kl_coeff
        # ratios are never against an engine's numbers: a clip as narrow as GSPO's would take the engine's
        # rounding for a step of the policy, and leave out the responses that are worse than their group
        self.columns = (ADVANTAGE, BEHAVIOUR, OLD, *([REFERENCE] if KL in self.coefficients else []),
                        *([TEACHER] if self._parts.opd_coeff else []))
        """Those that are read."""
        self._masks = policy.correction.endswith("mask") or policy.geo_bounds is not None
        self.meters = ("ratio", "clip_share", "entropy_estimate", "engine_gap", "engine_kl",
                       *(["masked_share"] if self._masks else []),
                       *(["reference_kl"] if KL in self.coefficients else []),
                       *([REVERSE_KL] if self._parts.opd_coeff else []))

    def denominators(self, responses: Responses) -> dict[str, float]:
        """Return what each term's sum is divided by, as far as it is of these responses, on the host.

        What a mask leaves out counts, as in IcePop and in TRL: else the labels beside it would weigh more.
        """
        kinds = {POLICY: self._parts.aggregation,
                 KL: "sequence" if self._parts.kl == "sequence" else self._parts.aggregation}
        return {term: denominator(responses, kinds[term], self._longest) for term in self.coefficients}

    def terms(self, logprobs: torch.Tensor, columns: Columns,
              responses: Responses) -> tuple[dict[str, torch.Tensor], Measured]:
        """Return each term's sum over the row, and each meter's sum and count.

        Args:
            logprobs: [T] of the policy, differentiable; of what is not learned they may be anything.
            columns: the numbers.
            responses: which labels are learned.
        """
        # what the first step learns, it learns at the very weights that the round begins with
        old = columns[OLD].double()
        columns = {**columns, OLD: torch.where(old.isnan(), logprobs.detach().double(), old)}
        # The engine's error is corrected by a factor of its own, and never mixed with the step of the policy.
        factors = importance(columns[OLD], columns[BEHAVIOUR], responses, self._policy)
        learned = responses.index < len(responses)
        # not products: what is not learned may be impossible, and -inf times 0 is no number
        logprobs = torch.where(learned, logprobs.double(), 0.0)
        numbers = {name: torch.where(learned, columns[name].double(), 0.0) for name in self.columns}
        ratio = ratios(logprobs, numbers[OLD], responses, self._parts.ratio)
        if self._parts.opd_coeff:
            # The student's numbers are those before the step, which are what its tokens were drawn from:
            # the advantage has no derivative, and that of log p, times it, is that of the reverse KL.
            numbers[ADVANTAGE] = numbers[ADVANTAGE] + self._parts.opd_coeff * (
                numbers[TEACHER] - numbers[OLD])
        losses = self._loss(ratio, logprobs, numbers[ADVANTAGE]) * factors
        weights = label_weights(responses, self._parts.aggregation)
        terms = {POLICY: (losses * weights).sum()}
        if KL in self.coefficients:
            reference = numbers[REFERENCE]
            if self._parts.kl == "sequence":
                # Not weighed by label: its denominator counts responses.
                terms[KL] = of_sequences(logprobs, reference, responses).sum()
            else:
                if self._parts.kl == "k1":
                    estimate = k1(logprobs, reference)
                else:
                    estimate = k3(logprobs, reference) * (ratio if self._parts.kl_weighted else 1)
                terms[KL] = (estimate * weights).sum()
        with torch.no_grad():
            return terms, _sums(learned, self._watched(ratio, logprobs, numbers, factors))

    def _watched(self, ratio: torch.Tensor, logprobs: torch.Tensor, numbers: Columns,
                 factors: torch.Tensor) -> Columns:
        """Return what is watched at each label that a policy wrote: a mask must not hide what it is for."""
        old, behaviour = numbers[OLD], numbers[BEHAVIOUR]
        watched = {"ratio": ratio, "clip_share": is_clipped(ratio, numbers[ADVANTAGE], self._parts),
                   "entropy_estimate": -logprobs, "engine_gap": old - behaviour,
                   "engine_kl": k3(behaviour, old)}
        if self._masks:
            watched["masked_share"] = factors == 0
        if KL in self.coefficients:
            watched["reference_kl"] = k3(logprobs, numbers[REFERENCE])
        if self._parts.opd_coeff:
            watched[REVERSE_KL] = old - numbers[TEACHER]
        return watched


def _sums(counted: torch.Tensor, watched: Columns) -> Measured:
    return {name: (torch.where(counted, value.double(), 0.0).sum(), counted.sum())
            for name, value in watched.items()}


def ratios(logprobs: torch.Tensor, old: torch.Tensor, responses: Responses, kind: Ratio) -> torch.Tensor:
    """Return [T] float64 the ratio that weighs each label; 1 of labels that are not learned.

    Args:
        logprobs: [T] of the policy, differentiable.
        old: [T] of the policy that wrote them.
        responses: which labels are learned.
        kind: token: of each label (arXiv 2402.03300, equation 3); sequence: the geometric mean over its
            response (arXiv 2507.18071, equation 7).
    """
    learned = responses.index < len(responses)
    # not a product: what is not learned may be impossible
    apart = torch.where(learned, logprobs.double() - old.double(), 0.0)
    if kind == "sequence":
        # GSPO: the mean of logarithms, so long responses do not leave the clip by length alone.
        apart = responses.spread(responses.means(apart))
    return _quotient(apart)


def label_weights(responses: Responses, kind: Aggregation) -> torch.Tensor:
    """Return [T] float64 what each label's loss is multiplied by; 0 where it is not learned."""
    if kind == "sequence":
        return responses.spread(1 / responses.lengths.clamp(min=1))
    return responses.spread(torch.ones_like(responses.lengths))


def denominator(responses: Responses, kind: Aggregation, max_new_tokens: int) -> float:
    """Return what the sum over these responses' labels is divided by, as far as it is theirs.

    Args:
        responses: on the host.
        kind: token: all tokens of the step (arXiv 2503.14476, equation 8); sequence: its responses, of which
            each counts the mean over its tokens (arXiv 2402.03300, equation 3); constant: its responses, each
            as if it were the longest (arXiv 2503.20783, section 3.2).
        max_new_tokens: of the longest response.
    """
    if kind == "token":
        return float(responses.lengths.sum())
    count = float((responses.lengths > 0).sum())
    return count * max_new_tokens if kind == "constant" else count


def surrogate(ratios: torch.Tensor, logprobs: torch.Tensor, advantages: torch.Tensor,
              parts: PolicyParts) -> torch.Tensor:
    """Return [T] float64 what each label adds to the objective, to be maximised.

    Where every ratio is 1 each kind's derivative is REINFORCE's: advantage times that of log p.

    Args:
        ratios: [T] of policy to writer, differentiable.
        logprobs: [T] of the policy, differentiable, and finite.
        advantages: [T].
        parts: two_sided: PPO's (arXiv 1707.06347, equation 7) with bounds of their own (arXiv 2503.14476,
            equation 8); cispo: the ratio is a weight, bounded above (arXiv 2506.13585, equations 4 and 5,
            without the lower bound, which its authors do not use); none: importance sampling as it is.
    """
    advantages = advantages.double()
    if parts.clip == "cispo":
        # The bounded ratio is a weight without a gradient, so a clipped label still teaches.
        return ratios.clamp(max=1 + parts.clip_high).detach() * advantages * logprobs.double()
    if parts.clip == "none":
        return ratios * advantages
    # The smaller one is the pessimist: gains are bounded, losses are corrected in full.
    return torch.min(ratios * advantages,
                     ratios.clamp(1 - parts.clip_low, 1 + parts.clip_high) * advantages)


def surrogate_loss(ratios: torch.Tensor, logprobs: torch.Tensor, advantages: torch.Tensor,
                   parts: PolicyParts) -> torch.Tensor:
    """Return [T] float64 each label's loss: `surrogate`, which is to be maximised, with the other sign."""
    return -surrogate(ratios, logprobs, advantages, parts)


def is_clipped(ratios: torch.Tensor, advantages: torch.Tensor, parts: PolicyParts) -> torch.Tensor:
    """Return [T] bool: labels of which the bound has a say, so that they teach nothing (two_sided), or less
    (cispo)."""
    above = ratios > 1 + parts.clip_high
    if parts.clip == "cispo":
        return above
    if parts.clip == "none":
        return torch.zeros_like(above)
    # The bound acts on the side that the advantage pushes to.
    return (above & (advantages > 0)) | ((ratios < 1 - parts.clip_low) & (advantages < 0))


def importance(old: torch.Tensor, behaviour: torch.Tensor, responses: Responses,
               policy: PolicyConfig) -> torch.Tensor:
    """Return [T] float64 what each label's loss is multiplied by; 0 of labels that are masked out.

    Args:
        old: [T] log-probabilities by the trainer.
        behaviour: [T] by the engine, whose tokens they are.
        responses: which labels are learned.
        policy: `correction` and its bounds: truncated at the larger bound ("Your efficient RL framework
            secretly brings you off-policy RL training", Yao et al. 2025), or masked outside of both (IcePop);
            the ratio of whole responses is the product of their tokens'.  Beside it geometric rejection
            ("When speed kills stability", Liu et al. 2025; `seq_mean_k1` in verl).
    """
    learned = responses.index < len(responses)
    # A ratio of 1 where nothing is learned, whatever its columns hold.
    apart = torch.where(learned, old.double() - behaviour.double(), 0.0)
    kept = torch.ones_like(apart)
    if bounds := policy.geo_bounds:
        # a mean of logarithms, so that the bounds suit responses of every length
        means = _quotient(responses.means(apart))
        kept = responses.spread(((means >= bounds[0]) & (means <= bounds[1])).double()).where(learned, 1.0)
    if policy.correction == "none":
        return kept
    level, _, kind = policy.correction.partition("_")
    # A whole response's ratio is a product over its tokens, a sum of logarithms.
    ratio = _quotient(responses.spread(responses.sums(apart)) if level == "sequence" else apart)
    low, high = policy.correction_low, policy.correction_bound
    if kind == "truncate":
        return kept * ratio.clamp(low, high)
    return kept * torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


KNOWLEDGE = "knowledge"
MOST_CLIPPED, MOST_ENGINE_KL = 0.05, 0.05
"""What is told in a round's first step.  Published engines differ from trainers by a KL of about 1e-3 a token
(arXiv 2510.11370)."""


class PolicyLearning(DataObjective):
    """``policy + kl_coeff * kl + knowledge_coeff * CE(text) / its tokens`` (+ multi-token prediction on all
    that is learned).

    A class of your own derives from it and says in `policy_loss` what each token's loss is
    (docs/own_code.md).
    """

    formats = (ROLLOUTS,)
    comparable_loss = False
    headline: tuple[Meter, ...] = (Meter(REWARD, better="higher", heldout=f"{VALIDATION}.reward"),
                                   Meter(RESPONSE_TOKENS, "response length", "tokens"),
                                   Meter(GROUPS_LEARNING, "groups that learn", "share", "higher"))

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        asked, rollout = context.config.policy, context.config.rollout
        self._rollout, self._parts = rollout, asked.parts
        self._temperature, self._loss = rollout.temperature, PolicyLoss(
            asked, rollout.max_new_tokens, self.policy_loss)
        self.meters = self._loss.meters
        if self._parts.opd_coeff:
            self.headline = (Meter(REVERSE_KL, "KL to the teacher", "nats", "lower"), *self.headline)
        self.coefficients = dict(self._loss.coefficients)
        if asked.has_text:
            self.coefficients[KNOWLEDGE] = asked.parts.knowledge_coeff
        self.coefficients |= self._mtp_coefficient
        self._config = context.config

    @classmethod
    def columns_by(cls, config: RunConfig) -> Mapping[str, NeededColumn]:
        """Return the columns that the settings need."""
        columns = PolicyLoss(config.policy, config.rollout.max_new_tokens).columns
        return dict.fromkeys(columns, NeededColumn("`megatron-sov rl train`", (ROLLOUTS,)))

    def policy_loss(self, ratio: torch.Tensor, logprobs: torch.Tensor, advantage: torch.Tensor
                    ) -> torch.Tensor:
        """Return [T] float64 the loss of each token that a response consists of.

        Args:
            ratio: [T] of the policy to the one that began the round, differentiable.
            logprobs: [T] of the policy, differentiable.
            advantage: [T] of the response that the token belongs to, with what a teacher adds to it.
        """
        return surrogate_loss(ratio, logprobs, advantage, self._parts)

    def prepare(self, batch: GlobalBatch) -> GlobalBatch:
        """Count tokens or responses of the global batch.  A prompt that several responses have is computed
        once."""
        hosts = [m.host for m in batch.micro_batches]
        counts = [self._loss.denominators(responses_of(m)) for m in hosts]
        # Before the first forward: a mean over the step does not depend on how it is split.
        targets = {term: sum(count[term] for count in counts) for term in self._loss.coefficients}
        if KNOWLEDGE in self.coefficients:
            targets[KNOWLEDGE] = sum(float((m.weights.double() * _is_text(m)).sum()) for m in hosts)
        # Counted before prompts are shared, which removes labels of prompts alone.
        return with_shared_prompts(with_denominators(batch, targets | self._mtp_targets(hosts)), self._config)

    def doubt(self, step: int, meters: Mapping[str, float]) -> str:
        """As `train.objectives.objective.doubt_of`: a clip that acts where nothing was learned yet, and an
        engine that speaks for another model."""
        # Later steps of a round have moved the policy, and may be clipped for good reasons.
        is_first = (step - 1) % self._rollout.steps_per_round == 0
        if is_first and (share := meters.get("clip_share", 0.0)) > MOST_CLIPPED:
            return (f"{share:.0%} of the tokens are clipped in a round's first step, whose ratios are 1 but "
                    "for rounding: policy.clip_low and policy.clip_high are narrower than the trainer's own "
                    "rounding; widen them, or raise train.precision")
        if is_first and (gap := meters.get("engine_kl", 0.0)) > MOST_ENGINE_KL:
            # a store may also bring a stale round where rollout.max_staleness is 0
            return (f"engine_kl = {gap:.2g} a token: look at staleness_steps of the round; above 0, older "
                    "weights wrote its responses: lower rollout.max_staleness; at 0 the engine's model or "
                    "precision is far from the trainer's; see engine_gap in docs/policy_methods.md")
        return ""

    def loss(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> LossSums:
        """Return the summed losses of a micro-batch's responses, and of its text."""
        # most labels are a prompt's
        wanted = learned(batch.host) if KNOWLEDGE in self.coefficients else batch.host.weights > 0
        logprobs = head.logprobs(hidden[0], batch.labels, self._temperature, wanted)
        # Text has no responses, so its labels are in none of these sums.
        terms, meters = self._loss.terms(logprobs, batch.columns, responses_of(batch))
        losses = -logprobs.detach()
        if KNOWLEDGE in self.coefficients:
            terms[KNOWLEDGE], losses = self._of_text(hidden[0], head, batch, losses)
        terms |= self._mtp_sum(hidden, head, batch)
        counted = batch.weights > 0
        by_source = per_source(losses.where(counted, 0.0), counted.to(losses.dtype), batch.sources,
                               self._num_sources)
        return LossSums(terms, by_source, meters)

    def _of_text(self, hidden: torch.Tensor, head: Head, batch: MicroBatch,
                 losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed cross-entropy of text, at temperature 1, and the log's losses with those of text
        in their places; the head is not applied again to a micro-batch without text, as most are."""
        if not bool((_is_text(batch.host) & (batch.host.weights > 0)).any()):
            return losses.new_zeros(()), losses
        is_text = _is_text(batch)
        sums, of_labels = head.cross_entropy(hidden, batch.labels, {KNOWLEDGE: batch.weights * is_text})
        return sums[KNOWLEDGE], torch.where(is_text, of_labels, losses)


def _is_text(batch: MicroBatch) -> torch.Tensor:
    return batch.types == TYPE_TEXT


def has_other_gradients(config: RunConfig) -> bool:
    """Return whether a step changes weights although the advantages of its responses are all 0: by a
    divergence, a teacher, preferences, predictions further ahead, the balance of experts, or a loss of the
    user's own."""
    model, parts = config.model, config.policy.parts
    balances = model.num_moe_layers() and (model.seq_aux_loss_coeff or model.router_bias_update_rate)
    return (config.objective.name != "policy" or not config.policy.learns_from_rewards
            or (parts.kl != "none" and parts.kl_coeff > 0) or bool(balances)
            or (model.num_mtp_layers > 0 and model.mtp_loss_coeff > 0))


def can_share(config: RunConfig) -> bool:
    """Return whether a run's rows hold prompts once: its settings allow it, and the attention is ours."""
    te = uses_transformer_engine(PRECISION[config.train.precision])
    return config.may_share_prompts and own_attention_serves(
        Here(te, config.model, config.parallel), config.gpu.attention, config.train.deterministic)


def with_shared_prompts(batch: GlobalBatch, config: RunConfig) -> GlobalBatch:
    """Return a batch, whose targets are counted, with each prompt once in a micro-batch where that can be."""
    if not can_share(config):
        return batch
    return dataclasses.replace(batch, micro_batches=tuple(map(sharing_prompts, batch.micro_batches)))


def sharing_prompts(batch: MicroBatch) -> MicroBatch:
    """Return a micro-batch without what is in it more than once; without such a thing the same.

    Placeholders of two pictures are the same tokens, so a row that has any is left as it is.
    """
    host = batch.host
    if host.inputs.encoder_inputs:
        return batch
    source, kept = np.arange(len(host.labels)), np.ones(len(host.labels), bool)
    spans = _spans(host, source, kept)
    if kept.all() or host.inputs.routes is not None:
        return batch
    index = torch.from_numpy(kept.nonzero()[0])
    # From places in the whole row to places among the kept tokens.
    source = (kept.cumsum() - 1)[source]
    found = _only(host, index, torch.from_numpy(source), spans)
    if batch.on_host is None:
        return found
    device = batch.labels.device
    return dataclasses.replace(
        _only(batch, to_device(index, device), to_device(torch.from_numpy(source), device), spans),
        on_host=found)


def _spans(host: MicroBatch, source: np.ndarray, kept: np.ndarray) -> list[Span]:
    """Return where each document begins, its first token that is kept, and its end.

    Args:
        host: the micro-batch on the host.
        source: [tokens]: gets the place of the token that stands for each.
        kept: [tokens] bool: gets False for those that another one stands for.
    """
    tokens, positions = host.inputs.tokens.numpy(), host.inputs.positions.numpy()
    is_learned = (host.weights > 0).numpy()
    begun: dict[tuple[int, bytes], int] = {}
    spans = []
    for start, stop in pairwise(host.inputs.cu_seqlens.tolist()):
        if start == stop:
            continue
        prompt = int(is_learned[start:stop].argmax())  # 0 where nothing is learned, as of padding
        # By position too: the same tokens at other positions are other numbers.
        first = begun.setdefault((int(positions[start]), tokens[start:start + prompt].tobytes()), start)
        if prompt and first != start:
            source[start:start + prompt] = np.arange(first, first + prompt)
            kept[start:start + prompt] = False
            # The first document with this prompt keeps it; this one keeps what comes after.
            spans.append((start, start + prompt, stop))
        else:
            spans.append((start, start, stop))
    return spans


def _only(batch: MicroBatch, index: torch.Tensor, source: torch.Tensor, spans: list[Span]) -> MicroBatch:
    """Return a micro-batch of some of its tokens.

    Args:
        index: [kept tokens] int64: which.
        source: see `SharedPrompts`.
        spans: see `SharedPrompts`.
    """
    inputs = batch.inputs
    bounds = list(accumulate((stop - first for _, first, stop in spans), initial=0))
    return dataclasses.replace(
        batch,
        inputs=dataclasses.replace(
            inputs, tokens=inputs.tokens[index], positions=inputs.positions[index],
            cu_seqlens=to_device(torch.tensor(bounds, dtype=torch.int32), inputs.tokens.device),
            padding=inputs.padding[index], host_bounds=bounds,
            shared=SharedPrompts(source, spans, inputs.padding)),
        labels=batch.labels[index], weights=batch.weights[index], types=batch.types[index],
        sources=batch.sources[index],
        columns={name: column[index] for name, column in batch.columns.items()})


@dataclass(frozen=True)
class PolicyObjective:
    """Makes the objective."""

    formats: tuple[str, ...]
    """See `train.objectives.objective.formats_of`."""
    columns: Mapping[str, NeededColumn]
    """See `train.objectives.objective.columns_of`."""
    kind: type[DataObjective] = PolicyLearning

    def __call__(self, context: ObjectiveContext) -> DataObjective:
        return self.kind(context)


def objective_of(config: RunConfig) -> PolicyObjective:
    return PolicyObjective((ROLLOUTS, *([TEXT] if config.policy.has_text else [])),
                           PolicyLearning.columns_by(config))


def texts_of(config: RunConfig) -> tuple[Source, ...]:
    """Return the packed data of a run: text, and where text is learned beside responses, chats as such;
    where a teacher's distributions are learned, both as they are.

    Raises:
        UserError: they cannot be read, are of another kind, or do not fit the model.
    """
    if not config.data.paths:
        return ()
    policy = config.policy
    sources = open_sources(config.data.paths, config.model.vocab_size,
                           TEXTS if policy.has_text or policy.learns_distributions else (TEXT,))
    # what a teacher is heard at is what `distill` learns: of chats the assistant's turns
    return tuple(sources if policy.learns_distributions else map(as_text, sources))


def check_sources(config: RunConfig, sources: list[Source]) -> None:
    """Refuse data that leave the term of text without targets, or are called as the run's own rounds are.

    Raises:
        UserError: there is no text, or a source has the rounds' name.
    """
    if [source.name for source in sources].count(SOURCE) > 1:
        raise UserError(f"--data: has a source {SOURCE!r}, as the run's own rounds are called; pack it under "
                        "another name")
    policy, there = config.policy, [source for source in sources if source.share > 0 and source.num_tokens[
        "train"]]
    if policy.on_policy_share < 1 and not there:
        raise UserError(f"policy.on_policy_share = {policy.on_policy_share:g}: the other rounds learn from "
                        "data; add --data, or set it to 1")
    if policy.has_text and not any(source.format == TEXT for source in there):
        raise UserError(f"policy.knowledge_coeff = {config.policy.parts.knowledge_coeff} needs text; add "
                        "--data with packed text to train on, or set it to 0")
