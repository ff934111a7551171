"""Builders of seven stock Megatron-Core models at their published sizes, for `layout-proof FILE.py:NAME`."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec, get_gpt_layer_with_transformer_engine_spec, get_gpt_mtp_block_spec)
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

GATED: dict[str, Any] = {
    "normalization": "RMSNorm", "gated_linear_unit": True, "activation_func": torch.nn.functional.silu,
    "add_bias_linear": False, "bf16": True, "params_dtype": torch.bfloat16, "calculate_per_token_loss": True,
    "overlap_p2p_comm": True, "batch_p2p_comm": False}
EXPERTS: dict[str, Any] = {
    "moe_token_dispatcher_type": "alltoall", "moe_grouped_gemm": True,
    "moe_router_load_balancing_type": "none"}


def build_gpt2(config: Any = None, **stage: Any) -> GPTModel:
    """GPT-2 large: biases, LayerNorm, learned positions, tied embeddings."""
    config = config or TransformerConfig(num_layers=36, hidden_size=1280, num_attention_heads=20,
                                         calculate_per_token_loss=True, overlap_p2p_comm=True,
                                         batch_p2p_comm=False)
    return GPTModel(config, get_gpt_layer_with_transformer_engine_spec(), vocab_size=50304,
                    max_sequence_length=1024, share_embeddings_and_output_weights=True, **stage)


def build_llama(config: Any = None, **stage: Any) -> GPTModel:
    """Llama 3 8B: grouped queries, RMSNorm, SwiGLU."""
    config = config or TransformerConfig(
        num_layers=32, hidden_size=4096, num_attention_heads=32, ffn_hidden_size=14336,
        **{"num_query_groups": 8} | GATED)
    spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    return GPTModel(config, spec, vocab_size=128256, max_sequence_length=8192,
                    position_embedding_type="rope", **stage)


def build_frozen_llama(config: Any = None, **stage: Any) -> GPTModel:
    """Llama 3 8B with frozen weights of feed-forward layers."""
    model = build_llama(config, **stage)
    for layer in model.decoder.layers:
        layer.mlp.linear_fc1.weight.requires_grad_(False)
    return model


def build_minicpm(config: Any = None, **stage: Any) -> GPTModel:
    """MiniCPM3 4B: latent attention without experts."""
    config = config or MLATransformerConfig(
        num_layers=62, hidden_size=2560, num_attention_heads=40, ffn_hidden_size=6400, q_lora_rank=768,
        kv_lora_rank=256, qk_head_dim=64, qk_pos_emb_head_dim=32, v_head_dim=64, rope_type="rope", **GATED)
    spec = get_gpt_layer_with_transformer_engine_spec(
        multi_latent_attention=True, mla_down_proj_fusion=config.mla_down_proj_fusion)
    return GPTModel(config, spec, vocab_size=73448, max_sequence_length=4096,
                    position_embedding_type="rope", **stage)


def build_qwen3(config: Any = None, **stage: Any) -> GPTModel:
    """Qwen3 30B-A3B: 128 experts, query and key norms."""
    config = config or TransformerConfig(
        num_layers=48, hidden_size=2048, num_attention_heads=32, num_query_groups=4, kv_channels=128,
        ffn_hidden_size=6144, num_moe_experts=128, moe_router_topk=8, moe_ffn_hidden_size=768,
        qk_layernorm=True, **EXPERTS | GATED)
    spec = get_gpt_layer_with_transformer_engine_spec(config.num_moe_experts, True, qk_layernorm=True)
    return GPTModel(config, spec, vocab_size=151936, max_sequence_length=4096,
                    position_embedding_type="rope", **stage)


def build_deepseek(config: Any = None, **stage: Any) -> GPTModel:
    """DeepSeek-V3: latent attention, shared and grouped experts, dense first layers, prediction layer."""
    config = config or MLATransformerConfig(
        num_layers=61, hidden_size=7168, num_attention_heads=128, ffn_hidden_size=18432, q_lora_rank=1536,
        kv_lora_rank=512, qk_head_dim=128, qk_pos_emb_head_dim=64, v_head_dim=128, num_moe_experts=256,
        moe_router_topk=8, moe_router_num_groups=8, moe_router_group_topk=4, moe_ffn_hidden_size=2048,
        moe_shared_expert_intermediate_size=2048, moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True, moe_layer_freq=[0] * 3 + [1] * 58, qk_layernorm=True,
        mtp_num_layers=1, rope_type="rope", **EXPERTS | GATED)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=stage.get("vp_stage"))
    prediction = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=True,
                                        vp_stage=stage.get("vp_stage"))
    return GPTModel(config, spec, vocab_size=129280, max_sequence_length=4096, mtp_block_spec=prediction,
                    position_embedding_type="rope", **stage)


def build_gpt_oss(config: Any = None, **stage: Any) -> GPTModel:
    """gpt-oss 20B: alternating windows, experts with biases."""
    config = config or TransformerConfig(
        num_layers=24, hidden_size=2880, num_attention_heads=64, num_query_groups=8, kv_channels=64,
        ffn_hidden_size=2880, num_moe_experts=32, moe_router_topk=4, moe_ffn_hidden_size=2880,
        window_size=(127, 0), window_attn_skip_freq=2, **EXPERTS | GATED)
    spec = get_gpt_layer_with_transformer_engine_spec(config.num_moe_experts, True)
    return GPTModel(config, spec, vocab_size=201088, max_sequence_length=4096,
                    position_embedding_type="rope", **stage)


def build_hybrid(config: Any = None, **stage: Any) -> HybridModel:
    """Layers of attention (*), dense (-) and expert (E) blocks of Megatron-Core's HybridModel."""
    config = config or TransformerConfig(
        num_layers=52, hidden_size=4096, num_attention_heads=32, num_query_groups=8, ffn_hidden_size=14336,
        num_moe_experts=64, moe_router_topk=6, moe_ffn_hidden_size=1856, **EXPERTS | GATED)
    return HybridModel(config, hybrid_stack_spec, vocab_size=131072, max_sequence_length=8192,
                       hybrid_layer_pattern="*-*E" * 13, position_embedding_type="rope", **stage)
