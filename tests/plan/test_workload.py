"""Sizes, FLOPs and bytes of a step, against recipes, published tables, torch's counter and hand counts."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from megatron_sov import recipes
from megatron_sov.model.config import apply_settings
from megatron_sov.model.families.count import (
    TABLES, compute_mean_keys, compute_train_flops_per_token, layer_weights)
from megatron_sov.plan.speed import traffic
from megatron_sov.plan.speed.parameters import load_default_parameters
from megatron_sov.plan.speed.workload import Block, ModelShape, Workload, build_shape, build_workload
from megatron_sov.work.clusters.chips import CHIPS, default_links
from tests.plan.published import published_shapes

ONE_OF_EACH = {recipes.get(name).model: name for name in recipes.names() if not name.startswith("tiny-")}
"""Architecture -> a recipe that has it."""


@pytest.mark.each("name", sorted(ONE_OF_EACH.values()))
def test_recipe_flops_match_its_weight_map(name: str) -> None:
    model = recipes.get(name).model
    shape, listed, mapped = build_shape(model), Counter[Any](), Counter[Any]()
    num_mtp_moe = model.num_mtp_moe_layers()
    moe, dense = shape.num_moe_layers + num_mtp_moe, model.num_mtp_layers - num_mtp_moe
    blocks: dict[Block, int] = {
        "attention": shape.num_attention_layers + model.num_mtp_layers, "prediction": model.num_mtp_layers,
        **({"linear": shape.num_linear_layers} if shape.num_linear_layers else {}),
        "dense": shape.num_feed_forward_layers - shape.num_moe_layers + dense, "moe": moe,
        "expert": moe * model.num_experts}
    for block, number in blocks.items():
        for matrix in shape.list_matrices(block):
            listed[matrix.rows, matrix.columns] += number
    for weight in layer_weights(model):
        if len(weight.shape) == 2 and weight.key not in TABLES:
            mapped[weight.shape] += max(1, weight.num_experts) * (
                model.num_mtp_layers if weight.predicts else len(weight.layers))
    assert +listed == mapped
    for seq_len in (128, 4096, 262_144):
        expected = compute_train_flops_per_token(model, seq_len)
        assert shape.count_train_flops(seq_len) == pytest.approx(expected)


@pytest.mark.each(("settings", "kernel", "exchanges"), [
    ([], "newest", False), (["gpu.attention=local"], "portable", False),
    (["train.deterministic=true"], "portable", False), (["parallel.cp=2"], "portable", False),
    (["parallel.cp=2", "gpu.attention=fused"], "newest", True)])
def test_a_workload_has_the_attention_kernel_of_the_run(settings: list[str], kernel: str,
                                                        exchanges: bool) -> None:
    """As chosen by `engine.model.gpu_settings.own_attention_serves` if Transformer Engine is installed."""
    run = apply_settings(recipes.get("solar-open-102b"), settings)
    workload = build_workload(run, run.data.phases[0], 512, CHIPS["b200"], default_links(CHIPS["b200"]))
    assert (workload.attention_kernel, workload.exchanges_heads) == (kernel, exchanges)


def test_exchanged_heads_by_hand() -> None:
    """Each of 4 processes sends three quarters of its tokens' queries and results (2 x 64 heads), keys and
    values (2 x 8 heads), in bf16, once in each pass and in all 48 layers."""
    run = apply_settings(recipes.get("solar-open-102b"), ["parallel.cp=4", "gpu.attention=fused",
                                                          "train.recompute=false"])
    work = build_workload(run, run.data.phases[0], 480, CHIPS["b200"], default_links(CHIPS["b200"]))
    pass_bytes = 3 / 4 * (4096 / 4) * (2 * 64 + 2 * 8) * 128 * 2
    assert traffic.build_context_message(work).num_bytes == 2 * 48 * pass_bytes * work.num_micro_batches
    narrow = replace(work, tp=4)  # 16 query and 2 key heads, which are copied to one per process
    assert traffic.build_context_message(narrow).num_bytes == (
        2 * 48 * 3 / 4 * 1024 * (2 * 16 + 2 * 4) * 128 * 2 * narrow.num_micro_batches)


def test_rows_of_linear_attention_are_exchanged_by_hand() -> None:
    """Each of 64 heads sends 3 x 128 channels, 128 decays, a rate in bf16, and gets 128 float32 results."""
    run = apply_settings(recipes.get("solar-open2-250b"), [
        "parallel.cp=4", "parallel.pp=1", "train.recompute=false"])
    work = build_workload(run, run.data.phases[0], 32, CHIPS["h100"], default_links(CHIPS["h100"]))
    without_linear = replace(work, shape=replace(work.shape, linear=None))
    with_bytes, without_bytes = (traffic.build_context_message(w).num_bytes for w in (work, without_linear))
    tokens = work.seq_len * work.micro_batch_size / 4
    pass_bytes = 3 / 4 * tokens * 64 * ((3 * 128 + 1 + 128) * 2 + 128 * 4)
    assert with_bytes - without_bytes == 2 * 36 * pass_bytes * work.num_micro_batches


@pytest.mark.each(("name", "seq_len", "gflops"), [
    # model TFLOP/s over tokens/s in Megatron-Bridge's tables, which use Megatron-Core's counter
    ("llama3-8b", 8192, 1933e3 / 37556), ("llama3.1-405b", 8192, 2646e3 / 1048),
    ("qwen3-30b-a3b", 4096, 1041e3 / 45275), ("qwen3-235b-a22b", 4096, 1092e3 / 7376),
    ("deepseek-v3", 4096, 1648e3 / 6338), ("kimi-k2", 4096, 1099e3 / 5372),
    ("moonlight-16b", 4096, 386.59e3 / 22528.026), ("nemotron-3-super", 8192, 817e3 / 9652)])
def test_flops_are_those_of_published_tables(name: str, seq_len: int, gflops: float) -> None:
    shape = published_shapes()[name]
    assert shape.count_train_flops(seq_len) / 1e9 == pytest.approx(gflops, rel=0.02)


def test_a_forward_pass_has_the_flops_that_torch_counts() -> None:
    """torch counts matrix products only, and attention in full instead of its causal half."""
    s = ModelShape(num_layers=2, hidden_size=64, num_heads=4, head_dim=32, num_kv_heads=2, vocab_size=96,
                   dense_ffn_dim=80, num_experts=4, num_experts_per_token=2, expert_ffn_dim=48,
                   num_shared_experts=1, num_dense_layers=1)
    tokens = 16
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        x = torch.empty(tokens, s.hidden_size)
        for layer in range(s.num_layers):
            q = functional.linear(x, torch.empty(s.num_heads * s.head_dim, s.hidden_size))
            functional.linear(x, torch.empty(2 * s.num_kv_heads * s.head_dim, s.hidden_size))
            heads = q.view(tokens, s.num_heads, s.head_dim).transpose(0, 1)
            torch.bmm(torch.bmm(heads, heads.transpose(1, 2)), heads)
            functional.linear(q, torch.empty(s.hidden_size, s.num_heads * s.head_dim))
            # a dense layer first, then a router with two chosen experts and a shared one
            width, visits = (s.dense_ffn_dim, 1) if layer == 0 else (s.expert_ffn_dim, 3)
            if layer:
                functional.linear(x, torch.empty(s.num_experts, s.hidden_size))
            for _ in range(visits):
                inner = functional.linear(x, torch.empty(2 * width, s.hidden_size))
                functional.linear(inner[:, :width], torch.empty(s.hidden_size, width))
        functional.linear(x, torch.empty(s.vocab_size, s.hidden_size))
    num_masked_keys = tokens - compute_mean_keys(tokens, 0)
    attention = s.num_layers * 4 * s.num_heads * s.head_dim * num_masked_keys
    assert (s.count_forward_flops(tokens) + attention) * tokens == counter.get_total_flops()


# Bytes of kernels without products, counted by hand.

H100 = CHIPS["h100"]
W = Workload(ModelShape(2, 64, 4, 16, 2, 100, dense_ffn_dim=128, num_experts=8, num_experts_per_token=2,
                        expert_ffn_dim=32, num_shared_experts=1), H100, default_links(H100), 4, seq_len=10)
RESIDUAL = 5 * 10 * 64 * 2


def test_bytes_of_blocks() -> None:
    assert traffic.count_attention_bytes(W) == RESIDUAL + 2 * 10 * (4 + 2) * 16 * 2
    assert traffic.count_dense_bytes(W) == RESIDUAL + 3 * 10 * 128 * 2
    assert traffic.count_activation_bytes(W) == 3 * 20 * 32 * 2
    sort, router, shared = 8 * 20 * 64 * 2, 10 * 8 * 24, 3 * 10 * 32 * 2
    assert traffic.count_moe_bytes(W) == RESIDUAL + sort + router + shared
    assert traffic.count_head_bytes(W) == 10 * 100 * 14


def test_bytes_are_split_over_tensor_parallel_ranks() -> None:
    split = replace(W, tp=2, sp=True)
    for count in (traffic.count_attention_bytes, traffic.count_dense_bytes, traffic.count_moe_bytes,
                  traffic.count_head_bytes):
        assert count(split) == count(W) / 2
    assert traffic.count_dense_bytes(replace(W, tp=2)) > traffic.count_dense_bytes(split)


def test_quantised_operands_and_adapters() -> None:
    products = [traffic.Product(10, 30, 20), traffic.Product(10, 5, 7, quantized=False)]
    assert traffic.count_quantized_bytes(products, frozen=False) == 4 * (10 * 20 + 10 * 30)
    assert traffic.count_quantized_bytes(products, frozen=True) == 3 * (10 * 20 + 10 * 30)
    assert traffic.count_adapter_bytes(products[:1]) == 2 * (10 * 20 + 2 * 10 * 30)


def test_every_chip_has_shares_of_its_generation() -> None:
    p = load_default_parameters()
    tables = (p.product_fraction, p.attention_fraction, p.attention_portable, p.reference_power_w)
    assert all(chip.generation in table for chip in CHIPS.values() for table in tables)
