"""gpt-oss (`gpt_oss`, 20B and 120B): sinks in attention, windows in every other layer, biases everywhere,
experts with a clamped SwiGLU in every layer, chosen by a softmax router with a bias.

Published weights of experts are MXFP4, which is read; bfloat16 is written (`convert/mxfp4.py`).  transformers
takes a softmax over the chosen logits, which is one over all divided by the sum of the chosen; it computes
the router's logits in the model's dtype, we in fp32.
"""

from __future__ import annotations

from megatron_sov.models.family import DECODER_CONFIG, KV_HEADS, Family
from megatron_sov.models.hf_config import AlternatingLayers, Fixed, Quantization, Renamed, SaidRope, Unused
from megatron_sov.models.hf_layers import ExpertStack
from megatron_sov.models.weights import ATTENTION, EMBEDDINGS_AND_HEAD, QKV_BIAS, Same, trunk

_FURTHER = (
    Same("self_attention.linear_proj.bias", "self_attn.o_proj.bias", "H"),
    Same("self_attention.core_attention.softmax_offset", "self_attn.sinks", "N"),
    Same("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "H"),
    Same("mlp.router.weight", "mlp.router.weight", "E H"),
    Same("mlp.router.bias", "mlp.router.bias", "E"),
    ExpertStack("mlp.experts.experts.linear_fc1.weight", "mlp.experts.gate_up_proj", "H I", in_turns=True),
    ExpertStack("mlp.experts.experts.linear_fc1.bias", "mlp.experts.gate_up_proj_bias", "I", in_turns=True),
    ExpertStack("mlp.experts.experts.linear_fc2.weight", "mlp.experts.down_proj", "I H"),
    ExpertStack("mlp.experts.experts.linear_fc2.bias", "mlp.experts.down_proj_bias", "H"),
)

FAMILY = Family(
    name="gpt_oss",
    hf_classes=("GptOssForCausalLM",),
    weights=(*EMBEDDINGS_AND_HEAD, trunk("every layer", ATTENTION, QKV_BIAS, _FURTHER)),
    config=(
        *DECODER_CONFIG, KV_HEADS, Renamed("intermediate_size", "expert_ffn_dim"),
        Renamed("head_dim", "head_dim", 64), Renamed("num_local_experts", "num_experts", 128),
        Renamed("num_experts_per_tok", "num_experts_per_token", 4, aliases=("experts_per_token",)),
        Renamed("tie_word_embeddings", "tied_embeddings", False), Renamed("rms_norm_eps", "norm_eps", 1e-5),
        SaidRope(default_theta=150_000.0), AlternatingLayers(),
        Fixed("attention_bias", True), Fixed("swiglu_alpha", 1.702), Fixed("swiglu_limit", 7.0),
        Quantization("mxfp4"),
        # the first is of its own model class only; ours is chosen by model.seq_aux_loss_coeff
        Unused(("router_aux_loss_coef", "initial_context_length")),
    ),
    structure={"rope_on_global": True, "num_mtp_layers": 0, "num_dense_layers": 0, "qkv_bias": True,
               "qk_norm": False, "num_shared_experts": 0, "router_score": "softmax", "router_bias": False,
               "norm_topk_prob": True, "routed_scaling_factor": 1.0, "linear_bias": True,
               "attention_sinks": True, "activation": "clamped_swiglu"},
    training={"seq_aux_loss_coeff": 1e-3},
)
