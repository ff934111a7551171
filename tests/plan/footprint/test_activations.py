"""Saved activations of a layer, with recomputation and offloading, against sums by hand in bf16;
`benchmarks/plan_activations.py` measures them in float32."""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from megatron_sov import recipes
from megatron_sov.engine.model import delta_rule
from megatron_sov.engine.model.linear_attention import LinearAttention
from megatron_sov.engine.parallel import context
from megatron_sov.model.config import LinearAttentionConfig, RunConfig, apply_settings
from megatron_sov.plan.footprint.activations import (
    Tokens, _estimate_fla_attention, count_pending_micro_batches, count_stored_bytes, estimate_saved,
    estimate_stored, list_layer_kinds)
from tests.engine.model.test_linear_attention import LocalLinear, pack_row

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from plan_activations import CASES, measure_saved_bytes, predict_saved_bytes

TOKENS, HIDDEN, FFN, ROUTED, EXPERTS = 4096, 4096, 1280, 8, 128
"""Sizes of Solar Open 102B. A token goes to `ROUTED` of `EXPERTS` experts."""
QUERIES, KEYS = 64 * 128, 8 * 128
"""Channels of 64 query heads, and of 8 key or value heads."""
# Saved bf16 numbers (two bytes each) of one token in one layer.
NORMS = 2 * HIDDEN
ATTENTION = HIDDEN + (QUERIES + 2 * KEYS) + (QUERIES + KEYS) + QUERIES + 2 * 64
"""A head's softmax saves a float32, which has the bytes of two numbers."""
INPUT, SHARED = HIDDEN, 3 * FFN
ROUTER = 2.5 * 4 * EXPERTS + EXPERTS / 2 + ROUTED * (4 * 3 + 4)
"""Five float32 and a bool for each expert; three indices and two float32 for each choice."""
INSIDE = ROUTED * (HIDDEN + 3 * FFN)
ALL = NORMS + ATTENTION + INPUT + ROUTER + INSIDE + SHARED


def solar(*settings: str) -> RunConfig:
    return apply_settings(recipes.get("solar-open-102b"), ["parallel.ep=1", *settings])


@pytest.mark.each(("recomputed", "offloaded", "per_token"), [
    ([], [], ALL),
    (["layernorm"], [], ALL - INPUT),
    (["moe_act"], [], ALL - ROUTED * FFN),
    (["shared_experts"], [], ALL - SHARED),
    (["moe"], [], ALL - ROUTER - INSIDE - SHARED),
    # a fused kernel saves the inputs of its recomputation
    (["core_attn"], [], ALL),
    ([], ["core_attn", "attn_proj"], ALL - (QUERIES + 2 * KEYS) - QUERIES - 2 * 64),
    ([], ["mlp_norm", "qkv_linear"], ALL - 2 * HIDDEN),
    ([], ["expert_fc1", "moe_act"], ALL - ROUTED * (HIDDEN + 2 * FFN)),
    # recomputed activations cannot be offloaded
    (["moe"], ["expert_fc1"], ALL - ROUTER - INSIDE - SHARED),
])
def test_saved_activations_of_each_layer_kind(recomputed: list[str], offloaded: list[str],
                                              per_token: float) -> None:
    config = solar("train.recompute=selective", f"gpu.recompute_modules={json.dumps(recomputed)}",
                   f"gpu.offload_modules={json.dumps(offloaded)}")
    (kind,) = set(list_layer_kinds(config.model))
    saved = estimate_saved(config, TOKENS, kind)
    assert count_stored_bytes(config, TOKENS, kind, saved) == 2 * TOKENS * per_token
    assert saved.total == 2 * TOKENS * ALL


def test_graphs_keep_permuted_tokens_and_a_megabyte_each() -> None:
    settings = ("train.recompute=selective", "parallel.pp=2")
    plain, routers, both = (solar(*settings, *more) for more in (
        (), ['gpu.cuda_graphs=["moe_router"]'], ['gpu.cuda_graphs=["moe_router", "moe_preprocess"]']))
    (kind,) = set(list_layer_kinds(plain.model))
    saved = estimate_saved(plain, TOKENS, kind)
    assert (count_stored_bytes(both, TOKENS, kind, saved) - count_stored_bytes(plain, TOKENS, kind, saved)
            == 2 * TOKENS * ROUTED * HIDDEN)
    norms = 'gpu.recompute_modules=["layernorm"]'
    assert (estimate_stored(solar(*settings, norms, 'gpu.cuda_graphs=["moe_router"]'), 0, 4096, 28)
            == estimate_stored(routers, 0, 4096, 28)), "the graph returns the norm's output"
    graphs = estimate_stored(routers, 0, 4096, 28).waiting - estimate_stored(plain, 0, 4096, 28).waiting
    assert graphs == 2**20 * 24 * 28 * 2  # layers, micro-batches, forward and backward


def test_overlapped_layers_hold_the_output_of_shared_experts() -> None:
    plain = solar("train.recompute=false")
    overlapped = solar("train.recompute=false", "parallel.expert_overlap=micro_batches")
    kind = list_layer_kinds(plain.model)[-1]
    saved = estimate_saved(plain, TOKENS, kind)
    stored = [count_stored_bytes(config, TOKENS, kind, saved) for config in (plain, overlapped)]
    assert stored[1] - stored[0] == 2 * TOKENS * HIDDEN


def test_a_recomputed_layer_keeps_its_input() -> None:
    config = solar("train.recompute=true", "parallel.tp=4", "parallel.sp=true", "parallel.cp=2")
    (kind,) = set(list_layer_kinds(config.model))
    assert count_stored_bytes(config, TOKENS, kind, estimate_saved(
        config, TOKENS, kind)) == 2 * TOKENS // 8 * HIDDEN


def test_layers_differ_in_window_experts_and_positions() -> None:
    """K-EXAONE has a dense first layer; each fourth layer has full attention and no positions."""
    result = list_layer_kinds(recipes.get("k-exaone-236b").model)
    assert [kind.with_experts for kind in result].count(False) == 1 and not result[0].with_experts
    assert [kind.window for kind in result[:8]] == [128, 128, 128, 0] * 2
    assert all((kind.window > 0) == kind.rotates for kind in result)
    second = list_layer_kinds(recipes.get("k-exaone2-750b").model)
    assert [kind.window for kind in second[:6]] == [0, 4096, 128, 128, 128, 0]
    assert [kind.bounded for kind in second].count(True) == 16 and second[-1].bounded


# Micro-batches in flight against a simulated schedule, and their saved bytes against a trained step.

ONE_RANK_CASES = ("dense, recomputed", "experts and a shared one", "windows, NoPE, prediction layer",
         "linear and gated")
PARALLEL_CASES = ("dense, pp 2 with vpp 2", "experts, tp 2 with sp, etp 2")


@pytest.mark.each(("pp", "vpp", "stage", "micro_batches", "counts"), [
    (1, 1, 0, 8, [1]), (4, 1, 0, 8, [4]), (4, 1, 3, 8, [1]), (4, 1, 0, 2, [2]),
    # by hand: the first of 2 stages runs 2 + 2 warm-up passes, and one more before the first backward pass
    (2, 2, 0, 4, [3, 2]), (2, 2, 1, 4, [2, 1]), (2, 2, 0, 2, [2, 2]),
    (4, 3, 0, 16, [7, 4, 4]), (4, 3, 3, 16, [4, 4, 1])])
def test_micro_batches_wait_for_their_backward_pass(pp: int, vpp: int, stage: int, micro_batches: int,
                                                    counts: list[int]) -> None:
    assert count_pending_micro_batches(pp, vpp, stage, micro_batches) == counts


@pytest.mark.each("overlapped", [False, True])
@pytest.mark.each(("pp", "vpp"), [(2, 2), (4, 2), (4, 3), (8, 4)])
def test_micro_batches_in_flight_equal_the_library_schedule(pp: int, vpp: int, *, overlapped: bool) -> None:
    """The order of chunks and the number of warm-up passes, the last of which overlaps no backward pass."""
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

    for stage in range(pp):
        table, group = get_schedule_table(4 * pp, vpp, pp), Mock(size=lambda: pp, rank=lambda s=stage: s)
        _, _, ahead, _ = get_pp_rank_microbatches(
            4 * pp, vpp, pp, overlap_moe_expert_parallel_comm=overlapped, p2p_communicator=Mock(
                pp_group=group, virtual_pipeline_model_parallel_size=vpp))
        first = [chunk for _, chunk in table[:ahead + (not overlapped)]]
        assert count_pending_micro_batches(pp, vpp, stage, 4 * pp) == [
            first.count(chunk) for chunk in range(vpp)]


def measure_on_rank(name: str) -> list[int]:
    """Train a step of the case `name` on this rank; return [pipeline stage, most bytes saved by autograd]."""
    (case,) = (case for case in CASES if case.name == name)
    with tempfile.TemporaryDirectory() as folder:
        return list(measure_saved_bytes(case.config, Path(folder)))


@pytest.mark.deep
@pytest.mark.distributed
def test_a_step_saves_the_predicted_bytes(ranks: Any, job: Any) -> None:
    cases = [case for case in CASES if case.name in (*ONE_RANK_CASES, *PARALLEL_CASES)]
    assert len(cases) == 6
    result = ranks(*(job(__file__, "measure_on_rank", case.nproc, {"name": case.name}) for case in cases))
    for case, of_ranks in zip(cases, result, strict=True):
        for stage, num_bytes in of_ranks:
            predicted = predict_saved_bytes(case.config, stage, case.nproc)
            assert predicted == pytest.approx(num_bytes, rel=0.05), case.name


class SavingKernel(torch.autograd.Function):
    """Double of fla-core 0.6.0's kernel that saves the same tensors (`save_for_backward` in its chunk.py)."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor,
                beta: torch.Tensor) -> torch.Tensor:
        squares = [torch.zeros(*v.shape[:3], 64, dtype=k.dtype) for _ in range(2)]
        ctx.save_for_backward(q, k, v, g.cumsum(1), beta, *squares, g)
        return torch.zeros_like(v)


@pytest.mark.parametrize("sizes", [
    LinearAttentionConfig(4, 4, 32, 32, gate_rank=16), LinearAttentionConfig(2, 2, 64, 32, gate_rank=16)])
def test_linear_attention_kernels_save_the_predicted_bytes(sizes: LinearAttentionConfig,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the bytes of all tensors that autograd saves in a bf16 layer, except inputs and parameters."""
    monkeypatch.setattr(context, "get_cp_size", lambda: 1)
    monkeypatch.setattr(delta_rule, "_load_fla_kernel", lambda: lambda q, k, v, *, g, beta, **_: (
        SavingKernel.apply(q, k, v, g, beta), None))
    config = SimpleNamespace(hidden_size=8, init_method=None, output_layer_init_method=None,
                             params_dtype=torch.bfloat16, layernorm_epsilon=1e-6, sequence_parallel=False,
                             delta_kernels=True)
    alone = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1, rank=lambda: 0))
    layer = LinearAttention(config, 1, (LocalLinear, LocalLinear, LocalLinear), sizes, alone).bfloat16()
    inputs = torch.randn(4096, 1, 8, dtype=torch.bfloat16, requires_grad=True)
    not_counted = {t.untyped_storage().data_ptr() for t in (inputs, *layer.parameters())}
    storages: dict[int, torch.UntypedStorage] = {}

    def record_storage(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_counted:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record_storage, lambda tensor: tensor):
        layer(inputs, packed_seq_params=pack_row([0, 4096]))
    estimate = _estimate_fla_attention(sizes, Tokens(4096, 4096, 4096), 1)
    num_bytes = sum(storage.nbytes() for storage in storages.values())
    assert num_bytes == pytest.approx(sum(estimate.values()), rel=3e-3)


def test_plan_counts_linear_attention_kernels_if_enabled() -> None:
    config = apply_settings(recipes.get("tiny-solar-open2"), ["train.precision=bf16"])
    kind = next(kind for kind in list_layer_kinds(config.model) if kind.is_linear)
    auto, torchs, fla = (estimate_saved(apply_settings(config, [f"gpu.linear_attention={way}"]), 512,
                                        kind).total for way in ("auto", "torch", "fla"))
    assert auto == torchs > fla
