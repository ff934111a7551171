"""Which layers slide and which are dense, read as transformers reads it;
what we cannot express is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sov import models, recipes
from megatron_sov.config import ModelConfig
from megatron_sov.errors import UserError
from megatron_sov.models.family import TokenIds


def config_of(recipe: str, **fields: Any) -> dict[str, Any]:
    """Return a tiny recipe's config.json with other fields; None takes a field away."""
    model = recipes.get(recipe).model
    changed = models.get(model.family).to_hf_config(model, "bfloat16", TokenIds()) | fields
    return {name: value for name, value in changed.items() if value is not None}


def read(config: dict[str, Any]) -> ModelConfig:
    return models.get(config["model_type"]).from_hf_config(config)


@given(st.sampled_from(["tiny-qwen2", "tiny-qwen3"]), st.booleans(), st.integers(1, 99), st.integers(0, 8),
       st.integers(1, 8))
def test_qwens_windows_are_those_of_transformers(recipe: str, switch: bool, window: int, first: int,
                                                 layers: int) -> None:
    from transformers import AutoConfig

    config = config_of(recipe, use_sliding_window=switch, sliding_window=window, max_window_layers=first,
                       num_hidden_layers=layers, layer_types=None)
    theirs, ours = AutoConfig.for_model(**config), read(config)
    assert ours.layer_types() == theirs.layer_types
    assert ours.sliding_window_tokens == (theirs.sliding_window
                                          if "sliding_attention" in theirs.layer_types else 0)
    assert read(models.get(ours.family).to_hf_config(ours, "float32", TokenIds())) == ours


def test_every_layer_of_qwen3_moe_slides_or_none() -> None:
    sliding = read(config_of("tiny-qwen3-moe", use_sliding_window=True, sliding_window=9,
                             max_window_layers=2))
    assert (set(sliding.layer_types()), sliding.sliding_window_tokens) == ({"sliding_attention"}, 9)
    assert read(config_of("tiny-qwen3-moe", sliding_window=9)).attention_pattern == "G"


@pytest.mark.parametrize(("fields", "dense"), [
    ({}, 0), ({"mlp_only_layers": [0, 1]}, 2), ({"mlp_only_layers": None, "decoder_sparse_step": None}, 0),
    ({"decoder_sparse_step": 4}, 3),
])
def test_dense_layers_of_qwen3_moe_are_those_of_transformers(fields: dict[str, Any], dense: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = config_of("tiny-qwen3-moe", **fields)
    assert read(config).num_dense_layers == dense
    with torch.device("meta"):
        layers = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).model.layers
    assert [hasattr(layer.mlp, "experts") for layer in layers] == [i >= dense for i in range(4)]


def test_the_prediction_layer_of_k_exaone_is_global_unless_the_config_says_otherwise() -> None:
    silent = config_of("tiny-k-exaone", mtp_layer_types=None, mtp_sliding_windows=None,
                       mtp_loss_scaling_factor=None)
    model = read(silent)
    assert (model.num_mtp_layers, model.mtp_layer_type(), model.mtp_loss_coeff) == (1, "full_attention", 0.05)
    sliding = read(silent | {"mtp_layer_types": ["sliding_attention"],
                             "mtp_sliding_windows": [model.sliding_window_tokens],
                             "mtp_loss_scaling_factor": 0.1})
    assert (sliding.mtp_layer_type(), sliding.mtp_loss_coeff) == ("sliding_attention", 0.1)
    assert read(models.get("exaone_moe").to_hf_config(sliding, "float32", TokenIds())) == sliding


@pytest.mark.parametrize(("recipe", "fields", "sentence"), [
    ("tiny-qwen2", {"use_sliding_window": True, "sliding_window": None},
     "use_sliding_window = True needs sliding_window"),
    ("tiny-qwen2", {"use_mrope": True}, "use_mrope = True, but only False"),
    ("tiny-qwen3", {"layer_types": ["sliding_attention"] * 4}, "layer_types = .* names sliding layers, but"),
    ("tiny-qwen3", {"attention_bias": True}, "attention_bias = True, but only False"),
    ("tiny-qwen3-moe", {"decoder_sparse_step": 2},
     "mlp_only_layers and decoder_sparse_step must name dense layers first"),
    ("tiny-qwen3-moe", {"mlp_only_layers": [2]}, "a dense layer behind one with experts is not supported"),
    ("tiny-qwen3-moe", {"num_local_experts": 4}, "num_experts = 8 and num_local_experts = 4 disagree"),
    ("tiny-k-exaone", {"sliding_windows": [32, 32, 16, 0]},
     "sliding_windows = .* only windows that follow from layer_types"),
    ("tiny-k-exaone", {"mtp_sliding_windows": [32]},
     r"mtp_sliding_windows = \[32\], but only 0 is supported"),
    ("tiny-k-exaone", {"mtp_layer_types": ["full_attention"] * 2},
     "mtp_layer_types must name .* for each of 1 layers"),
    ("tiny-k-exaone", {"mtp_num_speculative_steps": 3},
     "mtp_num_speculative_steps = 3, but only num_nextn_predict_layers = 1"),
])
def test_what_we_do_not_compute_is_refused(recipe: str, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read(config_of(recipe, **fields))


def test_a_pattern_that_qwen3_moe_cannot_express_is_a_problem_before_training() -> None:
    model = read(config_of("tiny-qwen3-moe"))
    problems = models.get("qwen3_moe").problems(replace(model, attention_pattern="LG",
                                                        sliding_window_tokens=8, router_bias=True))
    assert len(problems) == 2 and any("either every layer slides or none does" in p.rule for p in problems)
