"""Published Korean models that training goes on from: their architectures; data, rate and batch are for
fine-tuning, as those of `qwen.py`."""

from __future__ import annotations

from megatron_sov.config import ModelConfig, ParallelConfig, RunConfig
from megatron_sov.config.model import Llama3RopeConfig
from megatron_sov.recipes.qwen import continued


def exaone_4_32b() -> RunConfig:
    """Return EXAONE-4.0-32B: three sliding layers of four, global ones without positions, 128K."""
    return continued("exaone-4.0-32b", ModelConfig(
        family="exaone4", vocab_size=102400, hidden_size=5120, num_layers=64, num_heads=40, num_kv_heads=8,
        head_dim=128, dense_ffn_dim=27392, num_experts=0, attention_pattern="LLLG",
        sliding_window_tokens=4096, rope_on_global=False, rope_theta=1e6,
        llama3_rope=Llama3RopeConfig(factor=16.0), qk_norm=True, block_norms="post", norm_eps=1e-5,
        max_position_tokens=131072), ParallelConfig(tp=4, sp=True))


def exaone_4_1_2b() -> RunConfig:
    """Return EXAONE-4.0-1.2B: global attention with rotations, tied embeddings, 64K."""
    return continued("exaone-4.0-1.2b", ModelConfig(
        family="exaone4", vocab_size=102400, hidden_size=2048, num_layers=30, num_heads=32, num_kv_heads=8,
        head_dim=64, dense_ffn_dim=4096, num_experts=0, rope_theta=1e6,
        llama3_rope=Llama3RopeConfig(factor=16.0), qk_norm=True, block_norms="post", norm_eps=1e-5,
        tied_embeddings=True, max_position_tokens=65536), ParallelConfig())


def hyperclovax_14b() -> RunConfig:
    """Return HyperCLOVAX-SEED-Think-14B: norms before and behind blocks, multiplied embeddings, attention and
    logits."""
    return continued("hyperclovax-14b", ModelConfig(
        family="hyperclovax", vocab_size=110592, hidden_size=6144, num_layers=38, num_heads=48,
        num_kv_heads=8, head_dim=128, dense_ffn_dim=14336, num_experts=0, rope_theta=1e8, block_norms="both",
        embedding_multiplier=10.0, attention_multiplier=0.0078125, logits_multiplier=0.125, norm_eps=1e-5,
        init_std=0.012727922061357855, max_position_tokens=131072), ParallelConfig(tp=4, sp=True))
