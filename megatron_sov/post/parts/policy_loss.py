"""A policy's loss over the labels of a row, put together from its parts; no model is needed here.

Ratios of the policy to the one that wrote a response; surrogates, which bound how far one step goes on
responses of an older policy; what each token counts in the mean over a step; and the correction for an engine
that computes other log-probabilities than the trainer: the ratio of the trainer's policy to the engine's,
both as they were when a response was written.

Shapes: T labels of a row, R responses.  Columns are numbers [T] of each label.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_sov.model.config.post_training import Aggregation, PolicyConfig, PolicyParts, Ratio
from megatron_sov.post.parts import kl
from megatron_sov.post.parts.responses import Responses

POLICY, KL = "policy", "kl"
"""Terms."""
ADVANTAGE, BEHAVIOUR, OLD, REFERENCE = (
    "advantage", "behaviour_logprobs", "old_logprobs", "reference_logprobs")
"""Columns: the response's advantage; log p by the engine that wrote it; by the trainer before the round's
first step, NaN of a label that the first step learns; by the model that the run starts from."""
Columns = Mapping[str, torch.Tensor]
Measured = dict[str, tuple[torch.Tensor, torch.Tensor]]


class PolicyLoss:
    """``-sum over labels of weight * importance * surrogate``, and the divergence from a reference."""

    def __init__(self, policy: PolicyConfig, max_new_tokens: int) -> None:
        """Begin.

        Args:
            policy: the settings.
            max_new_tokens: of the longest response.
        """
        self._policy, self._parts, self._longest = policy, policy.parts, max_new_tokens
        self.coefficients = {POLICY: 1.0}
        if self._parts.kl != "none" and self._parts.kl_coeff > 0:
            self.coefficients[KL] = self._parts.kl_coeff
        # ratios are never against an engine's numbers: a clip as narrow as GSPO's would take the engine's
        # rounding for a step of the policy, and leave out the responses that are worse than their group
        self.columns = (ADVANTAGE, BEHAVIOUR, OLD, *([REFERENCE] if KL in self.coefficients else []))
        """Those that are read."""
        self._masks = policy.correction.endswith("mask")
        self.meters = ("ratio", "clip_share", "entropy_estimate", "engine_gap", "engine_kl",
                       *(["masked_share"] if self._masks else []),
                       *(["reference_kl"] if KL in self.coefficients else []))

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
        factors = importance(columns[OLD], columns[BEHAVIOUR], responses, self._policy)
        learned = responses.index < len(responses)
        # not products: what is not learned may be impossible, and -inf times 0 is no number
        logprobs = torch.where(learned, logprobs.double(), 0.0)
        numbers = {name: torch.where(learned, columns[name].double(), 0.0) for name in self.columns}
        ratio = ratios(logprobs, numbers[OLD], responses, self._parts.ratio)
        gained = surrogate(ratio, logprobs, numbers[ADVANTAGE], self._parts) * factors
        weights = label_weights(responses, self._parts.aggregation)
        terms = {POLICY: -(gained * weights).sum()}
        if KL in self.coefficients:
            reference = numbers[REFERENCE]
            terms[KL] = (kl.of_sequences(logprobs, reference, responses).sum()
                         if self._parts.kl == "sequence"
                         else ((kl.k1 if self._parts.kl == "k1" else kl.k3)(logprobs, reference)
                               * weights).sum())
        with torch.no_grad():
            return terms, _sums(learned, self._watched(ratio, logprobs, numbers, factors))

    def _watched(self, ratio: torch.Tensor, logprobs: torch.Tensor, numbers: Columns,
                 factors: torch.Tensor) -> Columns:
        """Return what is watched at each label that a policy wrote: a mask must not hide what it is for."""
        old, behaviour = numbers[OLD], numbers[BEHAVIOUR]
        watched = {"ratio": ratio, "clip_share": is_clipped(ratio, numbers[ADVANTAGE], self._parts),
                   "entropy_estimate": -logprobs, "engine_gap": old - behaviour,
                   "engine_kl": kl.k3(behaviour, old)}
        if self._masks:
            watched["masked_share"] = factors == 0
        if KL in self.coefficients:
            watched["reference_kl"] = kl.k3(logprobs, numbers[REFERENCE])
        return watched


def _sums(counted: torch.Tensor, watched: Columns) -> Measured:
    """Return each meter's sum over the labels that are counted, and their count."""
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
        apart = responses.spread(responses.means(apart))
    return apart.exp()


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
        return ratios.clamp(max=1 + parts.clip_high).detach() * advantages * logprobs.double()
    if parts.clip == "none":
        return ratios * advantages
    return torch.min(ratios * advantages,
                     ratios.clamp(1 - parts.clip_low, 1 + parts.clip_high) * advantages)


def is_clipped(ratios: torch.Tensor, advantages: torch.Tensor, parts: PolicyParts) -> torch.Tensor:
    """Return [T] bool: labels of which the bound has a say, so that they teach nothing (two_sided), or less
    (cispo)."""
    above = ratios > 1 + parts.clip_high
    if parts.clip == "cispo":
        return above
    if parts.clip == "none":
        return torch.zeros_like(above)
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
            the ratio of whole responses is the product of their tokens'.
    """
    learned = responses.index < len(responses)
    apart = torch.where(learned, old.double() - behaviour.double(), 0.0)
    if policy.correction == "none":
        return torch.ones_like(apart)
    level, _, kind = policy.correction.partition("_")
    ratio = (responses.spread(responses.sums(apart)) if level == "sequence" else apart).exp()
    low, high = policy.correction_low, policy.correction_bound
    if kind == "truncate":
        return ratio.clamp(low, high)
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)
