"""HyperCLOVA X (`hyperclovax`): Llama's decoder with the factors of maximal update parametrisation
(arXiv 2203.03466) and, where `use_post_norm` says so, a norm behind each block as well as before it
(Peri-LN, arXiv 2502.02732).

`use_post_norm` must be said: transformers assumes true where it is absent, the authors' own class and vLLM's
false.
"""

from __future__ import annotations

from megatron_sov.models.family import DECODER_CONFIG, KV_HEADS, Family
from megatron_sov.models.hf_config import AttentionScale, Fixed, Renamed, Rope, Unused, hidden_over_heads
from megatron_sov.models.hf_layers import NormsBehind
from megatron_sov.models.weights import ATTENTION, DENSE_FFN, EMBEDDINGS_AND_HEAD, norms_behind, trunk

FAMILY = Family(
    name="hyperclovax",
    hf_classes=("HyperCLOVAXForCausalLM",),
    weights=(*EMBEDDINGS_AND_HEAD, trunk("every layer", ATTENTION, DENSE_FFN),
             trunk("layers with norms behind", norms_behind("post_norm1", "post_norm2"))),
    config=(
        *DECODER_CONFIG, KV_HEADS, Renamed("intermediate_size", "dense_ffn_dim"),
        Renamed("head_dim", "head_dim", hidden_over_heads),
        Renamed("tie_word_embeddings", "tied_embeddings", False), Renamed("rms_norm_eps", "norm_eps", 1e-6),
        Rope(default_theta=10_000.0), Fixed("attention_bias", False), Fixed("mlp_bias", False),
        NormsBehind("use_post_norm"), AttentionScale("attention_multiplier"),
        Renamed("embedding_multiplier", "embedding_multiplier", 1.0),
        Renamed("residual_multiplier", "residual_multiplier", 1.0),
        Renamed("logits_scaling", "logits_multiplier", 1.0),
        *(Fixed(name, 0.0, written=False) for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop")),
        Fixed("logit_scale", 1.0, written=False),  # vLLM multiplies by it, transformers does not
        Unused(("pretraining_tp", "end_token_id", "summary_first_dropout")),
    ),
    structure={"rope_on_global": True, "num_mtp_layers": 0, "num_experts": 0, "num_dense_layers": 0,
               "qkv_bias": False, "qk_norm": False, "attention_pattern": "G", "sliding_window_tokens": 0},
    varies=("block_norms", "embedding_multiplier", "attention_multiplier", "residual_multiplier",
            "logits_multiplier"),
)
