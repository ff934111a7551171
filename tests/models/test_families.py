"""Families against transformers: config.json both ways, and every key, shape and dtype of the full-size models."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from megatron_sov import models, recipes
from megatron_sov.config import ModelConfig, YarnConfig
from megatron_sov.errors import UserError
from megatron_sov.models.count import num_params
from megatron_sov.models.family import TokenIds

IDS = TokenIds(1, [2, 24, 25], 0)
BIG = ("solar-open-102b", "k-exaone-236b")


def hf_config(model: ModelConfig) -> dict:
    return models.get(model.family).to_hf_config(model, "bfloat16", IDS)


def our_tensors(model: ModelConfig) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (shape, torch.float32 if link.fp32 else torch.bfloat16)
            for link in models.get(model.family).links(model) for name, shape in link.hf_shapes().items()}


def transformers_tensors(model: ModelConfig) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Keys, shapes and dtypes that transformers saves for this config, from a model on meta tensors.

    In memory it fuses experts to [E, 2I, H] and [E, H, I]; on disk each expert has its three matrices.  K-EXAONE's router
    bias stands one level higher on disk.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = hf_config(model)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    found = {}
    for name, tensor in network.state_dict().items():
        shape, dtype = tuple(tensor.shape), tensor.dtype
        if name.endswith("experts.gate_up_proj"):
            for e in range(shape[0]):
                for part in ("gate_proj", "up_proj"):
                    found[name.replace("gate_up_proj", f"{e}.{part}.weight")] = ((shape[1] // 2, shape[2]), dtype)
        elif name.endswith("experts.down_proj"):
            found |= {name.replace("down_proj", f"{e}.down_proj.weight"): (shape[1:], dtype) for e in range(shape[0])}
        elif name.endswith("e_score_correction_bias"):
            on_disk = name.replace("mlp.gate.", "mlp.") if model.family == "exaone_moe" else name
            found[on_disk] = (shape, torch.float32)  # kept in float32 by the model class (_keep_in_fp32_modules_strict)
        else:
            found[name] = (shape, dtype)
    return found


@pytest.mark.parametrize("name", BIG)
def test_full_size_tensors_are_those_of_transformers(name: str) -> None:
    model = recipes.get(name).model
    ours = our_tensors(model)
    mtp = {key: value for key, value in ours.items() if key.startswith("mtp.")}
    theirs = transformers_tensors(model)
    assert {key: value for key, value in ours.items() if key not in mtp} == theirs
    assert bool(mtp) == (name == "k-exaone-236b")


def test_prediction_layer_has_the_published_names_and_shapes() -> None:
    ours = our_tensors(recipes.get("k-exaone-236b").model)
    trunk_layer_0 = {key.replace("model.", "mtp."): v for key, v in ours.items() if key.startswith("model.layers.0.")}
    norms = {f"mtp.{n}.weight": ((6144,), torch.bfloat16) for n in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    expected = trunk_layer_0 | norms | {"mtp.fc.weight": ((6144, 12288), torch.bfloat16)}
    assert {key: v for key, v in ours.items() if key.startswith("mtp.")} == expected


@pytest.mark.parametrize(("name", "trunk", "mtp"), [("solar-open-102b", 102.65e9, 0), ("k-exaone-236b", 236.571e9, 0.528e9)])
def test_parameter_totals_are_the_published_ones(name: str, trunk: float, mtp: float) -> None:
    model = recipes.get(name).model
    sizes = {key: torch.Size(shape).numel() for key, (shape, _) in our_tensors(model).items() if "correction_bias" not in key}
    counted_mtp = sum(n for key, n in sizes.items() if key.startswith("mtp."))
    counted = sum(sizes.values()) - counted_mtp
    assert counted == pytest.approx(trunk, rel=5e-5)
    assert counted_mtp == pytest.approx(mtp, rel=1e-3)
    assert (num_params(model).total, num_params(model).mtp) == (counted, counted_mtp)


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


def test_a_model_that_its_family_cannot_express_is_refused_with_every_reason() -> None:
    model = replace(recipes.get("tiny-solar-open").model, qk_norm=True, rope_on_global=False, num_shared_experts=0)
    with pytest.raises(UserError) as e:
        hf_config(model)
    assert len(re.findall(r"model\.(qk_norm|rope_on_global|num_shared_experts) =", str(e.value))) == 3


def test_an_unknown_family_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean 'solar_open'\? \(families: solar_open, exaone_moe\)"):
        models.get("solar-open")
