"""K-EXAONE (`exaone_moe`): sliding layers with RoPE, global layers without (NoPE), QK-norm, leading dense layers, one MTP layer.

transformers' attention rotates only layers of type sliding_attention; there is no config field for it.  Its model drops the
`mtp.*` tensors on loading; inference engines read them for self-speculative decoding.
"""

from __future__ import annotations

from typing import Any

from megatron_sov.models.blocks import ATTENTION, DENSE_FFN, EMBEDDINGS_AND_HEAD, MOE_FFN, QK_NORM, router_bias
from megatron_sov.models.family import COMMON_CONFIG, Family
from megatron_sov.models.hf_config import LeadingDenseLayers, Renamed, Rope, SlidingLayers
from megatron_sov.models.weights import Same, Section


def _default_head_dim(config: dict[str, Any]) -> int:
    return int(config["hidden_size"] // config["num_attention_heads"])


FAMILY = Family(
    name="exaone_moe",
    hf_classes=("ExaoneMoeForCausalLM", "ExaoneMoEForCausalLM"),  # the second: configs made before transformers had it
    weights=(
        EMBEDDINGS_AND_HEAD,
        Section("every layer", "decoder.layers.{l}.", "model.layers.{l}.", (*ATTENTION, *QK_NORM)),
        Section("dense layers", "decoder.layers.{l}.", "model.layers.{l}.", DENSE_FFN),
        Section("moe layers", "decoder.layers.{l}.", "model.layers.{l}.", (*MOE_FFN, router_bias("mlp.e_score_correction_bias"))),
        Section("mtp", "mtp.layers.0.", "mtp.", (
            Same("enorm.weight", "pre_fc_norm_embedding.weight", "H"),
            Same("hnorm.weight", "pre_fc_norm_hidden.weight", "H"),
            Same("eh_proj.weight", "fc.weight", "H 2H"),
            Same("final_layernorm.weight", "norm.weight", "H"),
        )),
        Section("mtp", "mtp.layers.0.transformer_layer.", "mtp.layers.0.", (*ATTENTION, *QK_NORM, *DENSE_FFN)),
    ),
    config=(
        *COMMON_CONFIG,
        Renamed("head_dim", "head_dim", _default_head_dim), Renamed("intermediate_size", "dense_ffn_dim"),
        Renamed("num_experts", "num_experts", 64), Renamed("num_shared_experts", "num_shared_experts", 1),
        Renamed("routed_scaling_factor", "routed_scaling_factor", 2.5), Renamed("num_nextn_predict_layers", "num_mtp_layers", 0),
        Rope(default_theta=10_000.0), SlidingLayers(default_window=4096), LeadingDenseLayers(default=1),
    ),
    structure={"rope_on_global": False, "qk_norm": True},
    training={"router_bias_update_rate": 1e-4, "mtp_loss_coeff": 0.05},
)
