"""Expert selection in one call: scores, top-k, weights."""

from __future__ import annotations

import math
from typing import Any

import torch

from .constants import RoutingMapFormat
from .placement import require_cuda

EPSILON = 1e-20
"""Added by the kernels to the sum of weights before they divide by it."""


def _scores(logits: torch.Tensor, score_function: str) -> torch.Tensor:
    if score_function not in ("softmax", "sigmoid"):
        raise NotImplementedError(f"the double has no score function {score_function!r}")
    return logits.softmax(-1) if score_function == "softmax" else logits.sigmoid()


def _check(logits: torch.Tensor, topk: int) -> None:
    """Raise the errors of the extension's checks."""
    if logits.dtype == torch.float64:
        raise ValueError("Current TE does not support float64 router type.")
    if not logits.is_contiguous():
        raise RuntimeError("logits must be contiguous")
    if not logits.numel():
        raise RuntimeError("num_tokens and num_experts must be greater than 0")
    if not 0 < topk <= logits.shape[-1]:
        raise RuntimeError(f"topk must be in [1, num_experts], got topk={topk}")


def _mask_other_groups(scores: torch.Tensor, topk: int, num_groups: int, group_topk: int) -> torch.Tensor:
    """Return scores [tokens, experts] with -inf outside the `group_topk` groups with the largest sums of
    their best `topk // group_topk` scores."""
    grouped = scores.unflatten(-1, (num_groups, -1))
    sums = grouped.topk(topk // group_topk, dim=-1).values.sum(-1)
    mask = _build_map(sums, sums.topk(group_topk, dim=-1).indices)
    return grouped.masked_fill(~mask[..., None], -math.inf).flatten(-2)


def _build_map(like: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like, dtype=torch.bool).scatter(-1, chosen, True)


class _SaveSelection(torch.autograd.Function):
    """Saves the selection for the backward pass, as the kernels do: callers must not overwrite it before."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(chosen)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        assert ctx.saved_tensors  # torch raises here if the selection was overwritten
        return gradient, None


def fused_topk_with_score_function(
        logits: torch.Tensor, topk: int, use_pre_softmax: bool, num_groups: int | None,
        group_topk: int | None, scaling_factor: float | None, score_function: str,
        expert_bias: torch.Tensor | None, routing_map_format: Any = RoutingMapFormat.BYTEMAP,
        topk_indices: Any = None, qb_histogram: Any = None, qb_bin_bounds: Any = None,
        qb_histogram_mode: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Select experts; return weights (zero for unselected experts) and a bool map, both [tokens, experts].

    Sigmoid scores are selected with the bias, weighted without it, and divided by their sum if `topk` > 1.
    Softmax is applied before the selection, or (without `use_pre_softmax`) to the selected logits. Computed
    in float32.
    """
    if topk_indices is not None or qb_histogram is not None:
        raise NotImplementedError("the double returns the selection only as a byte map")
    _check(logits, topk)
    require_cuda(logits=logits, expert_bias=expert_bias)
    if expert_bias is not None and score_function != "sigmoid":
        raise RuntimeError("score_function must be sigmoid or sqrtsoftplus when expert_bias is not None")
    if expert_bias is not None and expert_bias.dtype != torch.float32:
        raise RuntimeError("expert_bias must be a float32 tensor")
    selects_scores = score_function == "sigmoid" or use_pre_softmax
    scores = _scores(logits.float(), score_function) if selects_scores else logits.float()
    order = scores if expert_bias is None else scores + expert_bias
    if group_topk:
        assert num_groups is not None
        chosen = _mask_other_groups(order, topk, num_groups, group_topk).topk(topk, dim=-1).indices
    else:
        chosen = order.topk(topk, dim=-1).indices
    weights = order.gather(-1, chosen)
    if expert_bias is not None:
        weights = weights - expert_bias[chosen]
    if not selects_scores:
        weights = weights.softmax(-1)
    if score_function == "sigmoid" and topk > 1:
        weights = weights / (weights.sum(-1, keepdim=True) + EPSILON)
    weights = weights * (1.0 if scaling_factor is None else scaling_factor)
    choice = _build_map(logits, chosen)
    spread = torch.zeros_like(logits).scatter(-1, chosen, weights.to(logits.dtype))
    return _SaveSelection.apply(spread, choice), choice


def fused_compute_score_for_moe_aux_loss(logits: torch.Tensor, topk: int, score_function: str,
                                         routing_map_format: Any = RoutingMapFormat.BYTEMAP
                                         ) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bool map of the experts selected without bias, and the scores; both [tokens, experts]."""
    _check(logits, topk)
    require_cuda(logits=logits)
    scores = _scores(logits.float(), score_function)
    if score_function == "sigmoid" and topk > 1:
        scores = scores / (scores.sum(-1, keepdim=True) + EPSILON)
    return _build_map(scores, scores.topk(topk, dim=-1).indices), scores


def fused_moe_aux_loss(probs: torch.Tensor, tokens_per_expert: torch.Tensor, total_num_tokens: Any,
                       num_experts: int, topk: int, coeff: float) -> torch.Tensor:
    """Return the load balancing loss of Switch Transformer (arXiv 2101.03961, eq. 4-6), with `topk` experts
    per token instead of one."""
    require_cuda(probs=probs, tokens_per_expert=tokens_per_expert)
    share = probs.sum(0) * tokens_per_expert
    return share.sum() * (num_experts * coeff / (topk * total_num_tokens * total_num_tokens))
