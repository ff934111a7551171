"""Gemma-3-1B, which training goes on from: its architecture; data, rate and batch are for fine-tuning, as
those of `qwen.py`."""

from __future__ import annotations

from megatron_sov.config import ModelConfig, ParallelConfig, RunConfig
from megatron_sov.recipes.qwen import continued


def gemma_3_1b() -> RunConfig:
    """Return Gemma-3-1B: windows of 512 in five layers of six, norms before and behind blocks, 32K."""
    return continued("gemma-3-1b", ModelConfig(
        family="gemma3_text", vocab_size=262144, hidden_size=1152, num_layers=26, num_heads=4, num_kv_heads=1,
        head_dim=256, dense_ffn_dim=6912, num_experts=0, attention_pattern="LLLLLG",
        sliding_window_tokens=512, rope_theta=1e6, local_rope_theta=1e4, qk_norm=True,
        zero_centered_norms=True, activation="gelu_tanh", block_norms="both",
        embedding_multiplier=1152 ** 0.5, tied_embeddings=True, norm_eps=1e-6, max_position_tokens=32768),
        ParallelConfig())
