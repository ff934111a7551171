"""Published Gemmas that training goes on from: their architectures; data, rate and batch are for fine-tuning,
as those of `qwen.py`."""

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


def gemma3_27b() -> RunConfig:
    """Return Gemma-3-27B's text model: windows of 1,024 in five layers of six, positions of global layers
    divided by 8, 128K."""
    return continued("gemma3-27b", ModelConfig(
        family="gemma3_text", vocab_size=262208, hidden_size=5376, num_layers=62, num_heads=32,
        num_kv_heads=16, head_dim=128, dense_ffn_dim=21504, num_experts=0, attention_pattern="LLLLLG",
        sliding_window_tokens=1024, rope_theta=1e6, local_rope_theta=1e4, linear_rope_factor=8.0,
        qk_norm=True, zero_centered_norms=True, activation="gelu_tanh", block_norms="both",
        embedding_multiplier=5376 ** 0.5, attention_multiplier=168 ** -0.5, tied_embeddings=True,
        norm_eps=1e-6, max_position_tokens=131072), ParallelConfig(tp=4, sp=True, zero1=True))


def gemma2_9b() -> RunConfig:
    """Return Gemma-2-9B: windows of 4,096 in every other layer, soft caps on attention and logits, 8K."""
    return continued("gemma2-9b", ModelConfig(
        family="gemma2", vocab_size=256000, hidden_size=3584, num_layers=42, num_heads=16, num_kv_heads=8,
        head_dim=256, dense_ffn_dim=14336, num_experts=0, attention_pattern="LG", sliding_window_tokens=4096,
        rope_theta=1e4, zero_centered_norms=True, activation="gelu_tanh", block_norms="both",
        embedding_multiplier=3584 ** 0.5, attention_softcap=50.0, logits_softcap=30.0, tied_embeddings=True,
        norm_eps=1e-6, max_position_tokens=8192), ParallelConfig(tp=2, sp=True, zero1=True))
