"""Solar Open (`solar_open`): mixture of experts in every layer, global attention with RoPE, no QK-norm."""

from __future__ import annotations

from megatron_sov.models.blocks import ATTENTION, EMBEDDINGS_AND_HEAD, MOE_FFN, router_bias
from megatron_sov.models.family import COMMON_CONFIG, Family
from megatron_sov.models.hf_config import Fixed, Renamed, Rope, Unused
from megatron_sov.models.weights import Section

FAMILY = Family(
    name="solar_open",
    hf_classes=("SolarOpenForCausalLM",),
    weights=(
        EMBEDDINGS_AND_HEAD,
        Section("every layer", "decoder.layers.{l}.", "model.layers.{l}.", ATTENTION),
        Section("moe layers", "decoder.layers.{l}.", "model.layers.{l}.",
                (*MOE_FFN, router_bias("mlp.gate.e_score_correction_bias"))),
    ),
    config=(
        *COMMON_CONFIG,
        Renamed("head_dim", "head_dim", 128), Renamed("n_routed_experts", "num_experts", 128),
        Renamed("n_shared_experts", "num_shared_experts", 1), Renamed("routed_scaling_factor", "routed_scaling_factor", 1.0),
        Rope(default_theta=1e6),
        # transformers stores these and ignores them, so any other value would silently be another model
        Fixed("first_k_dense_replace", 0, written=False), Fixed("use_qk_norm", False, written=False),
        Fixed("partial_rotary_factor", 1.0, written=False), Fixed("num_nextn_predict_layers", 0, written=False),
        Unused(("intermediate_size",)),  # the published config has it; no layer is dense
    ),
    structure={"num_dense_layers": 0, "dense_ffn_dim": 0, "attention_pattern": "G", "sliding_window_tokens": 0,
               "rope_on_global": True, "qk_norm": False, "num_mtp_layers": 0},
)
