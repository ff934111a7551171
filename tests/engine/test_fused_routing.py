"""Routing with a double of Transformer Engine's kernels against the router's own formula."""

from typing import Any

import pytest
import torch

from megatron_sov.engine.router import BalancedRouter
from tests.tiny import tiny_model

EXPERTS, TOKENS, SEQ_LEN = 8, 24, 8
CASES = [
    # score, normalization, K, bias, is_supported: whether the kernels compute the router's formula
    ("sigmoid", True, 2, True, True), ("sigmoid", True, 2, False, True), ("sigmoid", False, 1, True, True),
    ("softmax", True, 2, False, True), ("softmax", False, 2, False, True), ("softmax", True, 1, False, True),
    # The kernels never normalize a single sigmoid weight, and always normalize several.
    ("sigmoid", True, 1, True, False), ("sigmoid", False, 2, True, False),
]


def build_kernel_doubles(calls: list[str]) -> dict[str, Any]:
    """Return torch doubles of Transformer Engine's two routing kernels, by name; each logs its calls."""
    def compute_scores(logits: torch.Tensor, score_function: str) -> torch.Tensor:
        assert logits.dtype == torch.float32 and logits.is_contiguous()
        return logits.softmax(-1) if score_function == "softmax" else logits.sigmoid()

    def topk(logits: torch.Tensor, topk: int, use_pre_softmax: bool, num_groups: None, group_topk: None,
             scaling_factor: float, score_function: str, expert_bias: torch.Tensor | None) -> Any:
        calls.append("choice")
        assert expert_bias is None or score_function == "sigmoid"
        scores_first = use_pre_softmax or score_function == "sigmoid"  # before the choice of experts
        scores = compute_scores(logits, score_function) if scores_first else logits
        bias = torch.zeros(1) if expert_bias is None else expert_bias
        biased, index = (scores + bias).topk(topk, -1)
        weights = biased - bias.expand(scores.shape[-1])[index]
        if not scores_first:
            weights = weights.softmax(-1)
        elif score_function == "sigmoid" and topk > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, index, True)
        return torch.zeros_like(logits).scatter(1, index, weights * scaling_factor), chosen

    def balance(logits: torch.Tensor, topk: int, score_function: str) -> Any:
        calls.append("balance")
        scores = compute_scores(logits, score_function)
        if score_function == "sigmoid":
            scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, scores.topk(topk, -1).indices, True)
        return chosen, scores

    return {"fused_topk_with_score_function": topk, "fused_compute_score_for_moe_aux_loss": balance}


def compare_fused_routing(score: str, norm: bool, top_k: int, biased: bool) -> dict[str, Any]:
    """Route by the router's formula and by the doubles of the kernels.

    Returns the calls of the doubles, whether the chosen experts agree, and the largest differences of
    weights, choices, gradients of the logits and balancing loss.
    """
    from megatron.core.extensions import transformer_engine
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    _, model = tiny_model(
        "tiny-solar-open", f"model.num_experts={EXPERTS}", f"model.num_experts_per_token={top_k}",
        "model.num_layers=1", f"model.router_score={score}", f"model.router_bias={str(biased).lower()}",
        f"model.norm_topk_prob={str(norm).lower()}", "model.routed_scaling_factor=2.5",
        "model.seq_aux_loss_coeff=0.3", layout={})
    router = next(m for m in model.modules() if isinstance(m, BalancedRouter))
    step = model.config.routing_step
    step.seq_len, step.num_sequences = SEQ_LEN, TOKENS // SEQ_LEN
    generator = torch.Generator().manual_seed(1)
    logits, upstream = torch.randn(2, TOKENS, EXPERTS, generator=generator)
    if biased:
        router.expert_bias.copy_(torch.randn(EXPERTS, generator=generator) * 0.3)
    padding = (torch.arange(TOKENS) % 7 == 6)[:, None]  # tokens 6, 13 and 20
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    calls: list[str] = []
    # never undone: the function runs in processes of its own
    for name, double in build_kernel_doubles(calls).items():
        setattr(transformer_engine, name, double)
    results = []
    for model.config.moe_router_fusion in (False, True):
        # without fusion no double has been called
        assert bool(calls) <= model.config.moe_router_fusion
        local, step.aux_loss = logits.clone().requires_grad_(), {}
        weights, chosen = router.routing(local[:, None], padding)
        (weights * upstream).sum().backward()
        results.append((weights.detach(), chosen, local.grad, step.aux_loss[1]))
    formula, fused = results
    differences = [float((a.double() - b.double()).abs().max()) for a, b in zip(formula, fused, strict=True)]
    return {"calls": calls, "same choice": torch.equal(formula[1], fused[1]), "difference": differences}


@pytest.mark.distributed
def test_fused_kernels_route_like_the_router_or_are_not_called(ranks: Any, job: Any) -> None:
    arguments = ("score", "norm", "top_k", "biased")
    results = ranks(*(job(__file__, "compare_fused_routing", 1, dict(zip(arguments, case[:4], strict=True)))
                      for case in CASES))
    for case, (result,) in zip(CASES, results, strict=True):
        is_supported = case[-1]
        assert ("choice" in result["calls"]) == is_supported, case
        assert result["same choice"] and max(result["difference"]) < 2e-6, case
        if is_supported:
            assert result["calls"] == ["choice", "balance"], case
