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
        self.masks = policy.has_mask
        """Whether a correction may leave labels out."""
        self.meters = ("ratio", "clip_share", "entropy_estimate", "engine_gap", "engine_kl",
                       *(["masked_share"] if self.masks else []),
                       *(["reference_kl"] if KL in self.coefficients else []))

    def _learned(self, written: Responses, columns: Columns) -> tuple[Responses, torch.Tensor]:
        """Return the responses without labels that a correction masks out, and [T] float64 what each label's
        loss is multiplied by."""
        factors = mismatch.importance(columns[OLD], columns[BEHAVIOUR], written, self._policy)
        return written.only(factors > 0) if self.masks else written, factors

    def denominators(self, written: Responses, columns: Columns) -> dict[str, float]:
        """Return what each term's sum is divided by, as far as it is of these responses, on the host."""
        responses, _ = self._learned(written, columns)
        kinds = {POLICY: self._parts.aggregation,
                 KL: "sequence" if self._parts.kl == "sequence" else self._parts.aggregation}
        return {term: denominator(responses, kinds[term], self._longest) for term in self.coefficients}

    def terms(self, logprobs: torch.Tensor, columns: Columns,
              written: Responses) -> tuple[dict[str, torch.Tensor], Measured]:
        """Return each term's sum over the row, and each meter's sum and count.

        Args:
            logprobs: [T] of the policy, differentiable; of what is not learned they may be anything.
            columns: the numbers.
            written: the responses, with what a correction masks out.
        """
        # what the first step learns, it learns at the very weights that the round begins with
        old = columns[OLD].double()
        columns = {**columns, OLD: torch.where(old.isnan(), logprobs.detach().double(), old)}
        responses, factors = self._learned(written, columns)
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
            of_learned = _sums(learned, self._of_learned(ratio, logprobs, numbers))
            of_written = _sums(written.index < len(written), self._of_written(learned, columns))
        return terms, of_learned | of_written

    def _of_learned(self, ratio: torch.Tensor, logprobs: torch.Tensor, numbers: Columns) -> Columns:
        """Return what is watched at each label that is learned."""
        watched = {"ratio": ratio, "clip_share": is_clipped(ratio, numbers[ADVANTAGE], self._parts),
                   "entropy_estimate": -logprobs}
        return watched | ({"reference_kl": kl.k3(logprobs, numbers[REFERENCE])} if KL in self.coefficients
                          else {})

    def _of_written(self, learned: torch.Tensor, columns: Columns) -> Columns:
        """Return what is watched at each label that a policy wrote: a mask must not hide what it is for."""
        trainer, behaviour = columns[OLD], columns[BEHAVIOUR]
        watched = {"engine_gap": trainer.double() - behaviour.double(),
                   "engine_kl": mismatch.k3(trainer, behaviour)}
        return watched | ({"masked_share": ~learned} if self.masks else {})


def _sums(counted: torch.Tensor, watched: Columns) -> Measured:
    """Return each meter's sum over the labels that are counted, and their count."""
    return {name: (torch.where(counted, value.double(), 0.0).sum(), counted.sum())
            for name, value in watched.items()}
