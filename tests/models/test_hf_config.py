"""config.json both ways: ours through transformers and back, and the older spelling of published configs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sov import models, recipes
from megatron_sov.config import ModelConfig, YarnConfig
from megatron_sov.config.model import Llama3RopeConfig
from megatron_sov.errors import UserError
from megatron_sov.models.family import TokenIds
from megatron_sov.models.text_inside import text_config


def hf_config(model: ModelConfig) -> dict:
    return models.get(model.family).to_hf_config(model, "bfloat16", TokenIds(1, [2, 24, 25], 0))


@pytest.mark.parametrize("name", recipes.names())
def test_config_goes_to_transformers_and_comes_back(name: str) -> None:
    """Our config.json survives transformers' own config class: what it writes back describes the
    same architecture."""
    from transformers import AutoConfig

    model = recipes.get(name).model
    family = models.get(model.family)
    model = replace(model, **family.training)  # what only training knows is not in the file
    assert family.from_hf_config(json.loads(json.dumps(hf_config(model)))) == model
    theirs = AutoConfig.for_model(**hf_config(model))
    assert family.from_hf_config(json.loads(theirs.to_json_string())) == model
    assert theirs.eos_token_id == [2, 24, 25]


def test_layer_types_are_explicit_and_last_layer_is_what_the_pattern_says() -> None:
    model = replace(recipes.get("tiny-k-exaone").model, num_layers=6)
    config = hf_config(model)
    assert config["layer_types"] == ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 2
    assert models.get("exaone_moe").from_hf_config(config) == model


# those of EXAONE 4.0, HyperCLOVA X, GLM-4.5-Air, Gemma and Kimi K2 are as remembered (docs/families.md)
PUBLISHED = json.loads(Path(__file__).with_name("published_configs.json").read_text())
"""The config.json of released models, in the older spelling (rope_theta, rope_scaling, is_moe_layer)."""
RELEASED = {
    "solar-open-102b-extend": "upstage/Solar-Open-100B", "k-exaone-236b": "LGAI-EXAONE/K-EXAONE-236B-A23B",
    "k-exaone-236b-extend": "LGAI-EXAONE/K-EXAONE-236B-A23B", "qwen2-1.5b": "Qwen/Qwen2.5-Math-1.5B",
    "qwen3-4b": "Qwen/Qwen3-4B", "qwen3-4b-2507": "Qwen/Qwen3-4B-Instruct-2507", "qwen3-8b": "Qwen/Qwen3-8B",
    "typhoon-s-8b": "Qwen/Qwen3-8B-Base", "qwen3-moe-30b": "Qwen/Qwen3-30B-A3B",
    "qwen3-30b-a3b-2507": "Qwen/Qwen3-30B-A3B-Instruct-2507", "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1", "exaone-4.0-32b": "LGAI-EXAONE/EXAONE-4.0-32B",
    "exaone-4.0-1.2b": "LGAI-EXAONE/EXAONE-4.0-1.2B", "gemma-3-1b": "google/gemma-3-1b-it",
    "deepseek-v3": "deepseek-ai/DeepSeek-V3", "kimi-k2": "moonshotai/Kimi-K2-Instruct",
    "gemma3-27b": "google/gemma-3-27b-it", "gemma2-9b": "google/gemma-2-9b",
    "glm-4.5-air": "zai-org/GLM-4.5-Air", "gpt-oss-20b": "openai/gpt-oss-20b",
    "gpt-oss-120b": "openai/gpt-oss-120b",
    "hyperclovax-14b": "naver-hyperclovax/HyperCLOVAX-SEED-Think-14B"}


@pytest.mark.parametrize(("name", "released"), RELEASED.items())
def test_released_configs_are_the_recipes_models(name: str, released: str) -> None:
    model = recipes.get(name).model
    assert models.get(model.family).from_hf_config(text_config(PUBLISHED[released])) == model


def test_what_gpt_oss_leaves_out_is_what_transformers_assumes() -> None:
    """Its class's defaults are the 120B."""
    from transformers import GptOssConfig

    theirs = json.loads(GptOssConfig().to_json_string())
    needed = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "intermediate_size", "max_position_embeddings", "rope_parameters")
    for config in (theirs, {name: theirs[name] for name in needed}):
        assert models.get("gpt_oss").from_hf_config(config) == recipes.get("gpt-oss-120b").model


def test_solar_trains_with_plain_rotations_before_its_last_stage() -> None:
    released = models.get("solar_open").from_hf_config(PUBLISHED["upstage/Solar-Open-100B"])
    for name in ("solar-open-102b", "solar-open-102b-mid"):
        assert recipes.get(name).model == replace(released, yarn=None)


@pytest.mark.parametrize("said", [{}, {"num_key_value_heads": None}])
def test_a_llama_whose_config_has_no_heads_of_keys_has_as_many_as_queries(said: dict) -> None:
    from transformers import LlamaConfig

    config = {name: value for name, value in hf_config(recipes.get("llama-3.1-8b").model).items()
              if name != "num_key_value_heads"} | said
    assert models.get("llama").from_hf_config(config).num_kv_heads == 32
    assert LlamaConfig(**config).num_key_value_heads == 32
    with pytest.raises(UserError, match="lacks 'num_key_value_heads'"):
        models.get("mixtral").from_hf_config({
            name: value for name, value in PUBLISHED["mistralai/Mixtral-8x7B-v0.1"].items()
            if name != "num_key_value_heads"})


def test_yarn_means_the_same_frequencies_in_transformers() -> None:
    """A YaRN that is not the default survives, and transformers computes its attention factor as
    0.1 ln(factor) + 1."""
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


def test_llamas_scaling_means_the_same_frequencies_in_transformers() -> None:
    """One that is not the default survives, and ours are the frequencies that transformers has in float32."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from megatron_sov.mcore.model.rotary import frequencies

    model = replace(recipes.get("llama-3.1-8b").model, llama3_rope=Llama3RopeConfig(32.0, 2.0, 8.0, 4096))
    config = hf_config(model)
    assert models.get("llama").from_hf_config(config) == model
    theirs, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.for_model(**config), "cpu")
    assert attention_factor == 1.0
    assert frequencies(model).tolist() == pytest.approx(theirs.tolist(), rel=1e-5)
    with pytest.raises(UserError, match="rope_type 'llama3' lacks 'low_freq_factor'"):
        models.get("llama").from_hf_config(config | {"rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}})
