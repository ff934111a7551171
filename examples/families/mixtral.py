# What: Mixtral 8x7B and 8x22B: Mistral's decoder with experts in every layer and a softmax router.
# Run:  megatron-sov convert from-hf mixtral-8x7b mixtral-ckpt --plugin examples/families/mixtral.py:MIXTRAL
# See:  a checkpoint for `pretrain examples/families/mixtral.py:mixtral_8x7b --from mixtral-ckpt`.

from mistral import OneWindow

from megatron_sov import Family
from megatron_sov.model.config import ModelConfig, ParallelConfig
from megatron_sov.model.families.family import DECODER_CONFIG, KV_HEADS
from megatron_sov.model.families.hf_config import Fixed, Renamed, Rope, Unused, hidden_over_heads
from megatron_sov.model.families.weights import (
    ATTENTION, EMBEDDINGS_AND_HEAD, Experts, GateUp, Same, trunk_section)
from megatron_sov.model.recipes.open_models import continue_pretraining

# transformers computes the router's logits in the model's dtype, this project in float32: only models in
# float32 give equal logits
EXPERTS = (
    Same("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "H"),
    Same("mlp.router.weight", "block_sparse_moe.gate.weight", "E H"),
    Experts(GateUp("mlp.experts.experts.linear_fc1.weight", "block_sparse_moe.experts.{e}.w1.weight",
                   "block_sparse_moe.experts.{e}.w3.weight", "I H")),
    Experts(Same("mlp.experts.experts.linear_fc2.weight", "block_sparse_moe.experts.{e}.w2.weight", "H I")),
)

MIXTRAL = Family(
    name="mixtral",
    hf_classes=("MixtralForCausalLM",),
    weights=(*EMBEDDINGS_AND_HEAD, trunk_section("every layer", ATTENTION, EXPERTS)),
    config=(
        *DECODER_CONFIG, KV_HEADS, Renamed("intermediate_size", "expert_ffn_dim"),
        Renamed("head_dim", "head_dim", hidden_over_heads),
        Renamed("num_local_experts", "num_experts", 8),
        Renamed("num_experts_per_tok", "num_experts_per_token", 2),
        Renamed("tie_word_embeddings", "tied_embeddings", False), Renamed("rms_norm_eps", "norm_eps", 1e-5),
        Rope(default_theta=1e6), OneWindow(), Fixed("router_jitter_noise", 0.0),
        # used only by transformers' model class; here model.seq_aux_loss_coeff sets the coefficient
        Unused(("router_aux_loss_coef",)),
    ),
    structure={"rope_on_global": True, "num_mtp_layers": 0, "num_dense_layers": 0, "qkv_bias": False,
               "qk_norm": False, "num_shared_experts": 0, "router_score": "softmax", "router_bias": False,
               "norm_topk_prob": True, "routed_scaling_factor": 1.0},
    training={"seq_aux_loss_coeff": 2e-2},
    in_memory=((".block_sparse_moe", ".mlp"),),
)


def mixtral_8x7b():
    """Mixtral-8x7B: 2 of 8 experts in every layer, 32K."""
    return continue_pretraining("mixtral-8x7b", ModelConfig(
        family="mixtral.py:MIXTRAL", vocab_size=32000, hidden_size=4096, num_layers=32, num_heads=32,
        num_kv_heads=8, head_dim=128, num_experts=8, num_experts_per_token=2, num_shared_experts=0,
        expert_ffn_dim=14336, router_score="softmax", router_bias=False, seq_aux_loss_coeff=2e-2,
        rope_theta=1e6, norm_eps=1e-5, max_position_tokens=32768), ParallelConfig(ep=8))
