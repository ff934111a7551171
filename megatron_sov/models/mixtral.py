"""Mixtral (`mixtral`): Llama's decoder with experts in every layer, of which a softmax router chooses; the
scores of the chosen ones are divided by their sum.

transformers computes the router's logits in the model's dtype, we in fp32; they are the same for fp32 models.
"""

from __future__ import annotations

from megatron_sov.models.family import DECODER_CONFIG, KV_HEADS, Family
from megatron_sov.models.hf_config import Fixed, Renamed, Rope, Unused, hidden_over_heads
from megatron_sov.models.hf_layers import OneWindow
from megatron_sov.models.weights import ATTENTION, EMBEDDINGS_AND_HEAD, Experts, GateUp, Same, trunk

_EXPERTS = (
    Same("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "H"),
    Same("mlp.router.weight", "block_sparse_moe.gate.weight", "E H"),
    Experts(GateUp("mlp.experts.experts.linear_fc1.weight", "block_sparse_moe.experts.{e}.w1.weight",
                   "block_sparse_moe.experts.{e}.w3.weight", "I H")),
    Experts(Same("mlp.experts.experts.linear_fc2.weight", "block_sparse_moe.experts.{e}.w2.weight", "H I")),
)

FAMILY = Family(
    name="mixtral",
    hf_classes=("MixtralForCausalLM",),
    weights=(*EMBEDDINGS_AND_HEAD, trunk("every layer", ATTENTION, _EXPERTS)),
    config=(
        *DECODER_CONFIG, KV_HEADS, Renamed("intermediate_size", "expert_ffn_dim"),
        Renamed("head_dim", "head_dim", hidden_over_heads),
        Renamed("num_local_experts", "num_experts", 8),
        Renamed("num_experts_per_tok", "num_experts_per_token", 2),
        Renamed("tie_word_embeddings", "tied_embeddings", False), Renamed("rms_norm_eps", "norm_eps", 1e-5),
        Rope(default_theta=1e6), OneWindow(), Fixed("router_jitter_noise", 0.0),
        # of its own model class only; ours is chosen by model.seq_aux_loss_coeff
        Unused(("router_aux_loss_coef",)),
    ),
    structure={"rope_on_global": True, "num_mtp_layers": 0, "num_dense_layers": 0, "qkv_bias": False,
               "qk_norm": False, "num_shared_experts": 0, "router_score": "softmax", "router_bias": False,
               "norm_topk_prob": True, "routed_scaling_factor": 1.0},
    training={"seq_aux_loss_coeff": 2e-2},
)
