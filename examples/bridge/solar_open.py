# What: Solar Open for Megatron-Bridge 0.6: settings and weight names between transformers and Megatron-Core.
# Run:  python -c "import solar_open; solar_open.AutoBridge.import_ckpt('upstage/Solar-Open-100B', 'checkpoint')"
# See:  a checkpoint that Megatron-Bridge trains; export_ckpt writes a Hugging Face folder again.

from functools import partial

from megatron.bridge import AutoBridge as AutoBridge
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping, QKVMapping
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

RENAMED = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
    "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight": "model.layers.*.input_layernorm.weight",
    "decoder.layers.*.self_attention.linear_proj.weight": "model.layers.*.self_attn.o_proj.weight",
    "decoder.layers.*.pre_mlp_layernorm.weight": "model.layers.*.post_attention_layernorm.weight",
    "decoder.layers.*.mlp.router.weight": "model.layers.*.mlp.gate.weight",
    "decoder.layers.*.mlp.router.expert_bias": "model.layers.*.mlp.gate.e_score_correction_bias",
    "decoder.layers.*.mlp.shared_experts.linear_fc2.weight":
        "model.layers.*.mlp.shared_experts.down_proj.weight",
    "decoder.layers.*.mlp.experts.linear_fc2.weight*": "model.layers.*.mlp.experts.*.down_proj.weight",
}
"""Megatron-Core's name -> name in the published safetensors files."""
GATED = {
    "decoder.layers.*.mlp.shared_experts.linear_fc1.weight": "model.layers.*.mlp.shared_experts",
    "decoder.layers.*.mlp.experts.linear_fc1.weight*": "model.layers.*.mlp.experts.*",
}
"""Megatron-Core's name of a matrix with the rows of gate and up -> module in the published files."""


@MegatronModelBridge.register_bridge(source="SolarOpenForCausalLM", target=GPTModel, model_type="solar_open")
class SolarOpenBridge(MegatronModelBridge):
    """Convert between `SolarOpenForCausalLM` of transformers and Megatron-Core's `GPTModel`."""

    def provider_bridge(self, hf_pretrained):
        provider = super().provider_bridge(hf_pretrained)
        provider.transformer_layer_spec = partial(get_gpt_decoder_block_spec, use_transformer_engine=True)
        provider.normalization = "RMSNorm"
        provider.gated_linear_unit = True
        provider.add_bias_linear = False
        provider.hidden_dropout = 0.0
        provider.ffn_hidden_size = provider.moe_ffn_hidden_size
        provider.moe_shared_expert_intermediate_size = (
            hf_pretrained.config.n_shared_experts * provider.moe_ffn_hidden_size)
        provider.moe_router_score_function = "sigmoid"
        provider.moe_router_enable_expert_bias = True
        provider.moe_router_dtype = "fp32"
        provider.moe_router_load_balancing_type = "seq_aux_loss"
        provider.moe_aux_loss_coeff = 1e-4
        provider.moe_token_dispatcher_type = "alltoall"
        provider.moe_grouped_gemm = True
        if provider.position_embedding_type == "yarn":  # defaults of transformers, which config.json may omit
            rope = hf_pretrained.config.rope_parameters
            provider.yarn_beta_fast = rope.get("beta_fast") or 32.0
            provider.yarn_beta_slow = rope.get("beta_slow") or 1.0
            provider.yarn_correction_range_round_to_int = rope.get("truncate", True)
        return provider

    @classmethod
    def megatron_to_hf_config(cls, provider):
        config = super().megatron_to_hf_config(provider)
        config["n_shared_experts"] = (
            provider.moe_shared_expert_intermediate_size // provider.moe_ffn_hidden_size)
        return config

    def mapping_registry(self):
        attention = "model.layers.*.self_attn"
        return MegatronMappingRegistry(
            *(AutoMapping(megatron_param=name, hf_param=hf_name) for name, hf_name in RENAMED.items()),
            QKVMapping(megatron_param="decoder.layers.*.self_attention.linear_qkv.weight",
                       q=f"{attention}.q_proj.weight", k=f"{attention}.k_proj.weight",
                       v=f"{attention}.v_proj.weight"),
            *(GatedMLPMapping(megatron_param=name, gate=f"{module}.gate_proj.weight",
                              up=f"{module}.up_proj.weight") for name, module in GATED.items()))
