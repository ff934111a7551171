"""config.json both ways: ours through transformers and back, and the older spelling of published configs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_sov import models, recipes
from megatron_sov.config import ModelConfig, YarnConfig
from megatron_sov.errors import UserError
from megatron_sov.models.family import TokenIds


def hf_config(model: ModelConfig) -> dict:
    return models.get(model.family).to_hf_config(model, "bfloat16", TokenIds(1, [2, 24, 25], 0))


@pytest.mark.parametrize("name", recipes.names())
def test_config_goes_to_transformers_and_comes_back(name: str) -> None:
    """Our config.json survives transformers' own config class: what it writes back describes the same architecture."""
    from transformers import AutoConfig

    model = recipes.get(name).model
    family = models.get(model.family)
    assert family.from_hf_config(json.loads(json.dumps(hf_config(model)))) == model
    theirs = AutoConfig.for_model(**hf_config(model))
    assert family.from_hf_config(json.loads(theirs.to_json_string())) == model
    assert theirs.eos_token_id == [2, 24, 25]


def test_layer_types_are_explicit_and_last_layer_is_what_the_pattern_says() -> None:
    model = replace(recipes.get("tiny-k-exaone").model, num_layers=6)
    config = hf_config(model)
    assert config["layer_types"] == ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 2
    assert models.get("exaone_moe").from_hf_config(config) == model


PUBLISHED_SOLAR = {
    "architectures": ["SolarOpenForCausalLM"], "model_type": "solar_open", "partial_rotary_factor": 1.0, "hidden_size": 4096,
    "num_hidden_layers": 48, "num_attention_heads": 64, "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 196608,
    "intermediate_size": 10240, "moe_intermediate_size": 1280, "rms_norm_eps": 1e-05, "rope_theta": 1000000,
    "max_position_embeddings": 131072, "n_routed_experts": 128, "n_shared_experts": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 1.0, "num_experts_per_tok": 8, "tie_word_embeddings": False, "first_k_dense_replace": 0,
    "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 65536}, "torch_dtype": "bfloat16",
}
PUBLISHED_EXAONE = {
    "architectures": ["ExaoneMoEForCausalLM"], "model_type": "exaone_moe", "hidden_size": 6144, "num_hidden_layers": 48,
    "num_attention_heads": 64, "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 153600, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_experts": 128, "num_experts_per_tok": 8, "num_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "first_last_k_dense_replace": 1, "is_moe_layer": [False] + [True] * 47, "sliding_window": 128,
    "sliding_window_pattern": "LLLG", "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 12,
    "rope_scaling": None, "rope_theta": 1000000, "max_position_embeddings": 262144, "num_nextn_predict_layers": 1,
    "sliding_windows": [128, 128, 128, 0] * 12, "mtp_layer_types": ["full_attention"], "mtp_sliding_windows": [0],
    "tokenizer_class": "GPT2Tokenizer", "dtype": "bfloat16", "eos_token_id": 53,
}
"""The older spelling (rope_theta, rope_scaling, is_moe_layer) of the released models' configs."""


@pytest.mark.parametrize(("name", "config"), [("solar-open-102b", PUBLISHED_SOLAR), ("k-exaone-236b", PUBLISHED_EXAONE)])
def test_configs_in_the_older_spelling_are_the_recipes_models(name: str, config: dict) -> None:
    model = recipes.get(name).model
    assert models.get(model.family).from_hf_config(config) == model


def test_yarn_means_the_same_frequencies_in_transformers() -> None:
    """A YaRN that is not the default survives, and transformers computes its attention factor as 0.1 ln(factor) + 1."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = replace(recipes.get("solar-open-102b").model, yarn=YarnConfig(8.0, 16384, 24.0, 2.0))
    config = hf_config(model)
    assert models.get("solar_open").from_hf_config(config) == model
    _, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](AutoConfig.for_model(**config), "cpu")
    assert attention_factor == pytest.approx(1.2079441541679836)
    config["rope_parameters"]["attention_factor"] = 1.0
    with pytest.raises(UserError, match=r"attention_factor = 1\.0, but only .* = 1\.207944"):
        models.get("solar_open").from_hf_config(config)
