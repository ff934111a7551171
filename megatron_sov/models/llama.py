"""Llama 2 and 3 (`llama`), and what has its shape: a pre-norm decoder with RoPE in every layer, no biases.

Llama 3.1's scaling of frequencies is `model.llama3_rope`.  A multi-token prediction layer, as HyperCLOVA X 8B
Omni has one, is carried as K-EXAONE's is; transformers drops its tensors on loading.
"""

from __future__ import annotations

from megatron_sov.models.family import DECODER_CONFIG, Family
from megatron_sov.models.hf_config import Fixed, Renamed, Rope, Unused, hidden_over_heads
from megatron_sov.models.hf_layers import PredictionLayer
from megatron_sov.models.weights import ATTENTION, DENSE_FFN, EMBEDDINGS_AND_HEAD, prediction_layer, trunk

FAMILY = Family(
    name="llama",
    hf_classes=("LlamaForCausalLM",),
    weights=(*EMBEDDINGS_AND_HEAD, trunk("every layer", ATTENTION, DENSE_FFN),
             *prediction_layer(ATTENTION, DENSE_FFN)),
    config=(
        *DECODER_CONFIG, Renamed("intermediate_size", "dense_ffn_dim"),
        # transformers' default; Llama 1 came before there were others
        Renamed("num_key_value_heads", "num_kv_heads", lambda config: config["num_attention_heads"]),
        Renamed("head_dim", "head_dim", hidden_over_heads),
        Renamed("tie_word_embeddings", "tied_embeddings", False), Renamed("rms_norm_eps", "norm_eps", 1e-6),
        Rope(default_theta=10_000.0), Fixed("attention_bias", False), Fixed("mlp_bias", False),
        PredictionLayer(said_without=False),
        Unused(("pretraining_tp",)),  # how its authors cut a product in pretraining
    ),
    structure={"rope_on_global": True, "num_experts": 0, "num_dense_layers": 0,
               "qkv_bias": False, "qk_norm": False, "attention_pattern": "G", "sliding_window_tokens": 0},
)
