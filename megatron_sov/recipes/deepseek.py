"""DeepSeek-V3 and Kimi K2, which training goes on from: their architecture; data, rate and batch are for
fine-tuning, as those of `qwen.py`."""

from __future__ import annotations

from megatron_sov.config import LatentAttentionConfig, ModelConfig, ParallelConfig, RunConfig, YarnConfig
from megatron_sov.recipes.qwen import continued

LATENT = LatentAttentionConfig(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
                               q_lora_rank=1536)
"""Of both models."""


def deepseek_v3() -> RunConfig:
    """Return DeepSeek-V3 without its prediction layer: 8 of 256 experts by a sigmoid router, one shared,
    latent attention, 160K by YaRN."""
    return continued("deepseek-v3", ModelConfig(
        family="deepseek_v3", vocab_size=129280, hidden_size=7168, num_layers=61, num_heads=128,
        num_kv_heads=128, head_dim=192, latent_attention=LATENT, num_dense_layers=3, dense_ffn_dim=18432,
        num_experts=256, num_experts_per_token=8, num_shared_experts=1, expert_ffn_dim=2048,
        routed_scaling_factor=2.5, rope_theta=10_000.0, yarn=YarnConfig(40.0, 4096), norm_eps=1e-6,
        max_position_tokens=163840), ParallelConfig(tp=4, sp=True, pp=8, ep=32, pipeline_layout=(
            7, 8, 8, 8, 8, 8, 8, 6)))


def kimi_k2() -> RunConfig:
    """Return Kimi K2: DeepSeek-V3 with half the heads, 8 of 384 experts, one dense layer; 128K by YaRN."""
    return continued("kimi-k2", ModelConfig(
        family="deepseek_v3", vocab_size=163840, hidden_size=7168, num_layers=61, num_heads=64,
        num_kv_heads=64, head_dim=192, latent_attention=LATENT, num_dense_layers=1, dense_ffn_dim=18432,
        num_experts=384, num_experts_per_token=8, num_shared_experts=1, expert_ffn_dim=2048,
        routed_scaling_factor=2.827, rope_theta=50_000.0, yarn=YarnConfig(32.0, 4096, 1.0, 1.0),
        norm_eps=1e-6, max_position_tokens=131072), ParallelConfig(tp=4, sp=True, pp=8, ep=32,
                                                                   pipeline_layout=(7, 8, 8, 8, 8, 8, 8, 6)))
