"""Replayed routes: table look-ups, routing with recorded experts, and a whole step at every layout."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sov.base.documents.shard_files import RouteShape
from megatron_sov.engine.model.chunk import ModelInputs
from megatron_sov.engine.model.expert_load import ExpertLoad
from megatron_sov.engine.model.replica_checks import list_gradients
from megatron_sov.engine.optimizer.optimizer import Optimizer
from megatron_sov.engine.route_replay import RouteTable, replay_routes
from megatron_sov.engine.router import BalancedRouter
from tests.engine.decode.test_forward_only import Row, compute_gradients
from tests.tiny import tiny_model

EXPERTS, TOP_K, SEQ_LEN = 8, 2, 8
SETTINGS = [f"model.num_experts={EXPERTS}", f"model.num_experts_per_token={TOP_K}",
            "model.seq_aux_loss_coeff=0.01", "model.init_std=0.3", "train.precision=fp64"]
ROWS, ROW_TOKENS = 4, 32
FIRST_PADDING = 25
"""Position of the first padding token in the last row."""


def draw_random_routes(num_tokens: int, layers: int, seed: int) -> np.ndarray:
    """Return random experts [tokens, layers, top_k]; one token and layer in eight is not recorded."""
    shape, random = RouteShape(layers, TOP_K, EXPERTS), np.random.default_rng(seed)
    permutations = random.permuted(np.tile(np.arange(EXPERTS), (num_tokens, layers, 1)), axis=2)
    routes = permutations[:, :, :TOP_K].astype(shape.dtype)
    routes[random.random((num_tokens, layers)) < 1 / 8] = shape.mark
    return routes


def decode_tables() -> list[list[Any]]:
    """Encode the table positions of four tokens in a padding mask, and decode their routes from a table of 10
    tokens, for both dtypes of routes. Returns [is_recorded, experts of the first two tokens] for each
    layer."""
    lookups = []
    for shape in (RouteShape(2, 2, 40), RouteShape(2, 2, 400)):
        routes = shape.build_unrecorded(10)
        # tokens 3 and 9 are recorded: experts [layers, top_k]
        routes[3], routes[9] = [[5, 1], [39, 38]], [[0, shape.num_experts - 1], [2, 7]]
        table = RouteTable(routes, first_layer=4)
        mask = table.encode_mask(torch.tensor([False, False, False, True]), torch.tensor([9, 3, 0, 9]))
        assert mask.dtype == torch.bool and mask[0].tolist() == [False, False, False, True]
        for layer in (4, 5):
            decoded = table.decode_routes(mask.T, layer)
            lookups.append([decoded.is_recorded.tolist(), decoded.experts[:2].tolist()])
    return lookups


def test_route_tables_list_known_and_unknown_tokens(ranks, job) -> None:
    is_recorded = [True, True, False, False]  # the table has no route of the third; the fourth is padding
    assert ranks(job(__file__, "decode_tables"))[0][0] == [
        [is_recorded, [[0, 39], [5, 1]]], [is_recorded, [[2, 7], [39, 38]]],
        [is_recorded, [[0, 399], [5, 1]]], [is_recorded, [[2, 7], [39, 38]]]]


def route_recorded() -> dict[str, Any]:
    """Route tokens along recorded routes, through a router without selection bias.

    Returns, for each result of the router: [computed, expected by formula].
    """
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    _, model = tiny_model("tiny-qwen3-moe", *SETTINGS, "model.num_layers=1", layout={})
    router = next(m for m in model.modules() if isinstance(m, BalancedRouter))
    step = model.config.routing_step
    step.seq_len, step.num_sequences = SEQ_LEN, 1
    logits = torch.randn(SEQ_LEN, EXPERTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    routes, padding = draw_random_routes(SEQ_LEN, 1, 1), torch.arange(SEQ_LEN) == 7
    routes[2] = 255  # `RouteShape.mark`: not recorded
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    with replay_routes(model.config, [None, routes]) as firsts:
        # table index of each row's first token
        assert firsts == [None, 0]
        mask = step.table.encode_mask(padding, torch.arange(SEQ_LEN)).T
        weights, chosen = router.routing(logits[:, None], mask)
        assert router.routing(logits[:, None], padding[:, None])[1].equal(
            torch.zeros_like(chosen).scatter(1, logits.topk(TOP_K).indices, True)), (
                "a mask without encoded positions selects no recorded routes")
    assert step.table is None
    expected = torch.where(torch.from_numpy(routes[:, 0, :1] == 255) | padding[:, None],
                           logits.topk(TOP_K).indices, torch.from_numpy(routes[:, 0]).long())
    scores = logits.softmax(-1)
    expected_scores = scores.gather(1, expected)
    counts = torch.zeros(EXPERTS, dtype=torch.float64).index_add_(
        0, expected[:7].flatten(), torch.ones(7 * TOP_K, dtype=torch.float64))
    # The router counted both calls of `routing`; the second call used the router's own choice.
    expected_live_counts = torch.bincount(logits[:7].topk(TOP_K).indices.flatten(), minlength=EXPERTS)
    return {"weights": [weights.gather(1, expected).tolist(),
                        (expected_scores / expected_scores.sum(-1, keepdim=True)).tolist()],
            "chosen": [chosen.nonzero()[:, 1].tolist(), expected.sort(dim=1).values.flatten().tolist()],
            "counts": [router.local_tokens_per_expert.tolist(), (counts + expected_live_counts).tolist()],
            "loss": [float(step.aux_loss[1]), float(compute_balancing_loss(scores, counts)
                                                    + compute_balancing_loss(scores, expected_live_counts))]}


def compute_balancing_loss(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Compute the balancing loss of the 7 tokens before the padding, from the number of tokens per expert."""
    return 0.01 * (counts * EXPERTS / TOP_K / 7 * scores[:7].mean(0)).sum()


def test_recorded_experts_use_live_scores_and_enter_counts_and_balancing(ranks, job) -> None:
    ((results,),) = ranks(job(__file__, "route_recorded"))
    for name, (ours, formula) in results.items():
        assert np.allclose(ours, formula, rtol=1e-12), name


def take_three_steps(layout: dict[str, Any], settings: list[str], recorded: str, *,
                     records: bool = False) -> Any:
    """Take the same step along the routers' own routes, along recorded routes, and along random routes.

    Args:
        layout: parallelism settings.
        settings: further settings of the recipe.
        recorded: .npy file of recorded routes [rows, tokens, layers, top_k].
        records: write the routes of the first step to `recorded`.

    Returns:
        "losses" and gradient "norms" of the three steps; "same": whether the first two have equal bits.
    """
    config, model = tiny_model("tiny-k-exaone", *SETTINGS, *settings, layout=layout)
    optimizer, load = Optimizer(model, config.optim, gpu=config.gpu), ExpertLoad(model)
    model.config.finalize_model_grads_func = load.finalize_gradients
    step = model.config.routing_step
    step.seq_len, step.num_sequences = 16, 2 * ROWS  # a row holds two documents of 16 tokens
    # biases that differ per layer, so that the choice differs from the order of the scores
    for module in model.modules():
        if getattr(module, "expert_bias", None) is not None:
            module.expert_bias.copy_(torch.linspace(-0.2, 0.2, EXPERTS).roll(module.layer_number))
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number in range(ROWS):
        padding = torch.arange(ROW_TOKENS) >= (FIRST_PADDING if number == ROWS - 1 else ROW_TOKENS)
        inputs = ModelInputs(torch.randint(96, (ROW_TOKENS,), generator=generator),
                             torch.arange(16).repeat(2), torch.tensor([0, 16, 32], dtype=torch.int32), 16,
                             padding)
        rows.append(Row(inputs, torch.randint(96, (ROW_TOKENS,), generator=generator), (~padding).double()))

    def compute_routed(routes: Any) -> tuple[float, torch.Tensor]:
        """Return a step's loss and flattened gradients. Routes None: the routers choose for the row."""
        routed_rows = [dataclasses.replace(row, inputs=dataclasses.replace(row.inputs, routes=row_routes))
                       for row, row_routes in zip(rows, routes, strict=True)]
        step.aux_loss = {}
        loss = compute_gradients(config, model, optimizer, routed_rows)
        load.restore_biases()
        return loss, torch.cat([gradient.flatten().clone() for gradient in list_gradients(model)])

    num_layers = config.model.num_moe_layers()
    if records:
        step.record = {}
    live_loss, live_gradients = compute_routed([None] * ROWS)
    if records:
        by_layer = [np.stack([routes.numpy() for routes in step.record[layer]])
                    for layer in sorted(step.record)]
        np.save(recorded, np.stack(by_layer, 2).astype(np.uint8))
        step.record = None
    replayed_loss, replayed_gradients = compute_routed(list(np.load(recorded)))
    # the first row keeps the routers' choice
    random_routes = (draw_random_routes(ROW_TOKENS, num_layers, i) for i in range(1, ROWS))
    random_loss, random_gradients = compute_routed([None, *random_routes])
    gradients = (live_gradients, replayed_gradients, random_gradients)
    return {"losses": [live_loss, replayed_loss, random_loss], "layers": num_layers,
            "norms": [float(gradient.norm()) for gradient in gradients],
            "same": live_loss == replayed_loss and live_gradients.equal(replayed_gradients)}


FULL_RECOMPUTE = ["train.recompute=true"]
EXPERT_RECOMPUTE = ["train.recompute=selective", 'gpu.recompute_modules=["moe"]']
# name -> number of ranks, layout, further settings
LAYOUTS: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    "one rank, recomputed": (1, {}, FULL_RECOMPUTE),
    "TP2+SP, experts recomputed": (2, {"tp": 2, "sp": True}, EXPERT_RECOMPUTE),
    "PP2 x EP2": (4, {"pp": 2, "ep": 2}, []),
    "PP2 VPP2, recomputed": (2, {"pp": 2, "vpp": 2}, FULL_RECOMPUTE),
    "CP2": (2, {"cp": 2}, []),
}
TENSOR_PARALLEL_CASE = {"TP2+SP, experts recomputed"}


@pytest.mark.distributed
@pytest.mark.deep
@pytest.mark.parametrize("names", [TENSOR_PARALLEL_CASE, LAYOUTS.keys() - TENSOR_PARALLEL_CASE],
                         ids=["tensors", "others"])
def test_a_step_along_recorded_routes_equals_the_recorded_step_at_every_layout(names: set[str], ranks, job,
                                                                               tmp_path: Path) -> None:
    recorded = str(tmp_path / "routes.npy")
    ((one_rank,),) = ranks(job(__file__, "take_three_steps", 1, {
        "layout": {}, "settings": [], "recorded": recorded, "records": True}))
    routes = np.load(recorded)
    assert routes.shape == (ROWS, ROW_TOKENS, one_rank["layers"], TOP_K) and routes.max() < EXPERTS
    assert one_rank["same"]
    assert abs(one_rank["losses"][2] - one_rank["losses"][0]) > 1e-3, "other routes are another loss"
    cases = {name: case for name, case in LAYOUTS.items() if name in names}
    results = ranks(*(job(__file__, "take_three_steps", n, {"layout": layout, "settings": settings,
                                                            "recorded": recorded})
                      for n, layout, settings in cases.values()))
    for name, per_rank in zip(cases, results, strict=True):
        for result in per_rank:
            assert result["same"], name
            # The third loss shows that each rank looks up the routes of its own tokens.
            assert result["losses"] == pytest.approx(one_rank["losses"], rel=1e-12), name
        if len(per_rank) == 1:
            assert per_rank[0]["norms"] == pytest.approx(one_rank["norms"], rel=1e-12), name
