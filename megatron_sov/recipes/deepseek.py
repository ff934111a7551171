"""DeepSeek-V3 and Kimi K2, which training goes on from: their architecture; data, rate and batch are for
fine-tuning, as those of `qwen.py`."""

from __future__ import annotations

from megatron_sov.config import LatentAttentionConfig, ModelConfig, ParallelConfig, RunConfig, YarnConfig
from megatron_sov.recipes.qwen import continued, moe_sources
from megatron_sov.recipes.sources import config_json, derive, ours, published

LATENT = LatentAttentionConfig(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
                               q_lora_rank=1536)
"""Of both models."""
RELEASED = "deepseek-ai/DeepSeek-V3, compared with Megatron-Bridge's test_deepseek_bridges.py"
REPORT = "arXiv 2412.19437, section 4.2"
SOURCES = derive(moe_sources(RELEASED), {
    "model.mtp_experts": config_json(RELEASED),
    "model.mtp_loss_coeff": published(f"{REPORT}: 0.3 for the first 10 T tokens, then 0.1"),
})
KIMI_SOURCES = derive(
    moe_sources("moonshotai/Kimi-K2-Instruct, compared with MindSpeed-LLM's script of it"),
    {"model.mtp_loss_coeff": ours("DeepSeek-V3's; it has no prediction layer")})


def deepseek_v3() -> RunConfig:
    """Return DeepSeek-V3: 8 of 256 experts, from 4 of 8 groups, by a sigmoid router, one shared, latent
    attention, one MTP layer with experts, 160K by YaRN."""
    return continued("deepseek-v3", ModelConfig(
        family="deepseek_v3", vocab_size=129280, hidden_size=7168, num_layers=61, num_heads=128,
        num_kv_heads=128, head_dim=192, latent_attention=LATENT, num_dense_layers=3, dense_ffn_dim=18432,
        num_experts=256, num_experts_per_token=8, num_expert_groups=8, num_groups_per_token=4,
        num_shared_experts=1, expert_ffn_dim=2048, num_mtp_layers=1, mtp_experts=True, mtp_loss_coeff=0.1,
        routed_scaling_factor=2.5, rope_theta=10_000.0, yarn=YarnConfig(40.0, 4096), norm_eps=1e-6,
        max_position_tokens=163840), ParallelConfig(tp=4, sp=True, pp=8, ep=32, pipeline_layout=(
            7, 8, 8, 8, 8, 8, 8, 6)))


def kimi_k2() -> RunConfig:
    """Return Kimi K2: DeepSeek-V3 with half the heads, 8 of 384 experts, one dense layer; 128K by YaRN."""
    return continued("kimi-k2", ModelConfig(
        family="deepseek_v3", vocab_size=163840, hidden_size=7168, num_layers=61, num_heads=64,
        num_kv_heads=64, head_dim=192, latent_attention=LATENT, num_dense_layers=1, dense_ffn_dim=18432,
        num_experts=384, num_experts_per_token=8, num_shared_experts=1, expert_ffn_dim=2048,
        mtp_loss_coeff=0.1, routed_scaling_factor=2.827, rope_theta=50_000.0,
        yarn=YarnConfig(32.0, 4096, 1.0, 1.0), norm_eps=1e-6, max_position_tokens=131072),
        ParallelConfig(tp=4, sp=True, pp=8, ep=32, pipeline_layout=(7, 8, 8, 8, 8, 8, 8, 6)))
