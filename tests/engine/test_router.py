"""Routing against plain formulas: choice and weights as in transformers, balancing loss as in DeepSeek-V3."""

from typing import Any

import pytest
import torch

from megatron_sov.engine.model.chunk import ModelInputs
from megatron_sov.engine.parallel import context, world
from megatron_sov.engine.router import BalancedRouter
from tests.tiny import tiny_model

EXPERTS, TOP_K, SEQ_LEN, SEQUENCES = 8, 2, 8, 3
FACTOR, COEFF = 2.5, 0.3
"""Factor of the weights of routed experts, and coefficient of the balancing loss."""
PADDING = [7, 22, 23]
"""Positions of padding tokens: the last of the first sequence, and the last two of the third."""


def draw_inputs() -> tuple[Any, Any, Any]:
    """Return logits [tokens, experts], selection bias [experts], and the upstream gradient of the weights."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(SEQ_LEN * SEQUENCES, EXPERTS, generator=generator)
    bias = torch.randn(EXPERTS, generator=generator) * 0.3
    return logits, bias, torch.randn(SEQ_LEN * SEQUENCES, EXPERTS, generator=generator)


def build_first_router(*settings: str, layout: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Inside ranks: return the config of a tiny model, the model, and its first router."""
    config, model = tiny_model("tiny-solar-open", *settings, layout=layout)
    return config, model, next(m for m in model.modules() if isinstance(m, BalancedRouter))


def route(layout: dict[str, Any], padding: list[int], *, other_padding: bool = False) -> dict[str, Any]:
    """Route this process's tokens through the first router of a tiny model.

    `other_padding` changes the logits of padding tokens, which must change nothing.
    """
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    _, model, router = build_first_router(
        f"model.num_experts={EXPERTS}", f"model.num_experts_per_token={TOP_K}", "model.num_layers=1",
        f"model.routed_scaling_factor={FACTOR}", f"model.seq_aux_loss_coeff={COEFF}", layout=layout)
    step = model.config.routing_step
    step.seq_len, step.num_sequences = SEQ_LEN, SEQUENCES
    logits, bias, upstream = draw_inputs()
    mask = torch.zeros(len(logits), dtype=torch.bool)
    mask[padding] = True
    if other_padding:
        logits[mask] = 50.0  # far larger than those of other tokens
    router.expert_bias.copy_(bias)
    row_index = context.compute_row_index(len(logits), layout.get("sp", False), logits.device)
    local = logits[row_index].clone().requires_grad_()
    with torch.no_grad():  # the first pass of recomputation counts no tokens
        router.routing(local[:, None], mask[row_index][:, None])
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    weights, chosen = router.routing(local[:, None], mask[row_index][:, None])
    (weights * upstream[row_index]).sum().backward()
    return {"weights": weights.tolist(), "chosen": chosen.tolist(), "grad": local.grad.tolist(),
            "loss": float(step.aux_loss[1]), "index": row_index.tolist(),
            "counts": router.local_tokens_per_expert.tolist()}


def gate_bf16() -> dict[str, Any]:
    """Return the first router's logits for bf16 hidden states in a bf16 model."""
    config, _, router = build_first_router("train.precision=bf16", "model.num_layers=1", layout={})
    generator = torch.Generator().manual_seed(3)
    router.weight.data.copy_(torch.randn(router.weight.shape, generator=generator) * 0.1)
    hidden = torch.randn(16, 1, config.model.hidden_size, generator=generator).bfloat16()
    logits = router.gating(hidden)
    return {"hidden": hidden[:, 0].tolist(), "weight": router.weight.tolist(),
            "logits": logits[:, 0].tolist(),
            "dtypes": [str(t.dtype) for t in (router.weight, logits, router.expert_bias)]}


def count_forced_tokens(switch: str) -> list[float]:
    """Return the tokens per expert of a router whose weights send all tokens to the first two experts."""
    config, model, router = build_first_router(
        f"model.num_experts={EXPERTS}", f"model.num_experts_per_token={TOP_K}", "model.num_layers=1",
        f"gpu.force_even_routing={switch}", layout={})
    model.config.routing_step.begin(512, 1)
    router.weight.data.zero_()[:2] = 1
    router(torch.ones(512, 1, config.model.hidden_size))
    return router.local_tokens_per_expert.tolist()


def find_freed_routes() -> list[bool]:
    """Return, for each token dispatcher, whether it has freed its routes after a recomputed pass."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    _, model = tiny_model("tiny-solar-open", "train.recompute=true")
    model.config.routing_step.begin(48, 1)
    inputs = ModelInputs(torch.arange(48), torch.arange(48), torch.tensor([0, 48], dtype=torch.int32), 48,
                         torch.zeros(48, dtype=torch.bool))
    model.chunks[0](inputs).square().sum().backward()
    dispatchers = [layer.mlp.token_dispatcher for layer in model.chunks[0].decoder.layers]
    assert all(isinstance(d, MoEAlltoAllTokenDispatcher) for d in dispatchers)
    return [d.routing_map is d.reversed_local_input_permutation_mapping is None
            and d.probs.numel() == 0 and d.probs.grad_fn is None for d in dispatchers]


def compute_expected_routes(padding: list[int]) -> dict[str, Any]:
    """Compute the results of `route` for all tokens by plain formulas in float64."""
    logits, bias, upstream = (t.double() for t in draw_inputs())
    logits.requires_grad_()
    scores = logits.sigmoid()
    index = (scores + bias).topk(TOP_K).indices
    chosen = torch.zeros(len(logits), EXPERTS, dtype=torch.bool).scatter(1, index, True)
    weights = torch.where(chosen, scores, 0)
    weights = FACTOR * weights / weights.sum(-1, keepdim=True)
    valid = [t for t in range(len(logits)) if t not in padding]
    loss = torch.zeros((), dtype=torch.float64)
    for sequence in range(SEQUENCES):
        tokens = [t for t in valid if t // SEQ_LEN == sequence]
        # the loss uses the scores, not the biased choice
        top = scores[tokens].topk(TOP_K).indices.flatten().tolist()
        for expert in range(EXPERTS):
            frequency = EXPERTS / (TOP_K * len(tokens)) * top.count(expert)
            share = scores[tokens, expert] / scores[tokens].sum(-1)
            loss = loss + COEFF * frequency * share.mean() / SEQUENCES
    ((weights * upstream).sum() + loss).backward()
    return {"weights": weights.detach(), "chosen": chosen, "grad": logits.grad, "loss": float(loss.detach()),
            "counts": chosen[valid].sum(0).tolist()}


def join_tokens(results: list[dict[str, Any]], name: str) -> Any:
    """Return a result of `route` for all tokens in the order of the row, given those of all processes."""
    by_position = {}
    for result in results:
        by_position |= dict(zip(result["index"], result[name], strict=True))
    values = torch.tensor([by_position[position] for position in sorted(by_position)])
    return values.double() if values.is_floating_point() else values


def route_in_groups() -> list[Any]:
    """Route random scores with large biases within the best groups of experts.

    Returns [number of groups, number of kept groups, our weights, transformers' weights] for each case.
    """
    from transformers.models.solar_open.modeling_solar_open import SolarOpenConfig, SolarOpenTopkRouter

    cases, generator = [], torch.Generator().manual_seed(5)
    for num_groups, num_kept, top_k in ((4, 2, 3), (2, 1, 4), (8, 3, 5)):
        config, _, router = build_first_router(
            "model.num_experts=16", f"model.num_experts_per_token={top_k}",
            f"model.num_expert_groups={num_groups}", f"model.num_groups_per_token={num_kept}", layout={})
        router.eval()
        hidden, weight = (torch.randn(n, config.model.hidden_size, generator=generator) for n in (200, 16))
        reference = SolarOpenTopkRouter(SolarOpenConfig(
            hidden_size=config.model.hidden_size, n_routed_experts=16, num_experts_per_tok=top_k,
            n_group=num_groups, topk_group=num_kept))
        reference.weight.data.copy_(weight)
        reference.e_score_correction_bias.copy_(torch.randn(16, generator=generator) - 2)
        router.expert_bias.copy_(reference.e_score_correction_bias)
        logits, weights, index = reference(hidden)
        ours, _ = router.routing(logits[:, None])
        cases.append([num_groups, num_kept, ours.tolist(),
                      torch.zeros_like(logits).scatter(1, index, weights).tolist()])
        world.leave_world()
    return cases


def test_experts_are_chosen_within_the_best_groups_as_in_transformers(ranks: Any, job: Any) -> None:
    ((cases,),) = ranks(job(__file__, "route_in_groups", 1, {}))
    for num_groups, num_kept, ours, expected in cases:
        ours, expected = torch.tensor(ours), torch.tensor(expected)
        assert torch.allclose(ours, expected, atol=1e-6)
        num_reached = (ours.unflatten(1, (num_groups, -1)) > 0).any(-1).sum(-1)
        assert int(num_reached.max()) == num_kept and ours.count_nonzero() == expected.count_nonzero()


@pytest.mark.distributed
def test_routing_is_the_formula_at_every_layout_without_padding(ranks, job) -> None:
    sp = {"tp": 2, "sp": True}
    plain, padded, other_padding, sequence_parallel, context_parallel, both = ranks(
        job(__file__, "route", 1, {"layout": {}, "padding": []}),
        job(__file__, "route", 1, {"layout": {}, "padding": PADDING}),
        job(__file__, "route", 1, {"layout": {}, "padding": PADDING, "other_padding": True}),
        # both layouts split the row inside the second sequence
        job(__file__, "route", 2, {"layout": sp, "padding": PADDING}),
        job(__file__, "route", 2, {"layout": {"cp": 2}, "padding": PADDING}),
        job(__file__, "route", 4, {"layout": sp | {"cp": 2}, "padding": PADDING}))
    assert other_padding[0]["loss"] == padded[0]["loss"] != plain[0]["loss"]
    assert other_padding[0]["counts"] == padded[0]["counts"]
    for padding, result in (([], plain), (PADDING, padded), (PADDING, sequence_parallel),
                            (PADDING, context_parallel), (PADDING, both)):
        expected = compute_expected_routes(padding)
        assert join_tokens(result, "chosen").equal(expected["chosen"])
        assert torch.allclose(join_tokens(result, "weights"), expected["weights"], atol=1e-6)
        assert torch.allclose(join_tokens(result, "grad"), expected["grad"], atol=1e-6)
        assert sum(r["loss"] for r in result) == pytest.approx(expected["loss"], rel=1e-6)
        assert [sum(c) for c in zip(*(r["counts"] for r in result), strict=True)] == expected["counts"]


@pytest.mark.distributed
def test_bf16_logits_are_summed_in_float32_as_in_transformers(ranks, job) -> None:
    from transformers import SolarOpenConfig
    from transformers.models.solar_open.modeling_solar_open import SolarOpenTopkRouter

    ((result,),) = ranks(job(__file__, "gate_bf16"))
    assert result["dtypes"] == ["torch.bfloat16", "torch.float32", "torch.float32"]
    hidden, weight, logits = (torch.tensor(result[name]) for name in ("hidden", "weight", "logits"))
    router = SolarOpenTopkRouter(SolarOpenConfig(n_routed_experts=len(weight),
                                                 hidden_size=hidden.shape[1])).bfloat16()
    router.e_score_correction_bias = router.e_score_correction_bias.float()
    with torch.no_grad():
        router.weight.copy_(weight)
        expected, _, _ = router(hidden.bfloat16())
    assert expected.dtype == torch.float32
    assert (logits - expected).abs().max() < 1e-5, "sums in bf16 would differ by some 1e-2"
    assert (logits - logits.bfloat16()).abs().max() > 1e-3


def test_forced_routing_is_even_whatever_the_router_learned(ranks: Any, job: Any) -> None:
    (learned,), (forced,) = ranks(*(job(__file__, "count_forced_tokens", arguments={"switch": switch})
                                    for switch in ("off", "on")))
    assert learned == [512, 512, 0, 0, 0, 0, 0, 0]
    assert sum(forced) == 2 * 512
    assert max(forced) < 1.3 * 128  # 2 x 512 / 8 experts: 128 for each


def test_routes_are_freed_after_a_pass(ranks: Any, job: Any) -> None:
    ((are_freed,),) = ranks(job(__file__, "find_freed_routes"))
    assert len(are_freed) >= 2 and all(are_freed)
