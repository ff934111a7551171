"""A policy's loss over the labels of a row, put together from its parts; no model is needed here.

Shapes: T labels of a row, R responses.  Columns are numbers [T] of each label.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_sov.config.policy import PolicyConfig
from megatron_sov.post.parts import kl, mismatch
from megatron_sov.post.parts.aggregation import denominator, label_weights
from megatron_sov.post.parts.clips import is_clipped, surrogate
from megatron_sov.post.parts.ratios import ratios
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
        factors = mismatch.importance(columns[OLD], columns[BEHAVIOUR], responses, self._policy)
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
                   "engine_kl": mismatch.k3(old, behaviour)}
        if self._masks:
            watched["masked_share"] = factors == 0
        if KL in self.coefficients:
            watched["reference_kl"] = kl.k3(logprobs, numbers[REFERENCE])
        return watched


def _sums(counted: torch.Tensor, watched: Columns) -> Measured:
    """Return each meter's sum over the labels that are counted, and their count."""
    return {name: (torch.where(counted, value.double(), 0.0).sum(), counted.sum())
            for name, value in watched.items()}
