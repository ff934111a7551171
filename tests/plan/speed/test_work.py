"""Products of one GPU: those of all GPUs together are the model's, however it is cut."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_sov import recipes
from megatron_sov.clusters.chips import chip, default_links
from megatron_sov.config import PhaseConfig, apply_settings
from megatron_sov.plan.speed import work
from megatron_sov.plan.speed.shape import ModelShape
from megatron_sov.plan.speed.workload import Workload, of_run
from megatron_sov.plan.tables.models import find

H100 = chip("h100")


def workload(name: str, **settings: object) -> Workload:
    """Return a micro-batch of 4,096 tokens of a published model on 16 GPUs."""
    known = find(name)
    assert known is not None
    return replace(Workload(known.shape, H100, default_links(H100), num_gpus=16, seq_len=4096,
                            global_batch_size=16), **settings)  # type: ignore[arg-type]


def flops_of_all_gpus(w: Workload) -> float:
    """Return the FLOPs of a forward pass of all micro-batches that run at once, products and attention."""
    s = w.shape

    def of(products: list[work.Product]) -> float:
        return sum(product.flops for product in products)

    moe = s.num_moe_layers + (s.num_mtp_layers if s.mtp_moe else 0)
    dense = s.num_feed_forward_layers - s.num_moe_layers + (0 if s.mtp_moe else s.num_mtp_layers)
    layers = s.num_attention_layers + s.num_mtp_layers
    windowed = s.num_window_layers
    one = (layers * of(work.attention_products(w)) + s.num_mamba_layers * of(work.mamba_products(w))
           + dense * of(work.dense_products(w))
           + (1 + s.num_mtp_layers) * work.head_product(w).flops
           + s.num_mtp_layers * work.mtp_projection(w).flops
           + (layers - windowed) * work.attention_flops(w, 0) + windowed * work.attention_flops(w, s.window))
    if s.num_experts:
        one += moe * (of(work.beside_experts_products(w)) + of(work.expert_products(w)))
    return one * w.num_gpus


@pytest.mark.parametrize("name", ["llama3-8b", "qwen3-30b-a3b", "deepseek-v3", "k-exaone-236b", "kimi-k2",
                                  "nemotron-3-nano", "nemotron-3-super", "gpt-oss-20b"])
@pytest.mark.parametrize("layout", [{}, {"tp": 2, "sp": True}, {"tp": 2, "sp": True, "cp": 2}, {"ep": 8},
                                    {"tp": 4, "sp": True, "ep": 4, "etp": 2}])
def test_cut_work_is_all_work(name: str, layout: dict[str, int]) -> None:
    w = workload(name, **layout)
    if w.shape.kv_lora_rank and w.tp > 1:
        return  # the projections down to the ranks are whole on each rank; told apart below
    at_once = w.num_gpus // (w.tp * w.cp) * w.seq_len * w.micro_batch_size
    expected = w.shape.forward_flops_per_token(w.seq_len) * at_once
    scan = w.shape.num_mamba_layers * w.shape.mamba_scan_flops() * at_once
    assert flops_of_all_gpus(w) == pytest.approx(expected - scan, rel=1e-9)


def test_latent_projections_are_whole_on_every_rank() -> None:
    one, eight = (work.attention_products(workload("deepseek-v3", tp=tp, sp=tp > 1)) for tp in (1, 8))
    cut = [a.flops / b.flops for a, b in zip(one, eight, strict=True)]
    assert sorted(cut) == [1, 1, 8, 8, 8]


def test_the_fullest_rank_has_more_rows() -> None:
    even, uneven = (work.expert_products(workload("qwen3-30b-a3b", ep=8, imbalance=i)) for i in (1.0, 1.5))
    assert [b.tokens / a.tokens for a, b in zip(even, uneven, strict=True)] == [1.5, 1.5]
    assert even[0].groups == 16 and even[0].tokens == 4096 * 8


# Sizes that follow from a workload's settings, and recipes as workloads.


LINKS = default_links(H100)
W = Workload(ModelShape(2, 64, 4, 16, 2, 100), H100, LINKS, 64, 4096, 2, 128, tp=2, pp=4, cp=2, ep=4)


def test_groups_and_micro_batches() -> None:
    assert (W.dp, W.expert_dp, W.num_micro_batches, W.step_tokens) == (4, 4, 16, 128 * 4096)
    assert replace(W, global_batch_size=1).num_micro_batches == 1


def test_a_run_s_settings_arrive() -> None:
    config = apply_settings(recipes.get("solar-open-102b"), [
        "train.fp8=mxfp8", "train.recompute=selective", 'gpu.recompute_modules=["moe_act"]',
        "parallel.expert_dispatcher=hybridep", "gpu.grad_dtype=bf16", "train.micro_batch_size=2",
        "optim.name=muon", "parallel.overlap_grad_reduce=false", "parallel.overlap_param_gather=false"])
    w = of_run(config, PhaseConfig("one", seq_len=8192), 480, H100, LINKS, imbalance=1.3)
    assert (w.precision, w.recompute, w.recompute_modules) == ("mxfp8", "selective", ("moe_act",))
    assert (w.dispatcher, w.grad_bytes, w.micro_batch_size, w.optimizer) == ("hybridep", 2, 2, "muon")
    assert (w.seq_len, w.global_batch_size, w.imbalance) == (8192, config.train.global_batch_size, 1.3)
    assert not w.overlap_grad_reduce and w.objective == "train"
    pipeline = apply_settings(config, ["parallel.pp=2", "parallel.vpp=2",
                                       "parallel.pipeline_layout=[13, 12, 12, 11]"])
    assert w.stage_layers == (48,)
    assert of_run(pipeline, PhaseConfig("one"), 480, H100, LINKS).stage_layers == (25, 23)
    adapters = apply_settings(recipes.get("typhoon-s-8b"), ["lora.rank=8"])
    assert of_run(adapters, PhaseConfig("one"), 8, H100, LINKS).objective == "lora"
