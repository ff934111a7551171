"""Parts of weight maps that most decoder families share: the names inside a layer, under a layer's prefix."""

from __future__ import annotations

from typing import Literal

from megatron_sov.models.weights import QKV, Experts, GateUp, Same, Section, WeightEntry

EMBEDDINGS_AND_HEAD = (
    Section("once", "", "", (
        Same("embedding.word_embeddings.weight", "model.embed_tokens.weight", "V H"),
        Same("decoder.final_layernorm.weight", "model.norm.weight", "H"),
    )),
    Section("untied", "", "", (Same("output_layer.weight", "lm_head.weight", "V H"),)),
)

PROJECTIONS: tuple[WeightEntry, ...] = (
    QKV("self_attention.linear_qkv.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight",
        "self_attn.v_proj.weight"),
    Same("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "H A"),
)
"""Attention without the norm before it."""

ATTENTION: tuple[WeightEntry, ...] = (
    Same("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", "H"), *PROJECTIONS,
)

QKV_BIAS: tuple[WeightEntry, ...] = (
    QKV("self_attention.linear_qkv.bias", "self_attn.q_proj.bias", "self_attn.k_proj.bias",
        "self_attn.v_proj.bias", columns=""),
)

QK_NORM: tuple[WeightEntry, ...] = (
    Same("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "D"),
    Same("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "D"),
)

SWIGLU: tuple[WeightEntry, ...] = (
    GateUp("mlp.linear_fc1.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "F H"),
    Same("mlp.linear_fc2.weight", "mlp.down_proj.weight", "H F"),
)
"""A dense feed-forward network without the norm before it."""

DENSE_FFN: tuple[WeightEntry, ...] = (
    Same("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", "H"), *SWIGLU,
)

ROUTED_EXPERTS: tuple[WeightEntry, ...] = (
    Same("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "H"),
    Same("mlp.router.weight", "mlp.gate.weight", "E H"),
    Experts(GateUp("mlp.experts.experts.linear_fc1.weight",
                   "mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight", "I H")),
    Experts(Same("mlp.experts.experts.linear_fc2.weight", "mlp.experts.{e}.down_proj.weight", "H I")),
)
"""All of a mixture-of-experts block but shared experts and the router's selection bias."""

SHARED_EXPERTS: tuple[WeightEntry, ...] = (
    GateUp("mlp.shared_experts.linear_fc1.weight",
           "mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight", "S H"),
    Same("mlp.shared_experts.linear_fc2.weight", "mlp.shared_experts.down_proj.weight", "H S"),
)


def norms_behind(attention: str, feed_forward: str) -> tuple[WeightEntry, ...]:
    """Return the entries of the norms of both blocks' outputs, by their Hugging Face names."""
    return (Same("self_attn_bda.norm.weight", f"{attention}.weight", "H"),
            Same("mlp_bda.norm.weight", f"{feed_forward}.weight", "H"))


def router_bias(hf_name: str) -> Same:
    """Return the entry of the router's selection bias: float32 always, since its steps of
    1e-4 vanish in less."""
    return Same("mlp.router.expert_bias", hf_name, "E", fp32=True)


DEEPSEEK_EXPERTS = (*ROUTED_EXPERTS, *SHARED_EXPERTS, router_bias("mlp.gate.e_score_correction_bias"))
"""A mixture-of-experts block as DeepSeek-V3 has it."""


def trunk(where: Literal["every layer", "dense layers", "moe layers", "layers with norms behind"],
          *parts: tuple[WeightEntry, ...], when: str = "") -> Section:
    """Return the section of parts that stand in the trunk's layers, under the prefixes that all families
    share; `when` as `Section` has it."""
    return Section(where, "decoder.layers.{l}.", "model.layers.{l}.",
                   tuple(entry for part in parts for entry in part), when)


def prediction_layer(*parts: tuple[WeightEntry, ...]) -> tuple[Section, Section]:
    """Return the sections of a multi-token prediction layer whose transformer layer has these parts, under
    the names of K-EXAONE's (`mtp.*`)."""
    return (
        Section("mtp", "mtp.layers.0.", "mtp.", (
            Same("enorm.weight", "pre_fc_norm_embedding.weight", "H"),
            Same("hnorm.weight", "pre_fc_norm_hidden.weight", "H"),
            Same("eh_proj.weight", "fc.weight", "H 2H"),
            Same("final_layernorm.weight", "norm.weight", "H"),
        )),
        Section("mtp", "mtp.layers.0.transformer_layer.", "mtp.layers.0.",
                tuple(entry for part in parts for entry in part)))


PREDICTION_BEHIND = Section("mtp layer behind", "mtp.layers.0.", "model.layers.{l}.", (
    Same("enorm.weight", "enorm.weight", "H"), Same("hnorm.weight", "hnorm.weight", "H"),
    Same("eh_proj.weight", "eh_proj.weight", "H 2H"),
    Same("final_layernorm.weight", "shared_head.norm.weight", "H"),
))
"""What stands around the transformer layer of a multi-token prediction layer, under the names of
DeepSeek-V3's."""
COPIES_BEHIND = {"model.layers.{l}.embed_tokens.weight": "model.embed_tokens.weight",
                 "model.layers.{l}.shared_head.head.weight": "lm_head.weight"}
"""Tensors that are in such a layer once more -> those that they equal."""


def inside_prediction(*parts: tuple[WeightEntry, ...], when: str = "") -> Section:
    """Return the section of parts that stand in the transformer layer of such a prediction layer; `when` as
    `Section` has it."""
    return Section("mtp layer behind", "mtp.layers.0.transformer_layer.", "model.layers.{l}.",
                   tuple(entry for part in parts for entry in part), when)


PLAIN_DECODER = (
    *EMBEDDINGS_AND_HEAD, trunk("every layer", ATTENTION), trunk("dense layers", DENSE_FFN),
    trunk("moe layers", ROUTED_EXPERTS, SHARED_EXPERTS), *prediction_layer(ATTENTION, DENSE_FFN))
"""A model of no family, as tables of published runs describe them."""
