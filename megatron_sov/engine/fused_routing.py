"""Fused routing kernels of Transformer Engine (2.7 or newer), for routers with the same formula.

Checked against: the Python code of Transformer Engine 2.20.2, and the simple forward kernels
(`common/fused_router/*.cu`) of its development branch at 2.20.0.dev0. The kernels compute in float32, add the
bias to sigmoid scores only for the choice, and divide sigmoid weights by their sum (plus 1e-20) if several
experts are chosen. The weight of a chosen expert is the biased score minus the bias, so its last bits may
differ from the score. A group's score is the sum of its best K / (chosen groups) experts, equal to the
router's sum of two if K is twice the number of chosen groups."""

from typing import Any

import torch
from megatron.core.extensions import transformer_engine as te

from megatron_sov.model.config import ModelConfig


def find_fusion_problem(model: ModelConfig) -> str:
    """Return why the kernels cannot route this model (`gpu.router_fusion`), or ""."""
    if te.fused_topk_with_score_function is None:
        return ("needs the routing kernels of Transformer Engine 2.7 or newer, and the one here has none; "
                "install a newer one, or leave it out")
    if not _matches_formula(model.router_score, model.norm_topk_prob, model.num_experts_per_token):
        return (f"does not go with model.norm_topk_prob = {model.norm_topk_prob} and "
                f"model.num_experts_per_token = {model.num_experts_per_token}: the kernels divide several "
                "sigmoid weights by their sum, and never a single one; leave it out")
    if model.num_expert_groups > 1 and not _matches_group_score(model.num_experts_per_token,
                                                                model.num_groups_per_token):
        return (f"does not go with model.num_experts_per_token = {model.num_experts_per_token} and "
                f"model.num_groups_per_token = {model.num_groups_per_token}: of a group the kernels add up "
                "as many scores as experts are chosen in a kept one, and the router two; leave it out")
    return ""


def uses_fused_routing(config: Any, logits: torch.Tensor) -> bool:
    """Return whether `moe_router_fusion` is on, and its kernels exist and compute the same routing."""
    if not config.moe_router_fusion or te.fused_topk_with_score_function is None:
        return False
    if logits.dtype == torch.float64:
        return False
    if config.moe_router_num_groups is not None and not _matches_group_score(config.moe_router_topk,
                                                                             config.moe_router_group_topk):
        return False
    return _matches_formula(config.moe_router_score_function, config.norm_topk_prob, config.moe_router_topk)


def _matches_formula(score: str, normalised: bool, num_chosen: int) -> bool:
    """Return whether the kernels compute the router's weights: a softmax with or without normalization, a
    single sigmoid weight without, several sigmoid weights with it."""
    return score == "softmax" or normalised == (num_chosen > 1)


def _matches_group_score(num_chosen: int, num_groups: int) -> bool:
    """Return whether the kernels compute group scores as the router does, as a sum of two."""
    return num_chosen // num_groups == 2


def choose_experts_fused(config: Any, logits: torch.Tensor,
                         bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights [tokens, experts] (zero if not chosen) and the choice [tokens, experts] bool."""
    weights, chosen = te.fused_topk_with_score_function(
        logits=logits.contiguous(), topk=config.moe_router_topk,
        # a softmax over the chosen experts equals the full softmax divided by the chosen experts' sum
        use_pre_softmax=not config.norm_topk_prob, num_groups=config.moe_router_num_groups,
        group_topk=config.moe_router_group_topk,
        scaling_factor=config.moe_router_topk_scaling_factor,
        score_function=config.moe_router_score_function, expert_bias=bias)
    # the kernels save the map for the backward pass, and Megatron-Core's dispatcher pads it in place
    return weights, chosen.clone() if config.moe_router_padding_for_quantization else chosen


def compute_balancing_scores(config: Any, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores [tokens, experts] that sum to 1, and the top K [tokens, experts] bool."""
    chosen, scores = te.fused_compute_score_for_moe_aux_loss(
        logits=logits.contiguous(), topk=config.moe_router_topk,
        score_function=config.moe_router_score_function)
    return scores, chosen
