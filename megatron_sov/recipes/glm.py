"""GLM-4.5-Air, which training goes on from: its architecture; data, rate and batch are for fine-tuning, as
those of `qwen.py`."""

from __future__ import annotations

from megatron_sov.config import ModelConfig, ParallelConfig, RunConfig
from megatron_sov.recipes.qwen import continued, moe_sources
from megatron_sov.recipes.sources import config_json, derive, ours

RELEASED = "zai-org/GLM-4.5-Air, compared with Megatron-Bridge's glm_45v_provider.py"
SOURCES = derive(moe_sources(RELEASED), {
    "model.mtp_experts": config_json(RELEASED),
    "model.mtp_loss_coeff": ours("what the second half of its pre-training is remembered to have had"),
})


def glm_4_5_air() -> RunConfig:
    """Return GLM-4.5-Air: 8 of 128 experts by a sigmoid router, one shared, half of each head rotates, one
    MTP layer with experts, 128K."""
    return continued("glm-4.5-air", ModelConfig(
        family="glm4_moe", vocab_size=151552, hidden_size=4096, num_layers=46, num_heads=96, num_kv_heads=8,
        head_dim=128, num_dense_layers=1, dense_ffn_dim=10944, num_experts=128, num_experts_per_token=8,
        num_shared_experts=1, expert_ffn_dim=1408, routed_scaling_factor=1.0, rope_theta=1e6, rope_share=0.5,
        qkv_bias=True, norm_eps=1e-5, num_mtp_layers=1, mtp_experts=True, mtp_loss_coeff=0.1,
        max_position_tokens=131072), ParallelConfig(tp=2, sp=True, ep=8))
