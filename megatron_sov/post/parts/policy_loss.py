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
first step; by the model that the run starts from."""
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
        self._before = OLD if policy.needs_old_logprobs else BEHAVIOUR
        self.columns = (ADVANTAGE, BEHAVIOUR, *([OLD] if policy.needs_old_logprobs else []),
                        *([REFERENCE] if KL in self.coefficients else []))
        """Those that are read."""
        self.meters = ("ratio", "clip_share", "entropy_estimate", "engine_gap", "engine_kl",
                       *(["reference_kl"] if KL in self.coefficients else []))

    def learned(self, responses: Responses, columns: Columns) -> tuple[Responses, torch.Tensor]:
        """Return the responses without labels that a correction masks out, and [T] float64 what each label's
        loss is multiplied by."""
        factors = mismatch.importance(columns[self._before], columns[BEHAVIOUR], responses, self._policy)
        masks = self._policy.correction.endswith("mask")
        return responses.only(factors > 0) if masks else responses, factors

    def denominators(self, responses: Responses) -> dict[str, float]:
        """Return what each term's sum is divided by, as far as it is of these responses, on the host."""
        kinds = {POLICY: self._parts.aggregation,
                 KL: "sequence" if self._parts.kl == "sequence" else self._parts.aggregation}
        return {term: denominator(responses, kinds[term], self._longest) for term in self.coefficients}

    def terms(self, logprobs: torch.Tensor, columns: Columns, responses: Responses,
              factors: torch.Tensor) -> tuple[dict[str, torch.Tensor], Measured]:
        """Return each term's sum over the row, and each meter's sum and count over learned labels.

        Args:
            logprobs: [T] of the policy, differentiable; of what is not learned they may be anything.
            columns: the numbers.
            responses: as `learned` gives them.
            factors: likewise.
        """
        learned = responses.index < len(responses)
        # not products: what is not learned may be impossible, and -inf times 0 is no number
        logprobs = torch.where(learned, logprobs.double(), 0.0)
        numbers = {name: torch.where(learned, columns[name].double(), 0.0) for name in self.columns}
        ratio = ratios(logprobs, numbers[self._before], responses, self._parts.ratio)
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
            values = self._measured(ratio, logprobs, numbers)
            count = learned.sum()
            return terms, {name: (torch.where(learned, value.double(), 0.0).sum(), count)
                           for name, value in zip(self.meters, values, strict=True)}

    def _measured(self, ratio: torch.Tensor, logprobs: torch.Tensor, numbers: Columns) -> list[torch.Tensor]:
        """Return what is watched at each label, in the order of `meters`."""
        trainer, behaviour = (numbers[OLD] if self._before == OLD else logprobs), numbers[BEHAVIOUR]
        watched = [ratio, is_clipped(ratio, numbers[ADVANTAGE], self._parts), -logprobs, trainer - behaviour,
                   mismatch.k3(trainer, behaviour)]
        return watched + ([kl.k3(logprobs, numbers[REFERENCE])] if KL in self.coefficients else [])
