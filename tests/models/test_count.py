"""Parameter counts against the published figures and against transformers' own model classes."""

from __future__ import annotations

import pytest

from megatron_sov.models.count import num_params
from megatron_sov.recipes import get


@pytest.mark.parametrize(("recipe", "total_b", "active_b", "mtp_b"), [
    ("solar-open-102b", 102.65, 12.05, 0.0),
    ("k-exaone-236b", 236.57, 23.67, 0.53),
])
def test_published_figures(recipe: str, total_b: float, active_b: float, mtp_b: float) -> None:
    count = num_params(get(recipe).model)
    assert [round(n / 1e9, 2) for n in (count.total, count.active, count.mtp)] == [total_b, active_b, mtp_b]


@pytest.mark.parametrize("recipe", ["solar-open-102b", "k-exaone-236b", "tiny-solar-open", "tiny-k-exaone"])
def test_total_equals_the_model_class_of_transformers(recipe: str) -> None:
    """transformers builds the trunk (it has no multi-token prediction layers) on meta tensors, which take no memory."""
    torch = pytest.importorskip("torch")
    import transformers

    m = get(recipe).model
    shape = {
        "vocab_size": m.vocab_size, "hidden_size": m.hidden_size, "num_hidden_layers": m.num_layers, "head_dim": m.head_dim,
        "num_attention_heads": m.num_heads, "num_key_value_heads": m.num_kv_heads, "moe_intermediate_size": m.expert_ffn_dim,
        "num_experts_per_tok": m.num_experts_per_token, "tie_word_embeddings": False,
    }
    if m.family == "solar_open":
        config = transformers.SolarOpenConfig(n_routed_experts=m.num_experts, n_shared_experts=m.num_shared_experts, **shape)
        build = transformers.SolarOpenForCausalLM
    else:
        config = transformers.ExaoneMoeConfig(
            num_experts=m.num_experts, num_shared_experts=m.num_shared_experts, intermediate_size=m.dense_ffn_dim,
            first_k_dense_replace=m.num_dense_layers, layer_types=m.layer_types(), sliding_window=m.sliding_window_tokens,
            mlp_layer_types=["dense" if i < m.num_dense_layers else "sparse" for i in range(m.num_layers)], **shape)
        build = transformers.ExaoneMoeForCausalLM
    with torch.device("meta"):
        reference = build(config)
    assert num_params(m).total == sum(p.numel() for p in reference.parameters())
