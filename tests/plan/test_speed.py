"""Estimated step times and messages, against calculations by hand, papers' formulas and other settings."""

from dataclasses import replace

import pytest

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import PhaseConfig, apply_settings
from megatron_sov.plan.speed import traffic
from megatron_sov.plan.speed.parameters import load_default_parameters
from megatron_sov.plan.speed.step import (
    estimate_extra_layers, estimate_router_s, estimate_step, load_slow_host)
from megatron_sov.plan.speed.traffic import count_local_params, list_messages
from megatron_sov.plan.speed.workload import Block, ModelShape, Workload, build_workload
from megatron_sov.work.clusters.chips import CHIPS, default_links
from tests.plan.published import published_shapes

LLAMA = published_shapes()["llama3-8b"]
QWEN = published_shapes()["qwen3-30b-a3b"]
H100 = CHIPS["h100"]


def build_dense(**settings: object) -> Workload:
    """Return the workload of Llama 3 8B on 64 H100."""
    return replace(Workload(LLAMA, H100, default_links(H100), num_gpus=64, seq_len=8192, micro_batch_size=1,
                            global_batch_size=512, sharding="zero1"), **settings)  # type: ignore[arg-type]


def build_moe(**settings: object) -> Workload:
    """Return the workload of Qwen3 30B-A3B on 64 H100."""
    return replace(build_dense(shape=QWEN, ep=8, seq_len=4096), **settings)  # type: ignore[arg-type]


def estimate_seconds(w: Workload) -> float:
    """Return the estimated seconds of a step."""
    return estimate_step(w).total_s


def test_the_output_head_is_never_recomputed() -> None:
    plain = estimate_step(build_dense(recompute="none"))
    full = estimate_step(build_dense(recompute="full"))
    half = estimate_step(build_dense(recompute="selective", recompute_modules=("layer",)))
    assert plain.head_s == full.head_s == half.head_s > 0
    assert plain.dense_s < half.dense_s < full.dense_s == pytest.approx(plain.dense_s * 4 / 3)


def test_components_add_up() -> None:
    for w in (build_dense(), build_dense(pp=4, tp=2, sp=True), build_moe(), build_moe(recompute="full")):
        time = estimate_step(w)
        assert sum(time.components.values()) == pytest.approx(time.total_s)
        assert min(time.components.values()) >= 0
        assert time.tokens_per_s_per_gpu == pytest.approx(512 * w.seq_len / 64 / time.total_s)
        assert time.mfu == pytest.approx(
            time.tokens_per_s_per_gpu * w.shape.count_train_flops(w.seq_len) / H100.bf16_flops_per_s)


def test_matmul_time_is_flops_over_achieved_speed() -> None:
    time, p = estimate_step(build_dense()), load_default_parameters()
    flops = 6 * (LLAMA.count_params() - 2 * LLAMA.vocab_size * LLAMA.hidden_size) * 8 * 8192
    peak = H100.bf16_flops_per_s * p.product_fraction["hopper"]["bf16"]
    # partly filled tiles and a short inner dimension cost a few percent
    assert 1 < time.dense_s / (flops / peak) < 1.12


def test_router_time_is_the_difference_to_a_step_without_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    work = build_moe(pp=1)
    complete, router_s = estimate_step(work), estimate_router_s(work)
    products = traffic.list_products
    monkeypatch.setattr(traffic, "SCORE_BYTES", 0)
    # the first product of an MoE block is the router's
    monkeypatch.setattr(traffic, "list_products",
                        lambda w, block: products(w, block)[1 if block == "moe" else 0:])
    without = estimate_step(work)
    saved_s = complete.dense_s + complete.memory_s - without.dense_s - without.memory_s
    assert 0 < router_s == pytest.approx(saved_s)


def test_no_run_is_faster_than_its_peak() -> None:
    for key, chip in CHIPS.items():
        for precision in ("bf16", "fp8", "mxfp8"):
            if precision != "bf16" and not chip.fp8_flops_per_s:
                continue
            time = estimate_step(build_dense(chip=chip, links=default_links(chip), precision=precision))
            assert time.mfu < (1 if precision == "bf16" else 2), key


@pytest.mark.each(("slower", "faster"), [
    (build_dense(recompute="full"), build_dense(recompute="selective", recompute_modules=("core_attn",))),
    (build_dense(recompute="selective", recompute_modules=("core_attn",)), build_dense()),
    (build_dense(fused_kernels=False), build_dense()),
    (build_dense(attention_kernel="portable"), build_dense()),
    (build_dense(software_age_years=2), build_dense()),
    (build_dense(tuned=False), build_dense()),
    (build_dense(overlap_grad_reduce=False), build_dense()),
    (build_dense(), build_dense(precision="fp8")),
    (build_dense(), build_dense(chip=CHIPS["b200"])),
    (build_dense(), build_dense(document_tokens=512)),
    (build_dense(), build_dense(objective="lora")),
    (build_dense(tp=16, sp=True), build_dense(tp=8, sp=True)),
    (build_dense(pp=8), build_dense(pp=8, vpp=4)),
    (build_dense(optimizer="muon"), build_dense()),
    (build_dense(offload=1.0), build_dense()),
    (build_moe(imbalance=2.0), build_moe()),
    (build_moe(cuda_graphs="full"), build_moe(cuda_graphs="full", overlap_ep=True)),
    (build_moe(), build_moe(cuda_graphs="routers")),
    (build_moe(cuda_graphs="routers"), build_moe(cuda_graphs="partial")),
    (build_moe(cuda_graphs="partial"), build_moe(cuda_graphs="full")),
    (build_moe(ep=64), build_moe(ep=8)),
    (build_moe(ep=64), build_moe(ep=64, dispatcher="deepep")),
])
def test_slower_workloads_take_longer(slower: Workload, faster: Workload) -> None:
    assert estimate_seconds(slower) > estimate_seconds(faster) * 1.0001


def test_graphs_of_routers_help_most_with_a_slow_host() -> None:
    """Attention and experts are launched one by one in both cases."""
    eager, graphed = (build_moe(seq_len=512, global_batch_size=4096, cuda_graphs=graphs)
                      for graphs in ("none", "routers"))
    assert estimate_step(eager, load_slow_host()).launch_s > 2 * estimate_step(eager).launch_s
    saved = 1 - (estimate_step(graphed, load_slow_host()).total_s
                 / estimate_step(eager, load_slow_host()).total_s)
    assert 0.25 < saved < 0.4


def test_recomputed_experts_are_launched_again() -> None:
    """As many launches as for a whole recomputed layer, less its attention's."""
    stored, experts, layers = (
        estimate_step(build_moe(seq_len=512, global_batch_size=4096, recompute=recompute,
                                recompute_modules=modules), load_slow_host()).launch_s
        for recompute, modules in (("none", ()), ("selective", ("moe",)), ("full", ())))
    assert 1.3 * stored < experts < layers


def test_overlapped_messages_are_not_slower() -> None:
    sequential, overlapped = build_dense(tp=8, sp=True), build_dense(tp=8, sp=True, overlap_tp=True)
    assert estimate_seconds(sequential) >= estimate_seconds(overlapped)
    hidden = replace(load_default_parameters(), tp_exposed_overlapped=0.1)
    assert estimate_step(overlapped, hidden).total_s < estimate_step(sequential, hidden).total_s


def test_expert_messages_overlap_at_most_the_computation() -> None:
    within_node, between_nodes = ((estimate_step(build_moe(ep=ep)),
                                   estimate_step(build_moe(ep=ep, overlap_ep=True)))
                                  for ep in (8, 64))
    exposed = load_default_parameters().ep_exposed_overlapped
    assert within_node[1].ep_s == pytest.approx(exposed * within_node[0].ep_s)
    plain, overlapped = between_nodes
    computed_s = plain.dense_s + plain.experts_s + plain.attention_s + plain.head_s + plain.memory_s
    assert plain.ep_s > 1.5 * computed_s
    assert overlapped.ep_s == pytest.approx(plain.ep_s - computed_s)
    config = apply_settings(recipes.get("solar-open-102b"), ["parallel.expert_overlap=micro_batches"])
    assert build_workload(config, PhaseConfig("one"), 480, H100, default_links(H100)).overlap_ep


def test_pipeline_bubble_equals_the_formula() -> None:
    """The bubble is (pp - 1) / (micro-batches x vpp) of the other time (arXiv 2104.04473, section 2.2)."""
    time = estimate_step(build_dense(pp=4, vpp=2, global_batch_size=64))
    w = build_dense(pp=4, vpp=2, global_batch_size=64)
    parts = time.components
    without = sum(parts[name] for name in ("dense", "attention", "memory", "launch", "pp"))
    assert time.bubble_s / (without + parts["head"] / 4) == pytest.approx(3 / (w.num_micro_batches * 2))


def test_slowest_stage_includes_head_and_prediction_layers() -> None:
    """Head and prediction layers are on the last stage; an uneven pipeline gives it fewer layers."""
    shape = replace(LLAMA, num_mtp_layers=1)
    even, uneven = (estimate_step(build_dense(shape=shape, pp=2, stage_layers=layers))
                    for layers in ((16, 16), (20, 12)))
    without_prediction = estimate_step(build_dense(shape=replace(shape, num_mtp_layers=0), pp=2,
                                                   stage_layers=(16, 16)))
    assert even.attention_s == pytest.approx(without_prediction.attention_s * 17 / 16)
    assert even.head_s == pytest.approx(2 * without_prediction.head_s)
    assert even.dense_s > without_prediction.dense_s * 17 / 16
    assert uneven.head_s == 0
    assert uneven.attention_s == pytest.approx(without_prediction.attention_s * 20 / 16)
    assert uneven.total_s < even.total_s
    # explicit equal stages equal the default, without prediction layers
    assert estimate_step(build_dense(pp=2)) == estimate_step(build_dense(pp=2, stage_layers=(16, 16)))


def test_a_chip_without_the_precision_is_refused() -> None:
    with pytest.raises(UserError, match="fp8 on A100-80GB: is not supported by its tensor cores"):
        estimate_step(build_dense(chip=CHIPS["a100"], precision="fp8"))


def test_uneven_stages_compensate_for_head_and_embedding() -> None:
    """The best last stage has `extra_layers` / 2 fewer layers than an equal split."""
    shape = replace(LLAMA, num_mtp_layers=1)
    base = build_dense(shape=shape, pp=2, vpp=1)
    extra_layers = estimate_extra_layers(base)
    assert extra_layers > estimate_extra_layers(replace(base, shape=LLAMA)) > 0
    fewer = round(extra_layers / 2)
    times = {last: estimate_step(replace(base, stage_layers=(32 - last, last))).total_s
             for last in (16 - fewer - 3, 16 - fewer, 16 - fewer + 3, 16)}
    assert min(times, key=lambda last: times[last]) == 16 - fewer


def test_a_stage_with_more_layers_sends_more() -> None:
    base = build_dense(pp=2, vpp=1, tp=8, sp=True)
    even, uneven = (estimate_step(replace(base, stage_layers=layers)) for layers in ((16, 16), (24, 8)))
    assert uneven.tp_s == pytest.approx(even.tp_s * 24 / 16)


# Matrix products per GPU: summed over GPUs they equal the model's, at any layout.

def build_published(name: str, **settings: object) -> Workload:
    """Return a micro-batch of 4,096 tokens of a published model on 16 GPUs."""
    return replace(Workload(published_shapes()[name], H100, default_links(H100), num_gpus=16, seq_len=4096,
                            global_batch_size=16), **settings)  # type: ignore[arg-type]


def count_flops(w: Workload) -> float:
    """Return the FLOPs of a forward pass over all concurrent micro-batches: matrix products and attention."""
    s = w.shape

    def count_block(block: Block) -> float:
        return sum(product.flops for product in traffic.list_products(w, block))

    moe = s.num_moe_layers + (s.num_mtp_layers if s.mtp_moe else 0)
    dense = s.num_feed_forward_layers - s.num_moe_layers + (0 if s.mtp_moe else s.num_mtp_layers)
    layers = s.num_attention_layers + s.num_mtp_layers
    windowed = s.num_window_layers
    per_gpu = (layers * count_block("attention") + s.num_mamba_layers * count_block("mamba")
               + dense * count_block("dense") + (1 + s.num_mtp_layers) * count_block("head")
               + s.num_mtp_layers * count_block("prediction")
               + (layers - windowed) * traffic.count_attention_flops(w, 0)
               + windowed * traffic.count_attention_flops(w, s.window))
    if s.num_experts:
        per_gpu += moe * (count_block("moe") + count_block("expert"))
    return per_gpu * w.num_gpus


@pytest.mark.each("name", ["llama3-8b", "qwen3-30b-a3b", "deepseek-v3", "k-exaone-236b", "kimi-k2",
                           "nemotron-3-nano", "nemotron-3-super", "gpt-oss-20b"])
@pytest.mark.each("layout", [{}, {"tp": 2, "sp": True}, {"tp": 2, "sp": True, "cp": 2}, {"ep": 8},
                             {"tp": 4, "sp": True, "ep": 4, "etp": 2}])
def test_flops_summed_over_gpus_equal_the_models(name: str, layout: dict[str, int]) -> None:
    w = build_published(name, **layout)
    if w.shape.kv_lora_rank and w.tp > 1:
        return  # the low-rank projections are replicated on each rank; tested below
    num_tokens = w.num_gpus // (w.tp * w.cp) * w.seq_len * w.micro_batch_size  # of concurrent micro-batches
    expected = w.shape.count_forward_flops(w.seq_len) * num_tokens
    scan = w.shape.num_mamba_layers * w.shape.count_mamba_scan_flops() * num_tokens
    assert count_flops(w) == pytest.approx(expected - scan, rel=1e-9)


def test_latent_projections_are_replicated_on_every_rank() -> None:
    one, eight = (traffic.list_products(build_published("deepseek-v3", tp=tp, sp=tp > 1), "attention")
                  for tp in (1, 8))
    ratios = [a.flops / b.flops for a, b in zip(one, eight, strict=True)]
    assert sorted(ratios) == [1, 1, 8, 8, 8]


def test_the_fullest_rank_has_more_rows() -> None:
    even, uneven = (traffic.list_products(build_published("qwen3-30b-a3b", ep=8, imbalance=i), "expert")
                    for i in (1.0, 1.5))
    assert [b.tokens / a.tokens for a, b in zip(even, uneven, strict=True)] == [1.5, 1.5]
    assert even[0].groups == 16 and even[0].tokens == 4096 * 8


# Sizes derived from a workload's settings, and workloads of recipes.

LINKS = default_links(H100)
W = Workload(ModelShape(2, 64, 4, 16, 2, 100), H100, LINKS, 64, 4096, 2, 128, tp=2, pp=4, cp=2, ep=4)


def test_groups_and_micro_batches() -> None:
    assert (W.dp, W.expert_dp, W.num_micro_batches, W.step_tokens) == (4, 4, 16, 128 * 4096)
    assert replace(W, global_batch_size=1).num_micro_batches == 1


def test_workload_takes_settings_of_the_run() -> None:
    config = apply_settings(recipes.get("solar-open-102b"), [
        "train.fp8=mxfp8", "train.recompute=selective", 'gpu.recompute_modules=["moe_act"]',
        "parallel.expert_dispatcher=hybridep", "gpu.grad_dtype=bf16", "train.micro_batch_size=2",
        "optim.name=muon", "parallel.overlap_grad_reduce=false", "parallel.overlap_param_gather=false"])
    w = build_workload(config, PhaseConfig("one", seq_len=8192), 480, H100, LINKS, imbalance=1.3)
    assert (w.precision, w.recompute, w.recompute_modules) == ("mxfp8", "selective", ("moe_act",))
    assert (w.dispatcher, w.grad_bytes, w.micro_batch_size, w.optimizer) == ("hybridep", 2, 2, "muon")
    assert (w.seq_len, w.global_batch_size, w.imbalance) == (8192, config.train.global_batch_size, 1.3)
    assert not w.overlap_grad_reduce and w.objective == "train"
    pipeline = apply_settings(config, ["parallel.pp=2", "parallel.vpp=2",
                                       "parallel.pipeline_layout=[13, 12, 12, 11]"])
    assert w.stage_layers == (48,)
    assert build_workload(pipeline, PhaseConfig("one"), 480, H100, LINKS).stage_layers == (25, 23)
    adapters = apply_settings(recipes.get("typhoon-s-8b"), ["lora.rank=8"])
    assert build_workload(adapters, PhaseConfig("one"), 8, H100, LINKS).objective == "lora"


# Communication volumes against the papers' formulas.

DENSE = ModelShape(num_layers=4, hidden_size=1024, num_heads=8, head_dim=128, num_kv_heads=8,
                   vocab_size=1000, dense_ffn_dim=4096)
MOE = replace(DENSE, num_experts=64, num_experts_per_token=4, expert_ffn_dim=512)


def build_step(shape: ModelShape = DENSE, **settings: object) -> Workload:
    """Return the workload of 8 GPUs with one row of 2,048 tokens each."""
    return replace(Workload(shape, H100, default_links(H100), num_gpus=8, seq_len=2048, global_batch_size=8),
                   **settings)  # type: ignore[arg-type]


def count_sent_bytes(w: Workload) -> dict[str, float]:
    """Return parallel group -> bytes that a GPU sends in a step."""
    return {message.group: message.num_bytes for message in list_messages(w)}


def test_one_gpu_sends_nothing() -> None:
    assert not list_messages(build_step(num_gpus=1, global_batch_size=1))


HIDDEN = 2048 * 1024 * 2
"""Bytes of a row's hidden states."""
BOTH_PASSES = 4 * 2 * 2 * HIDDEN
"""Bytes that four layers dispatch and combine, forward and backward, with one copy of each token."""
WINDOWED = replace(DENSE, window=128, global_every=4)


@pytest.mark.each(("group", "shape", "settings", "num_bytes"), [
    # arXiv 2205.05198, section 4.2.2: four all-gathers and four reduce-scatters of s b h a layer, in both
    # passes, one of each backward gathered again for the weights' gradients
    ("tp", DENSE, {"tp": 8, "sp": False, "global_batch_size": 1}, 4 * 2 * 2 * 2 * 7 / 8 * HIDDEN),
    ("tp", DENSE, {"tp": 8, "sp": True, "global_batch_size": 1}, 4 * 2 * 5 * 7 / 8 * HIDDEN),
    # all-to-all sends a copy per chosen expert; DeepEP one per rank: 8 (1 - (7/8)^4) of 8 ranks
    ("ep", MOE, {"ep": 8}, BOTH_PASSES * 4 * 7 / 8),
    ("ep", MOE, {"ep": 8, "dispatcher": "deepep"}, BOTH_PASSES * 8 * (1 - (7 / 8) ** 4) * 7 / 8),
    # the 2 processes of an expert gather all received tokens, 4 rows per token
    ("ep", MOE, {"ep": 4, "etp": 2}, BOTH_PASSES * (4 * 3 / 4 + 4)),
    ("ep", MOE, {"ep": 1, "etp": 2}, BOTH_PASSES * 4),
    # other dispatchers: each visited expert rank is two processes, without the token's own
    ("ep", MOE, {"ep": 4, "etp": 2, "dispatcher": "deepep"},
     BOTH_PASSES * 4 * (1 - (3 / 4) ** 4) * 2 * 7 / 8),
    ("ep", MOE, {"ep": 4, "etp": 2, "dispatcher": "allgather"}, BOTH_PASSES * 7),
    # keys and values go around a ring: one round forward, two backward
    ("cp", DENSE, {"cp": 8, "global_batch_size": 1}, 4 * 7 * 3 * 2 * HIDDEN / 8),
    # in layers with windows each of 4 processes has two chunks of 256 tokens and sends the last 127 of each;
    # three of four layers have windows
    ("cp", WINDOWED, {"cp": 4, "global_batch_size": 2}, 3 * 3 * (1 * 512 + 3 * 2 * 127) * 2 * 1024 * 2),
    ("cp", replace(WINDOWED, window=2048), {"cp": 4, "global_batch_size": 2}, 3 * 3 * 4 * 512 * 2 * 1024 * 2),
    # hidden states of 8 micro-batches go both ways
    ("pp", DENSE, {"pp": 4, "vpp": 1, "global_batch_size": 16}, 2 * 8 * HIDDEN)])
def test_sent_bytes_equal_the_formulas(group: str, shape: ModelShape, settings: dict[str, object],
                                       num_bytes: float) -> None:
    assert count_sent_bytes(build_step(shape, **settings))[group] == pytest.approx(num_bytes)


def test_recomputing_everything_sends_a_forward_pass_more() -> None:
    once, twice = (count_sent_bytes(build_step(tp=8, recompute=how, global_batch_size=1))["tp"]
                   for how in ("none", "full"))
    assert twice == pytest.approx(once * 3 / 2)


@pytest.mark.each(("sharding", "bytes_per_weight"), [("none", 2 * 4), ("zero1", 4 + 2), ("fsdp", 4 + 2 * 2)])
def test_data_parallel_bytes_equal_the_zero_paper(sharding: str, bytes_per_weight: int) -> None:
    """arXiv 1910.02054, section 7: an all-reduce is two ring halves; stage 1 replaces one of them by
    gathering weights, stage 3 gathers them in both passes."""
    w = build_step(sharding=sharding)
    params = count_local_params(w)[0]
    assert count_sent_bytes(w)["dp"] == pytest.approx(7 / 8 * params * bytes_per_weight)


def test_sharded_weights_are_gathered_for_each_micro_batch() -> None:
    one, four = (count_sent_bytes(build_step(sharding="fsdp", global_batch_size=batch))["dp"]
                 for batch in (8, 32))
    assert four == pytest.approx(4 * one)
    # recomputation uses the weights that are gathered for the backward pass
    assert count_sent_bytes(build_step(sharding="fsdp", global_batch_size=8, recompute="full"))["dp"] == one


def test_weights_are_sharded_over_their_groups() -> None:
    whole, experts = count_local_params(build_step(MOE))
    cut, cut_experts = count_local_params(build_step(MOE, tp=2, sp=True, ep=4))
    assert cut == pytest.approx(whole / 2) and cut_experts == pytest.approx(experts / 4)
    assert whole + experts == pytest.approx(MOE.count_params())


def test_copies_of_sharded_weights_are_fewer_of_experts() -> None:
    """HSDP over 4 of 8 processes: with ep 2 each expert is on 4 processes, sharded over 2 of them."""
    w = build_step(MOE, sharding="fsdp", sharding_group=4, ep=2)
    dense, experts = count_local_params(w)
    assert count_sent_bytes(w)["dp"] == pytest.approx(dense * ((4 + 2 * 2) * 3 / 4 + 4 / 4 * 2 * 1 / 2))
    assert count_sent_bytes(w)["edp"] == pytest.approx(experts * ((4 + 2 * 2) * 1 / 2 + 4 / 2 * 2 * 1 / 2))


def test_inter_node_rings_use_all_network_adapters() -> None:
    one_node = build_step(sharding="zero1")
    two_nodes = build_step(sharding="zero1", num_gpus=16, global_batch_size=16)
    inside, spread, strided = (
        next(message for message in list_messages(w) if message.group == "dp")
        for w in (one_node, two_nodes, replace(two_nodes, tp=8)))
    assert (inside.link, spread.link) == ("inside", "between")
    # a ring through all GPUs of a node uses eight network adapters, a ring through one GPU of each node one
    assert spread.bytes_per_s == 8 * 50e9 and strided.bytes_per_s == 50e9
