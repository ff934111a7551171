"""Bytes of keys and values that generating keeps of a sequence."""

from __future__ import annotations

from megatron_sov.plan.held import BF16_BYTES
from megatron_sov.plan.speed.shape import ModelShape


def kv_bytes(shape: ModelShape, tokens: float, item_bytes: float = BF16_BYTES) -> float:
    """Return what a sequence keeps over all layers: global ones every token, sliding ones their window
    (`mcore.model.kv_cache`), latent attention one vector for all heads.

    Args:
        shape: of the model.
        tokens: of the sequence, prompt and response.
        item_bytes: of a number: 2 in bf16, 1 in FP8.
    """
    width = (shape.kv_lora_rank + shape.rope_head_dim if shape.kv_lora_rank
             else 2 * shape.num_kv_heads * shape.head_dim)
    windowed = shape.num_window_layers
    kept = (shape.num_attention_layers - windowed) * tokens + windowed * min(tokens, shape.window or tokens)
    return kept * width * item_bytes


def kv_cuts(shape: ModelShape, tp: int) -> int:
    """Return into how many parts tensor parallelism cuts them: by heads, of which latent attention has one;
    beyond the number of heads each process keeps a whole one."""
    return 1 if shape.kv_lora_rank else min(tp, shape.num_kv_heads)
