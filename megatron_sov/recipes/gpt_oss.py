"""gpt-oss 20B and 120B, which training goes on from: their architecture; data, rate and batch are for
fine-tuning, as those of `qwen.py`."""

from __future__ import annotations

from dataclasses import replace

from megatron_sov.config import ModelConfig, ParallelConfig, RunConfig, YarnConfig
from megatron_sov.recipes.qwen import continued, moe_sources
from megatron_sov.recipes.sources import DEFAULT, derive, ours

OTHERS = {"model.dense_ffn_dim": DEFAULT, "model.seq_aux_loss_coeff": ours(
    "what transformers' class assumes for router_aux_loss_coef")}
"""Settings that are not from config.json, whose router_aux_loss_coef is 0.9."""
_SMALL = ModelConfig(
    family="gpt_oss", vocab_size=201088, hidden_size=2880, num_layers=24, num_heads=64, num_kv_heads=8,
    head_dim=64, num_experts=32, num_experts_per_token=4, num_shared_experts=0, expert_ffn_dim=2880,
    router_score="softmax", router_bias=False, seq_aux_loss_coeff=1e-3, attention_pattern="LG",
    sliding_window_tokens=128, rope_theta=150_000.0,
    yarn=YarnConfig(factor=32.0, original_max_position_tokens=4096, truncate=False), qkv_bias=True,
    linear_bias=True, attention_sinks=True, activation="clamped_swiglu", max_position_tokens=131072)
SOURCES_20B = derive(moe_sources("openai/gpt-oss-20b, compared with the copy in EchoCog/gpt-oss-20b"),
                     OTHERS)
SOURCES_120B = derive(moe_sources("openai/gpt-oss-120b, compared with the defaults of transformers' "
                                  "GptOssConfig"), OTHERS)


def gpt_oss_20b() -> RunConfig:
    """Return gpt-oss-20b: 4 of 32 experts, sinks, windows of 128 in every other layer, 128K."""
    return continued("gpt-oss-20b", _SMALL, ParallelConfig(ep=8, zero1=True))


def gpt_oss_120b() -> RunConfig:
    """Return gpt-oss-120b: 4 of 128 experts, sinks, windows of 128 in every other layer, 128K."""
    return continued("gpt-oss-120b", replace(_SMALL, num_layers=36, num_experts=128),
                     ParallelConfig(pp=4, ep=8, zero1=True))
