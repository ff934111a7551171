"""EXAONE 4.0 (`exaone4`): blocks are normalised behind, not before; QK-norm.

The 32B slides with RoPE in three layers of four and attends globally without positions in the fourth; the
1.2B is global with RoPE throughout.
"""

from __future__ import annotations

from megatron_sov.models.family import DECODER_CONFIG, KV_HEADS, Family
from megatron_sov.models.hf_config import Fixed, Renamed, Rope, Unused, hidden_over_heads
from megatron_sov.models.hf_layers import RotatingWindows
from megatron_sov.models.weights import (
    EMBEDDINGS_AND_HEAD,
    PROJECTIONS,
    QK_NORM,
    SWIGLU,
    norms_behind,
    trunk,
)

FAMILY = Family(
    name="exaone4",
    hf_classes=("Exaone4ForCausalLM",),
    weights=(*EMBEDDINGS_AND_HEAD, trunk(
        "every layer", PROJECTIONS, QK_NORM, SWIGLU,
        norms_behind("post_attention_layernorm", "post_feedforward_layernorm"))),
    config=(
        *DECODER_CONFIG, KV_HEADS, Renamed("intermediate_size", "dense_ffn_dim"),
        Renamed("head_dim", "head_dim", hidden_over_heads),
        Renamed("tie_word_embeddings", "tied_embeddings", False), Renamed("rms_norm_eps", "norm_eps", 1e-5),
        Rope(default_theta=10_000.0), RotatingWindows(),
        Fixed("reorder_qk_norm", True, written=False),  # what released configs call norms behind
        Unused(("max_window_layers",)),
    ),
    structure={"block_norms": "post", "qk_norm": True, "qkv_bias": False, "num_experts": 0,
               "num_dense_layers": 0, "num_mtp_layers": 0},
)
