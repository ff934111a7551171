"""Latent attention in config.json: as transformers writes it, as it was released, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from megatron_sov import models, recipes
from megatron_sov.config import ModelConfig, YarnConfig
from megatron_sov.errors import UserError
from megatron_sov.models.family import TokenIds

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 4096,
        "mscale": 0.7, "mscale_all_dim": 0.7}


def config_of(**fields: Any) -> dict[str, Any]:
    """Return the tiny DeepSeek's config.json with other fields."""
    model = recipes.get("tiny-deepseek-v3").model
    return models.get("deepseek_v3").to_hf_config(model, "bfloat16", TokenIds()) | fields


def read(config: dict[str, Any]) -> ModelConfig:
    return models.get("deepseek_v3").from_hf_config(config)


def test_widths_that_transformers_writes_are_those_that_follow() -> None:
    from transformers import AutoConfig

    theirs = json.loads(AutoConfig.for_model(**config_of()).to_json_string())
    assert (theirs["head_dim"], theirs["qk_head_dim"]) == (16, 32)
    assert read(theirs) == read(config_of())


def test_queries_may_be_made_of_the_layers_input() -> None:
    latent = read(config_of(q_lora_rank=None)).latent_attention
    assert latent is not None and latent.q_lora_rank is None


def test_yarns_factor_is_in_the_scale_of_the_softmax_as_in_transformers() -> None:
    from transformers import AutoConfig
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        DeepseekV3Attention,
        DeepseekV3RotaryEmbedding,
    )

    from megatron_sov.mcore.model.rotary import frequencies, softmax_scale

    config = config_of(rope_parameters=YARN)
    model, theirs = read(config), AutoConfig.for_model(**config)
    assert model.yarn == YarnConfig(40.0, 4096, mscale=0.7)
    assert softmax_scale(model, "full_attention") == pytest.approx(DeepseekV3Attention(theirs, 0).scaling)
    rotary = DeepseekV3RotaryEmbedding(theirs)
    assert rotary.attention_scaling == 1.0, "cosine and sine have no factor"
    assert rotary.inv_freq.tolist() == pytest.approx(frequencies(model).tolist(), rel=1e-6)
    assert read(models.get("deepseek_v3").to_hf_config(model, "float32", TokenIds())) == model


@pytest.mark.parametrize(("fields", "said"), [
    ({"kv_lora_rank": None}, "lacks kv_lora_rank; add them"),
    ({"num_key_value_heads": 2}, "num_key_value_heads = 2, but only 4 is supported"),
    ({"qk_head_dim": 48}, "qk_head_dim = 48, but only 32 is supported"),
    ({"head_dim": 32}, "head_dim = 32, but only 16 is supported"),
    ({"rope_interleave": False}, "rope_interleave = False, but only True"),
    ({"attention_bias": True}, "attention_bias = True, but only False"),
    ({"moe_layer_freq": 2}, "moe_layer_freq = 2, but only 1"),
    ({"topk_method": "greedy"}, "topk_method = 'greedy', but only 'noaux_tc'"),
    ({"rope_parameters": YARN | {"mscale_all_dim": 1.0}}, "mscale and mscale_all_dim that are equal"),
    ({"rope_parameters": YARN | {"mscale": 0.0, "mscale_all_dim": 0.0}}, "that are equal and not 0"),
    # transformers multiplies the softmax's scale by them beside these rotations, too
    ({"rope_parameters": YARN | {"rope_type": "linear"}}, "mscale, mscale_all_dim, .* are unknown for"),
    ({"rope_parameters": YARN | {"factor": 0.0}}, r"model\.yarn\.factor = 0\.0 must be above 0"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers = 10+ must be at most 10,000; count its zeros"),
    ({"rope_parameters": YARN | {"attention_factor": 1.2}}, "attention_factor: beside mscale"),
    ({"rope_parameters": YARN | {"long_factor": [1.0]}}, "rope parameters long_factor are unknown"),
])
def test_other_attention_is_refused_by_its_field(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read(config_of(**fields))


def test_other_families_have_none_and_this_one_does() -> None:
    without = replace(recipes.get("tiny-deepseek-v3").model, latent_attention=None)
    for ask in (models.get("deepseek_v3").check, models.get("deepseek_v3").links):
        with pytest.raises(UserError, match=r"model\.latent_attention = null: family 'deepseek_v3' has"):
            ask(without)
    latent = recipes.get("tiny-deepseek-v3").model
    problems = models.get("solar_open").problems(replace(latent, family="solar_open"))
    assert "model.latent_attention" in [problem.key for problem in problems]
    with pytest.raises(UserError, match="mscale_all_dim are unknown"):
        models.get("solar_open").from_hf_config(models.get("solar_open").to_hf_config(
            recipes.get("tiny-solar-open").model, "float32", TokenIds()) | {"rope_parameters": YARN})
