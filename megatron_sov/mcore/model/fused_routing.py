"""Choosing experts by Transformer Engine's fused kernels (2.7 or newer), where their formula is the router's.

Never run on a GPU here.  Read for it: the Python side of Transformer Engine 2.20.2, and the simple forward
kernels (`common/fused_router/*.cu`) of its development branch at 2.20.0.dev0.  They compute in float32, add
the bias to sigmoid scores for the choice alone, and divide sigmoid weights by their sum (plus 1e-20) where
more than one expert is chosen.  The weight of a chosen expert is its biased score less the bias, so it may
differ from the score in the last bits.  A group's score is the sum of its best K / (kept groups) experts,
which is the router's sum of two where twice as many experts as groups are chosen.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_sov.config import ModelConfig


def problem(model: ModelConfig) -> str:
    """Return why the kernels cannot choose experts for a model here; empty: they can."""
    from megatron.core.extensions import transformer_engine as te

    if te.fused_topk_with_score_function is None:
        return ("needs the routing kernels of Transformer Engine 2.7 or newer, and the one here has none; "
                "install a newer one, or leave it out")
    if not _formula_serves(model.router_score, model.norm_topk_prob, model.num_experts_per_token):
        return (f"does not go with model.norm_topk_prob = {model.norm_topk_prob} and "
                f"model.num_experts_per_token = {model.num_experts_per_token}: the kernels divide several "
                "sigmoid weights by their sum, and never a single one; leave it out")
    if model.num_expert_groups > 1 and not _groups_serve(model.num_experts_per_token,
                                                         model.num_groups_per_token):
        return (f"does not go with model.num_experts_per_token = {model.num_experts_per_token} and "
                f"model.num_groups_per_token = {model.num_groups_per_token}: of a group the kernels add up "
                "as many scores as experts are chosen in a kept one, and the router two; leave it out")
    return ""


def serves(config: Any, logits: torch.Tensor) -> bool:
    """Return whether the kernels are wanted (`moe_router_fusion`), are there, and compute what
    the router does."""
    from megatron.core.extensions import transformer_engine as te

    if not config.moe_router_fusion or te.fused_topk_with_score_function is None:
        return False
    if logits.dtype == torch.float64:
        return False
    if config.moe_router_num_groups is not None and not _groups_serve(config.moe_router_topk,
                                                                      config.moe_router_group_topk):
        return False
    return _formula_serves(config.moe_router_score_function, config.norm_topk_prob, config.moe_router_topk)


def _formula_serves(score: str, normalised: bool, num_chosen: int) -> bool:
    """Return whether the kernels compute a router's weights: those of a softmax may be divided by their sum
    or not, one sigmoid weight is never divided, several always are."""
    return score == "softmax" or normalised == (num_chosen > 1)


def _groups_serve(num_chosen: int, num_groups: int) -> bool:
    """Return whether the kernels' score of a group is the router's, the sum of two."""
    return num_chosen // num_groups == 2


def choose(config: Any, logits: torch.Tensor,
           bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights [tokens, experts] (zero where not chosen) and the choice [tokens, experts] bool."""
    from megatron.core.extensions import transformer_engine as te

    weights, chosen = te.fused_topk_with_score_function(
        logits=logits.contiguous(), topk=config.moe_router_topk,
        # a softmax over the chosen ones alone is one over all, divided by the sum of the chosen ones
        use_pre_softmax=not config.norm_topk_prob, num_groups=config.moe_router_num_groups,
        group_topk=config.moe_router_group_topk,
        scaling_factor=config.moe_router_topk_scaling_factor,
        score_function=config.moe_router_score_function, expert_bias=bias)
    return weights, chosen


def balancing_scores(config: Any, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores [tokens, experts] that sum to 1, and which are the largest K [tokens, experts] bool."""
    from megatron.core.extensions import transformer_engine as te

    chosen, scores = te.fused_compute_score_for_moe_aux_loss(
        logits=logits.contiguous(), topk=config.moe_router_topk,
        score_function=config.moe_router_score_function)
    return scores, chosen
