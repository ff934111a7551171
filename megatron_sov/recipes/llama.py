"""Published models of Llama's shape that training goes on from: their architectures; data, rate and batch
are for fine-tuning, as those of `qwen.py`."""

from __future__ import annotations

from megatron_sov.config import ModelConfig, ParallelConfig, RunConfig
from megatron_sov.config.model import Llama3RopeConfig
from megatron_sov.recipes.qwen import continued, moe_sources
from megatron_sov.recipes.sources import DEFAULT, derive


def llama_3_1_8b() -> RunConfig:
    """Return Llama-3.1-8B: rotations scaled for 128K."""
    return continued("llama-3.1-8b", ModelConfig(
        family="llama", vocab_size=128256, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8,
        head_dim=128, dense_ffn_dim=14336, num_experts=0, rope_theta=5e5, llama3_rope=Llama3RopeConfig(),
        norm_eps=1e-5, max_position_tokens=131072), ParallelConfig())


def mixtral_8x7b() -> RunConfig:
    """Return Mixtral-8x7B: 2 of 8 experts in every layer by a softmax router, 32K."""
    return continued("mixtral-8x7b", ModelConfig(
        family="mixtral", vocab_size=32000, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8,
        head_dim=128, num_experts=8, num_experts_per_token=2, num_shared_experts=0, expert_ffn_dim=14336,
        router_score="softmax", router_bias=False, seq_aux_loss_coeff=2e-2, rope_theta=1e6, norm_eps=1e-5,
        max_position_tokens=32768), ParallelConfig(ep=8))


MIXTRAL_SOURCES = derive(moe_sources("mistralai/Mixtral-8x7B-v0.1"), {"model.dense_ffn_dim": DEFAULT})
