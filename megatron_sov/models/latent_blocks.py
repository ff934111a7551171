"""Parts of the weight maps of multi-head latent attention (see `blocks.py`).

The norms of both vectors have the names that they have where Transformer Engine computes them with the
projection behind them.
"""

from __future__ import annotations

from megatron_sov.models.weights import Same, WeightEntry

LATENT_ATTENTION: tuple[WeightEntry, ...] = (
    Same("input_layernorm.weight", "input_layernorm.weight", "H"),
    Same("self_attention.linear_kv_down_proj.weight", "self_attn.kv_a_proj_with_mqa.weight", "C H"),
    Same("self_attention.linear_kv_up_proj.layer_norm_weight", "self_attn.kv_a_layernorm.weight", "K"),
    Same("self_attention.linear_kv_up_proj.weight", "self_attn.kv_b_proj.weight", "B K"),
    Same("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "H O"),
)
"""All of it but the queries."""
QUERIES_OF_A_LATENT: tuple[WeightEntry, ...] = (
    Same("self_attention.linear_q_down_proj.weight", "self_attn.q_a_proj.weight", "Q H"),
    Same("self_attention.linear_q_up_proj.layer_norm_weight", "self_attn.q_a_layernorm.weight", "Q"),
    Same("self_attention.linear_q_up_proj.weight", "self_attn.q_b_proj.weight", "A Q"),
)
WHOLE_QUERIES: tuple[WeightEntry, ...] = (
    Same("self_attention.linear_q_proj.weight", "self_attn.q_proj.weight", "A H"),
)
