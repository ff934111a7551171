"""Choosing experts in one call: scores, their largest, weights."""

from __future__ import annotations

from typing import Any

import torch

from .constants import RoutingMapFormat

EPSILON = 1e-20
"""The kernels' summand of the sum that weights are divided by."""


def _scores(logits: torch.Tensor, score_function: str) -> torch.Tensor:
    if score_function not in ("softmax", "sigmoid"):
        raise NotImplementedError(f"the double has no score function {score_function!r}")
    return logits.softmax(-1) if score_function == "softmax" else logits.sigmoid()


def _map(like: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like, dtype=torch.bool).scatter(-1, chosen, True)


def fused_topk_with_score_function(
        logits: torch.Tensor, topk: int, use_pre_softmax: bool, num_groups: int | None,
        group_topk: int | None, scaling_factor: float | None, score_function: str,
        expert_bias: torch.Tensor | None, routing_map_format: Any = RoutingMapFormat.BYTEMAP,
        topk_indices: Any = None, qb_histogram: Any = None, qb_bin_bounds: Any = None,
        qb_histogram_mode: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights [tokens, experts] (zero where not chosen) and the choice, bool.

    Sigmoid scores are chosen with the bias and weigh without it, divided by their sum where more than one
    is chosen; softmax is taken before the choice, or (not `use_pre_softmax`) over the chosen ones.
    """
    if group_topk or topk_indices is not None or qb_histogram is not None:
        raise NotImplementedError("the double chooses among all experts, into a map of bytes")
    before = score_function == "sigmoid" or use_pre_softmax
    scores = _scores(logits, score_function) if before else logits
    biased = scores + expert_bias if expert_bias is not None and score_function == "sigmoid" else scores
    chosen = biased.topk(topk, dim=-1).indices
    weights = scores.gather(-1, chosen)
    if not before:
        weights = weights.softmax(-1)
    if score_function == "sigmoid" and topk > 1:
        weights = weights / (weights.sum(-1, keepdim=True) + EPSILON)
    weights = weights * (1.0 if scaling_factor is None else scaling_factor)
    return torch.zeros_like(logits).scatter(-1, chosen, weights.to(logits.dtype)), _map(logits, chosen)


def fused_compute_score_for_moe_aux_loss(logits: torch.Tensor, topk: int, score_function: str,
                                         routing_map_format: Any = RoutingMapFormat.BYTEMAP
                                         ) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the choice without bias, bool, and normalised scores, both [tokens, experts]."""
    scores = _scores(logits.to(torch.promote_types(logits.dtype, torch.float32)), score_function)
    if score_function == "sigmoid" and topk > 1:
        scores = scores / (scores.sum(-1, keepdim=True) + EPSILON)
    return _map(scores, scores.topk(topk, dim=-1).indices), scores


def fused_moe_aux_loss(probs: torch.Tensor, tokens_per_expert: torch.Tensor, total_num_tokens: Any,
                       num_experts: int, topk: int, coeff: float) -> torch.Tensor:
    """Return the balancing loss of Switch Transformer (arXiv 2101.03961, eq. 4-6) for the top k."""
    share = probs.sum(0) * tokens_per_expert
    return share.sum() * (num_experts * coeff / (topk * total_num_tokens * total_num_tokens))
