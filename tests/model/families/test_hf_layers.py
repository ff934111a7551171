"""Sliding and dense layers of a config.json, as transformers reads them; unsupported structures are
refused."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, strategies as st

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import ModelConfig, YarnConfig
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.family import TokenIds


def build_config(recipe: str, **fields: Any) -> dict[str, Any]:
    """Return a tiny recipe's config.json with other fields; None removes a field."""
    model = recipes.get(recipe).model
    changed = models.get_family(model.family).to_hf_config(model, "bfloat16", TokenIds()) | fields
    return {name: value for name, value in changed.items() if value is not None}


def read(config: dict[str, Any]) -> ModelConfig:
    """Read the content of a config.json as its family does."""
    return models.get_family(config["model_type"]).from_hf_config(config)


@given(st.sampled_from(["tiny-qwen2", "tiny-qwen3"]), st.booleans(), st.integers(1, 99), st.integers(0, 8),
       st.integers(1, 8))
def test_qwens_windows_are_those_of_transformers(recipe: str, switch: bool, window: int, first: int,
                                                 layers: int) -> None:
    from transformers import AutoConfig

    config = build_config(recipe, use_sliding_window=switch, sliding_window=window, max_window_layers=first,
                          num_hidden_layers=layers, layer_types=None)
    theirs, ours = AutoConfig.for_model(**config), read(config)
    assert ours.layer_types() == theirs.layer_types
    has_windows = "sliding_attention" in theirs.layer_types
    assert ours.sliding_window_tokens == (theirs.sliding_window if has_windows else 0)
    assert read(models.get_family(ours.family).to_hf_config(ours, "float32", TokenIds())) == ours


def test_qwen3_moe_slides_in_all_layers_or_none() -> None:
    sliding = read(build_config("tiny-qwen3-moe", use_sliding_window=True, sliding_window=9,
                                max_window_layers=2))
    assert (set(sliding.layer_types()), sliding.sliding_window_tokens) == ({"sliding_attention"}, 9)
    assert read(build_config("tiny-qwen3-moe", sliding_window=9)).attention_pattern == "G"


@pytest.mark.each(("fields", "dense"), [
    ({}, 0), ({"mlp_only_layers": [0, 1]}, 2), ({"mlp_only_layers": None, "decoder_sparse_step": None}, 0),
    ({"decoder_sparse_step": 4}, 3),
])
def test_dense_layers_of_qwen3_moe_are_those_of_transformers(fields: dict[str, Any], dense: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = build_config("tiny-qwen3-moe", **fields)
    assert read(config).num_dense_layers == dense
    with torch.device("meta"):
        layers = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).model.layers
    assert [hasattr(layer.mlp, "experts") for layer in layers] == [i >= dense for i in range(4)]


def test_prediction_layer_of_k_exaone_is_global_by_default() -> None:
    without_mtp_fields = build_config("tiny-k-exaone", mtp_layer_types=None, mtp_sliding_windows=None,
                          mtp_loss_scaling_factor=None)
    model = read(without_mtp_fields)
    assert (model.num_mtp_layers, model.mtp_layer_type(), model.mtp_loss_coeff) == (1, "full_attention", 0.05)
    sliding = read(without_mtp_fields | {"mtp_layer_types": ["sliding_attention"],
                             "mtp_sliding_windows": [model.sliding_window_tokens],
                             "mtp_loss_scaling_factor": 0.1})
    assert (sliding.mtp_layer_type(), sliding.mtp_loss_coeff) == ("sliding_attention", 0.1)
    assert read(models.get_family("exaone_moe").to_hf_config(sliding, "float32", TokenIds())) == sliding


def test_windows_and_limits_of_k_exaone_2_follow_its_lists() -> None:
    config = build_config("tiny-k-exaone2")
    model = read(config)
    assert "sliding_window" not in config  # a single number cannot express these windows
    assert (model.windows(), model.mtp_window()) == ([0, 64, 32, 32, 32, 0], 32)
    assert (model.limits(), model.mtp_depths, model.num_predictions) == ([0, 0, 0, 0, 7.0, 7.0], 4, 4)
    # also written by model classes that know only one window and a number of dense layers: the lists win
    assert read(config | {"sliding_window": 4096, "first_k_dense_replace": 1}) == model
    odd = read(config | {"sliding_windows": [0, 9, 3, 5, 7, 0], "mtp_sliding_windows": [11],
                         "swiglu_limits": [0.5, 0, 3, 0, 0, 2], "mtp_num_speculative_steps": 2})
    assert (odd.windows(), odd.mtp_window(), odd.mtp_depths) == ([0, 9, 3, 5, 7, 0], 11, 2)
    assert read(models.get_family("exaone_moe").to_hf_config(odd, "float32", TokenIds())) == odd
    equal = read(config | {"sliding_windows": [0, 8, 8, 8, 8, 0], "mtp_sliding_windows": [8]})
    assert (equal.sliding_window_tokens, equal.layer_windows) == (8, ())


@pytest.mark.each(("recipe", "fields", "message"), [
    ("tiny-qwen2", {"use_sliding_window": True, "sliding_window": None},
     "use_sliding_window = True needs sliding_window"),
    ("tiny-qwen3", {"layer_types": ["sliding_attention"] * 4}, "layer_types = .* names sliding layers, but"),
    ("tiny-qwen3", {"attention_bias": True}, "attention_bias = True, but only False"),
    ("tiny-qwen3-moe", {"decoder_sparse_step": 2},
     "mlp_only_layers and decoder_sparse_step must name dense layers first"),
    ("tiny-qwen3-moe", {"mlp_only_layers": [2]}, "a dense layer after a layer with experts is not"),
    ("tiny-qwen3-moe", {"num_local_experts": 4}, "num_experts = 8 and num_local_experts = 4 disagree"),
    ("tiny-k-exaone", {"sliding_windows": [16, 16, 16, 0]},
     "sliding_windows = .* disagree with layer_types or with sliding_window = 32"),
    ("tiny-k-exaone2", {"swiglu_limits": [7.0]}, "swiglu_limits = .* must have an entry of 0 or more for"),
    ("tiny-k-exaone", {"mtp_sliding_windows": [32]},
     r"mtp_sliding_windows = \[32\], but only 0 is supported"),
    ("tiny-k-exaone", {"mtp_num_speculative_steps": 0},
     "mtp_num_speculative_steps = 0 with num_nextn_predict_layers = 1"),
])
def test_unsupported_structures_are_refused(recipe: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(build_config(recipe, **fields))


def test_a_pattern_that_qwen3_moe_cannot_express_is_a_problem_before_training() -> None:
    model = read(build_config("tiny-qwen3-moe"))
    problems = models.get_family("qwen3_moe").problems(replace(model, attention_pattern="LG",
                                                               sliding_window_tokens=8, router_bias=True))
    assert len(problems) == 2 and any("either every layer slides or none does" in p.rule for p in problems)


# Latent attention in config.json: as written by transformers, as released, and refusals.


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 4096,
        "mscale": 0.7, "mscale_all_dim": 0.7}


def build_latent_config(**fields: Any) -> dict[str, Any]:
    """Return the tiny DeepSeek's config.json with other fields."""
    model = recipes.get("tiny-deepseek-v3").model
    return models.get_family("deepseek_v3").to_hf_config(model, "bfloat16", TokenIds()) | fields


def test_widths_that_transformers_writes_are_those_that_follow() -> None:
    """transformers also writes widths that follow from other fields; they change nothing."""
    from transformers import AutoConfig

    hf_config = json.loads(AutoConfig.for_model(**build_latent_config()).to_json_string())
    assert (hf_config["head_dim"], hf_config["qk_head_dim"]) == (16, 32)
    assert read(hf_config) == read(build_latent_config())


def test_yarns_factor_is_in_the_scale_of_the_softmax_as_in_transformers() -> None:
    from transformers import AutoConfig
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        DeepseekV3Attention, DeepseekV3RotaryEmbedding)

    from megatron_sov.engine.model.rotary import compute_frequencies, compute_softmax_scale

    config = build_latent_config(rope_parameters=YARN)
    model, hf_config = read(config), AutoConfig.for_model(**config)
    assert model.yarn == YarnConfig(40.0, 4096, mscale=0.7)
    assert compute_softmax_scale(model, "full_attention") == pytest.approx(
        DeepseekV3Attention(hf_config, 0).scaling)
    rotary = DeepseekV3RotaryEmbedding(hf_config)
    assert rotary.attention_scaling == 1.0, "cosine and sine have no factor"
    assert rotary.inv_freq.tolist() == pytest.approx(compute_frequencies(model).tolist(), rel=1e-6)
    assert read(models.get_family("deepseek_v3").to_hf_config(model, "float32", TokenIds())) == model


@pytest.mark.each(("fields", "message"), [
    ({"kv_lora_rank": None}, "lacks kv_lora_rank; add them"),
    ({"num_key_value_heads": 2}, "num_key_value_heads = 2, but only 4 is supported"),
    ({"head_dim": 32}, "head_dim = 32, but only 16 is supported"),
    ({"topk_method": "greedy"}, "topk_method = 'greedy', but only 'noaux_tc'"),
    ({"rope_parameters": YARN | {"mscale_all_dim": 1.0}}, "equal mscale and mscale_all_dim"),
    ({"rope_parameters": {**YARN, "mscale": None, "mscale_all_dim": 1.0}}, "mscale_all_dim = 1.0 without ms"),
    ({"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.0, "attention_factor": 1.0}},
     r"attention_factor = 1\.0, but only 0\.1 ln"),
    ({"rope_parameters": YARN | {"rope_type": "linear"}}, "mscale, mscale_all_dim, .* are unknown for"),
    ({"rope_parameters": YARN | {"factor": 0.0}}, r"model\.yarn\.factor = 0\.0 must be above 0"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers = 10+ must be at most 10,000; count its zeros"),
    ({"rope_parameters": YARN | {"attention_factor": 1.2}}, "attention_factor: with mscale"),
    ({"rope_parameters": YARN | {"long_factor": [1.0]}}, "rope parameters long_factor are unknown"),
])
def test_other_attention_is_refused_by_its_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(build_latent_config(**fields))


def test_only_deepseek_v3_has_latent_attention() -> None:
    model_without = replace(recipes.get("tiny-deepseek-v3").model, latent_attention=None)
    for check in (models.get_family("deepseek_v3").check, models.get_family("deepseek_v3").links):
        with pytest.raises(UserError, match=r"model\.latent_attention = null: family"):
            check(model_without)
    latent = recipes.get("tiny-deepseek-v3").model
    problems = models.get_family("solar_open").problems(replace(latent, family="solar_open"))
    assert "model.latent_attention" in [problem.key for problem in problems]
    with pytest.raises(UserError, match="mscale_all_dim are unknown"):
        models.get_family("solar_open").from_hf_config(models.get_family("solar_open").to_hf_config(
            recipes.get("tiny-solar-open").model, "float32", TokenIds()) | {"rope_parameters": YARN})
