"""Replayed routes: table look-ups, routing with recorded experts, and a whole step at every layout."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sov.base.documents.shard_files import RouteShape
from megatron_sov.engine.decode import forward_only
from megatron_sov.engine.model.chunk import ModelInputs
from megatron_sov.engine.model.expert_load import ExpertLoad
from megatron_sov.engine.model.logprobs import build_head
from megatron_sov.engine.model.replica_checks import list_gradients
from megatron_sov.engine.optimizer.optimizer import Optimizer
from megatron_sov.engine.parallel import collectives, world
from megatron_sov.engine.route_replay import RouteTable, replay_routes
from megatron_sov.engine.router import BalancedRouter
from tests.tiny import tiny_model

EXPERTS, TOP_K, SEQ_LEN = 8, 2, 8
SETTINGS = [f"model.num_experts={EXPERTS}", f"model.num_experts_per_token={TOP_K}",
            "model.seq_aux_loss_coeff=0.01", "model.init_std=0.3", "train.precision=fp64"]
ROWS, ROW_TOKENS = 4, 32
PADDED = 25
"""First padding token of the last row."""


def drawn_routes(num_tokens: int, layers: int, seed: int) -> np.ndarray:
    """Return random routes that a router would not choose; one in eight is unknown."""
    shape, random = RouteShape(layers, TOP_K, EXPERTS), np.random.default_rng(seed)
    routes = random.permuted(np.tile(np.arange(EXPERTS), (num_tokens, layers, 1)), axis=2)[:, :, :TOP_K]
    routes = routes.astype(shape.dtype)
    routes[random.random((num_tokens, layers)) < 1 / 8] = shape.mark
    return routes


def tables() -> list[list[Any]]:
    """Return look-ups in tables of both dtypes by parts of a mask."""
    found = []
    for shape in (RouteShape(2, 2, 40), RouteShape(2, 2, 400)):
        routes = shape.absent(10)
        routes[3], routes[9] = [[5, 1], [39, 38]], [[0, shape.num_experts - 1], [2, 7]]
        table = RouteTable(routes, first_layer=4)
        mask = table.encode_mask(torch.tensor([False, False, False, True]), torch.tensor([9, 3, 0, 9]))
        assert mask.dtype == torch.bool and mask[0].tolist() == [False, False, False, True]
        for layer in (4, 5):
            told = table.decode_routes(mask.T, layer)
            found.append([told.is_recorded.tolist(), told.experts[:2].tolist()])
    return found


def test_route_tables_list_known_and_unknown_tokens(ranks, job) -> None:
    there = [True, True, False, False]  # the third is not recorded, the fourth is padding
    assert ranks(job(__file__, "tables"))[0][0] == [
        [there, [[0, 39], [5, 1]]], [there, [[2, 7], [39, 38]]],
        [there, [[0, 399], [5, 1]]], [there, [[2, 7], [39, 38]]]]


def routed() -> dict[str, Any]:
    """Return the results of a router without selection bias for recorded routes, and by formula."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    _, model = tiny_model("tiny-qwen3-moe", *SETTINGS, "model.num_layers=1", layout={})
    router = next(m for m in model.modules() if isinstance(m, BalancedRouter))
    step = model.config.routing_step
    step.seq_len, step.num_sequences = SEQ_LEN, 1
    logits = torch.randn(SEQ_LEN, EXPERTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    routes, padding = drawn_routes(SEQ_LEN, 1, 1), torch.arange(SEQ_LEN) == 7
    routes[2] = 255
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    with replay_routes(model.config, [None, routes]) as firsts:
        assert firsts == [None, 0]
        mask = step.table.encode_mask(padding, torch.arange(SEQ_LEN)).T
        weights, chosen = router.routing(logits[:, None], mask)
        assert router.routing(logits[:, None], padding[:, None])[1].equal(
            torch.zeros_like(chosen).scatter(1, logits.topk(TOP_K).indices, True)), "no places, no routes"
    assert step.table is None
    expected = torch.where(torch.from_numpy(routes[:, 0, :1] == 255) | padding[:, None],
                           logits.topk(TOP_K).indices, torch.from_numpy(routes[:, 0]).long())
    scores = logits.softmax(-1)
    taken = scores.gather(1, expected)
    counts = torch.zeros(EXPERTS, dtype=torch.float64).index_add_(
        0, expected[:7].flatten(), torch.ones(14, dtype=torch.float64))
    loss = 0.01 * (counts * EXPERTS / TOP_K / 7 * scores[:7].mean(0)).sum()
    # both passes were counted; the second used the router's own choice
    live = torch.bincount(logits[:7].topk(TOP_K).indices.flatten(), minlength=EXPERTS)
    return {"weights": [weights.gather(1, expected).tolist(), (taken / taken.sum(-1, keepdim=True)).tolist()],
            "chosen": [chosen.nonzero()[:, 1].tolist(), expected.sort(dim=1).values.flatten().tolist()],
            "counts": [router.local_tokens_per_expert.tolist(), (counts + live).tolist()],
            "loss": [float(step.aux_loss[1]), float(loss + _balancing(scores, live))]}


def _balancing(scores: Any, counts: Any) -> Any:
    return 0.01 * (counts * EXPERTS / TOP_K / 7 * scores[:7].mean(0)).sum()


def test_recorded_experts_use_live_scores_and_enter_counts_and_balancing(ranks, job) -> None:
    ((found,),) = ranks(job(__file__, "routed"))
    for name, (ours, formula) in found.items():
        assert np.allclose(ours, formula, rtol=1e-12), name


def steps(layout: dict[str, Any], settings: list[str], recorded: str, *, records: bool = False) -> Any:
    """Take the same step with the routers' choice, with one process's recorded routes, and with random
    routes.

    Returns:
        Loss and gradient norm of each, and whether the first two have equal bits.
    """

    @dataclasses.dataclass
    class Row:
        inputs: ModelInputs
        labels: torch.Tensor
        weights: torch.Tensor

    config, model = tiny_model("tiny-k-exaone", *SETTINGS, *settings, layout=layout)
    optimizer, load = Optimizer(model, config.optim, gpu=config.gpu), ExpertLoad(model)
    model.config.finalize_model_grads_func = load.finalize_gradients
    step = model.config.routing_step
    step.seq_len, step.num_sequences = 16, 2 * ROWS
    for module in model.modules():
        if getattr(module, "expert_bias", None) is not None:
            module.expert_bias.copy_(torch.linspace(-0.2, 0.2, EXPERTS).roll(module.layer_number))
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number in range(ROWS):
        padding = torch.arange(ROW_TOKENS) >= (PADDED if number == ROWS - 1 else ROW_TOKENS)
        inputs = ModelInputs(torch.randint(96, (ROW_TOKENS,), generator=generator),
                             torch.arange(16).repeat(2), torch.tensor([0, 16, 32], dtype=torch.int32), 16,
                             padding)
        rows.append(Row(inputs, torch.randint(96, (ROW_TOKENS,), generator=generator), (~padding).double()))

    def loss(hidden: torch.Tensor, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
        head = build_head(model, 7)
        total = -sum((head.logprobs(h, row.labels) * row.weights).sum()
                     for h in hidden.chunk(1 + config.model.num_mtp_layers))
        return total / 121, total.detach().double()

    dp_rank, dp_size = collectives.get_data_rank()

    def taken(routes: Any) -> tuple[float, torch.Tensor]:
        mine = [dataclasses.replace(r, inputs=dataclasses.replace(r.inputs, routes=found))
                for r, found in zip(rows, routes, strict=True)][dp_rank::dp_size]
        optimizer.zero_grad()
        step.aux_loss = {}
        parts = forward_only.run_pipeline(optimizer.wrapped, mine, loss, ROW_TOKENS, forward_only=False)
        load.restore_biases()
        local = torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)
        return (float(collectives.broadcast_from_last_stage(collectives.all_reduce_dp(local))),
                torch.cat([g.flatten().clone() for g in list_gradients(model)]))

    layers = config.model.num_moe_layers()
    if records:
        step.record = {}
    live = taken([None] * ROWS)
    if records:
        found = [np.stack([step.record[layer][i].numpy() for layer in sorted(step.record)], 1)
                 for i in range(ROWS)]
        np.save(recorded, np.stack(found).astype(np.uint8))
        step.record = None
    again = taken(list(np.load(recorded)))
    drawn = taken([None, *(drawn_routes(ROW_TOKENS, layers, i) for i in range(1, ROWS))])
    world.leave_world()
    return {"losses": [live[0], again[0], drawn[0]], "layers": layers,
            "norms": [float(x[1].norm()) for x in (live, again, drawn)],
            "same": live[0] == again[0] and live[1].equal(again[1])}


RECOMPUTED = ["train.recompute=true"]
PARTLY = ["train.recompute=selective", 'gpu.recompute_modules=["moe"]']
LAYOUTS: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    "one rank, recomputed": (1, {}, RECOMPUTED),
    "TP2+SP, experts recomputed": (2, {"tp": 2, "sp": True}, PARTLY),
    "PP2 x EP2": (4, {"pp": 2, "ep": 2}, []),
    "PP2 VPP2, recomputed": (2, {"pp": 2, "vpp": 2}, RECOMPUTED),
    "CP2": (2, {"cp": 2}, []),
}
FIRST = {"TP2+SP, experts recomputed"}


@pytest.mark.distributed
@pytest.mark.deep
@pytest.mark.parametrize("names", [FIRST, LAYOUTS.keys() - FIRST], ids=["tensors", "others"])
def test_a_step_along_recorded_routes_is_the_step_itself_at_every_layout(names: set[str], ranks, job,
                                                                         tmp_path: Path) -> None:
    recorded = str(tmp_path / "routes.npy")
    ((alone,),) = ranks(job(__file__, "steps", 1, {"layout": {}, "settings": [], "recorded": recorded,
                                                   "records": True}))
    routes = np.load(recorded)
    assert routes.shape == (ROWS, ROW_TOKENS, alone["layers"], TOP_K) and routes.max() < EXPERTS
    assert alone["same"]
    assert abs(alone["losses"][2] - alone["losses"][0]) > 1e-3, "other routes are another loss"
    chosen = {name: case for name, case in LAYOUTS.items() if name in names}
    results = ranks(*(job(__file__, "steps", n, {"layout": layout, "settings": settings,
                                                 "recorded": recorded})
                      for n, layout, settings in chosen.values()))
    for name, per_rank in zip(chosen, results, strict=True):
        for result in per_rank:
            assert result["same"], name
            # a wrong index would select other random routes
            assert result["losses"] == pytest.approx(alone["losses"], rel=1e-12), name
        if len(per_rank) == 1:
            assert per_rank[0]["norms"] == pytest.approx(alone["norms"], rel=1e-12), name
