"""Families against transformers: every key, shape and dtype of the full-size models,
and their parameter totals."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.base.plugins.loading import LoadedPlugin
from megatron_sov.model.config import ModelConfig, YarnConfig
from megatron_sov.model.config.model import Llama3RopeConfig
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.family import KV_HEADS, Family, TokenIds, extract_text_config
from megatron_sov.model.families.hf_config import Renamed, Rope

FULL_SIZE_RECIPES = ("solar-open-102b", "k-exaone-236b", "qwen2-1.5b", "qwen3-4b", "qwen3-8b",
                     "qwen3-moe-30b",
                     "llama-3.1-8b", "exaone-4.0-32b", "exaone-4.0-1.2b", "hyperclovax-14b",
                     "gemma-3-1b", "gemma3-27b",
                     "deepseek-v3", "kimi-k2", "solar-open2-250b")
pytestmark = pytest.mark.usefixtures("solar_open2")


def build_hf_config(model: ModelConfig) -> dict:
    return models.get_family(model.family).to_hf_config(model, "bfloat16", TokenIds(1, [2, 24, 25], 0))


def list_our_tensors(model: ModelConfig) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (shape, torch.float32 if link.fp32 else torch.bfloat16)
            for link in models.get_family(model.family).links(model)
            for name, shape in link.hf_shapes().items()}


def list_transformers_tensors(model: ModelConfig) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return name -> (shape, dtype) of the tensors that transformers saves, from a model on meta tensors.

    In memory, transformers stacks experts to [E, 2I, H] and [E, H, I]; on disk, each expert has its three
    matrices. K-EXAONE's router bias lies one level higher on disk. A tied head is not saved.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = build_hf_config(model)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    tensors = {}
    for name, tensor in network.state_dict().items():
        shape, dtype = tuple(tensor.shape), tensor.dtype
        if name.endswith("experts.gate_up_proj"):
            for e in range(shape[0]):
                for matrix in ("gate_proj", "up_proj"):
                    tensors[name.replace("gate_up_proj", f"{e}.{matrix}.weight")] = (
                        (shape[1] // 2, shape[2]), dtype)
        elif name.endswith("experts.down_proj"):
            tensors |= {name.replace("down_proj", f"{e}.down_proj.weight"): (shape[1:], dtype)
                        for e in range(shape[0])}
        elif name.endswith("e_score_correction_bias"):
            on_disk = name.replace("mlp.gate.", "mlp.") if model.family == "exaone_moe" else name
            # kept in float32 by the model class (_keep_in_fp32_modules_strict)
            tensors[on_disk] = (shape, torch.float32)
        elif name.endswith("mlp.gate.weight") and model.router_score == "sigmoid":
            # transformers 5.24 keeps these in float32, 5.23 did not. It reads our bfloat16 without a change.
            tensors[name] = (shape, torch.bfloat16)
        elif not (model.tied_embeddings and name == "lm_head.weight"):
            tensors[name] = (shape, dtype)
    return tensors


def is_in_prediction_layer(name: str, model: ModelConfig) -> bool:
    """Return whether a tensor belongs to the prediction layer, which transformers' class leaves out."""
    return name.startswith(("mtp.", f"model.layers.{model.num_layers}."))


@pytest.mark.tier1_cases(8)
@pytest.mark.parametrize("name", FULL_SIZE_RECIPES)
def test_full_size_tensors_are_those_of_transformers(name: str) -> None:
    model = recipes.get(name).model
    our_tensors = list_our_tensors(model)
    prediction_layer = {key: value for key, value in our_tensors.items()
                        if is_in_prediction_layer(key, model)}
    hf_tensors = list_transformers_tensors(model)
    assert {key: value for key, value in our_tensors.items() if key not in prediction_layer} == hf_tensors
    assert bool(prediction_layer) == (name in ("k-exaone-236b", "deepseek-v3"))


def test_prediction_layer_has_the_published_names_and_shapes() -> None:
    our_tensors = list_our_tensors(recipes.get("k-exaone-236b").model)
    trunk_layer_0 = {key.replace("model.", "mtp."): v
                     for key, v in our_tensors.items() if key.startswith("model.layers.0.")}
    norms = {f"mtp.{n}.weight": ((6144,), torch.bfloat16)
             for n in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    expected = trunk_layer_0 | norms | {"mtp.fc.weight": ((6144, 12288), torch.bfloat16)}
    assert {key: v for key, v in our_tensors.items() if key.startswith("mtp.")} == expected


def test_a_prediction_layer_counts_as_one_more_layer() -> None:
    """With four tensors around it, and embedding and head once more (`deepseek_mtp.py` of vLLM)."""
    model = recipes.get("deepseek-v3").model
    our_tensors, prefix, hidden = list_our_tensors(model), "model.layers.61.", 7168
    last_layer = {key.replace("layers.60.", "layers.61."): v
                  for key, v in our_tensors.items() if key.startswith("model.layers.60.")}
    further_tensors = {f"{prefix}{norm}.weight": ((hidden,), torch.bfloat16)
                       for norm in ("enorm", "hnorm", "shared_head.norm")}
    further_tensors[f"{prefix}eh_proj.weight"] = (hidden, 2 * hidden), torch.bfloat16
    found = {key: value for key, value in our_tensors.items() if key.startswith(prefix)}
    assert found == last_layer | further_tensors
    assert models.get_family("deepseek_v3").find_copies(model) == {
        f"{prefix}embed_tokens.weight": "model.embed_tokens.weight",
        f"{prefix}shared_head.head.weight": "lm_head.weight"}


def test_a_model_that_its_family_cannot_express_is_refused_with_every_reason() -> None:
    model = replace(recipes.get("tiny-solar-open").model, qk_norm=True, rope_on_global=False,
                    num_shared_experts=0)
    with pytest.raises(UserError) as e:
        build_hf_config(model)
    assert len(re.findall(r"model\.(qk_norm|rope_on_global|num_shared_experts) =", str(e.value))) == 3


@pytest.mark.each(("field", "value"), [
    ("head_dim", 0), ("head_dim", -1), ("hidden_size", -4), ("num_layers", 10**15),
    ("num_mtp_layers", 10**15), ("attention_multiplier", 1e-320), ("attention_multiplier", 0.0)])
def test_zero_and_huge_numbers_are_refused(field: str, value: float) -> None:
    model = replace(recipes.get("tiny-gemma3").model, **{field: value})
    with pytest.raises(UserError, match=f"model.{field} "):
        models.get_family("gemma3_text").check(model)


YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}


@pytest.mark.each(("field", "value"), [
    ("architectures", 3), ("architectures", [["a"]]), ("rope_parameters", 7), ("rope_parameters", [1]),
    ("initializer_range", {}), ("num_hidden_layers", "x"), ("num_key_value_heads", 0), ("hidden_size", []),
    *(("rope_parameters", YARN | wrong) for wrong in (
        {"factor": []}, {"factor": "x"}, {"beta_slow": {}}, {"original_max_position_embeddings": 0},
        {"original_max_position_embeddings": [1]}, {"rope_theta": {}}, {"attention_factor": "y"})),
])
def test_a_value_of_another_kind_is_named(field: str, value: object) -> None:
    config = build_hf_config(recipes.get("tiny-solar-open").model) | {field: value}
    with pytest.raises(UserError, match=rf"{field}|original_max|num_kv_heads|num_layers|hidden_size"):
        models.get_family("solar_open").from_hf_config(config)


def remove_items(*items: object) -> Family:
    return replace(models.get_family("qwen3"), name="qwen3_own", config=tuple(
        item for item in models.get_family("qwen3").config if item not in items))


def test_a_family_with_an_unmapped_setting_is_refused_at_load() -> None:
    """transformers would take its own default, as 32 heads of keys."""
    assert remove_items().find_undefined_fields() == []
    rope = next(item for item in models.get_family("qwen3").config if isinstance(item, Rope))
    assert remove_items(KV_HEADS).find_undefined_fields() == ["num_kv_heads"]
    assert "rope_theta" in remove_items(rope).find_undefined_fields()
    with pytest.raises(UserError, match=r"my.py:QWEN: does not define"):
        models.FAMILY_PLUGINS.add(LoadedPlugin(remove_items(KV_HEADS), "QWEN", "my.py:QWEN", {}))


def test_a_config_json_that_describes_another_model_is_not_written() -> None:
    model = replace(recipes.get("tiny-qwen3").model, family="qwen3_own")
    assert remove_items().to_hf_config(model, "bfloat16",
                                       TokenIds())["num_key_value_heads"] == model.num_kv_heads
    with pytest.raises(UserError, match=rf"'qwen3_own': .* another model than model.num_kv_heads = "
                                        rf"{model.num_kv_heads} \(reads back as 'nothing'\)"):
        remove_items(KV_HEADS).to_hf_config(model, "bfloat16", TokenIds())
    swapped = replace(remove_items(KV_HEADS), config=(
        *remove_items(KV_HEADS).config, Renamed("num_key_value_heads", "num_heads")))
    with pytest.raises(UserError, match=r"model\.num_kv_heads = "):
        swapped.to_hf_config(model, "bfloat16", TokenIds())


# config.json both ways: ours through transformers and back, and the older spelling of published configs.


@pytest.mark.each("name", recipes.names())
def test_config_survives_transformers_round_trip(name: str) -> None:
    """transformers' config class reads our config.json and writes back the same architecture."""
    from transformers import AutoConfig

    model = recipes.get(name).model
    family = models.get_family(model.family)
    model = replace(model, **family.training)  # training-only settings are not in the file
    assert family.from_hf_config(json.loads(json.dumps(build_hf_config(model)))) == model
    theirs = AutoConfig.for_model(**build_hf_config(model))
    assert family.from_hf_config(json.loads(theirs.to_json_string())) == model
    assert theirs.eos_token_id == [2, 24, 25]


def test_layer_types_are_explicit_and_follow_the_pattern() -> None:
    model = replace(recipes.get("tiny-k-exaone").model, num_layers=6)
    config = build_hf_config(model)
    assert config["layer_types"] == ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 2
    assert models.get_family("exaone_moe").from_hf_config(config) == model


# totals of EXAONE 4.0, HyperCLOVA X, Gemma and Kimi K2 are unsourced (docs/families.md)
PUBLISHED = json.loads(Path(__file__).with_name("published_configs.json").read_text())
"""The config.json of released models, in the older spelling (rope_theta, rope_scaling, is_moe_layer)."""
RELEASED = {
    "solar-open-102b-extend": "upstage/Solar-Open-100B", "k-exaone-236b": "LGAI-EXAONE/K-EXAONE-236B-A23B",
    "k-exaone-236b-extend": "LGAI-EXAONE/K-EXAONE-236B-A23B", "qwen2-1.5b": "Qwen/Qwen2.5-Math-1.5B",
    "qwen3-4b": "Qwen/Qwen3-4B", "qwen3-4b-2507": "Qwen/Qwen3-4B-Instruct-2507", "qwen3-8b": "Qwen/Qwen3-8B",
    "typhoon-s-8b": "Qwen/Qwen3-8B-Base", "qwen3-moe-30b": "Qwen/Qwen3-30B-A3B",
    "qwen3-30b-a3b-2507": "Qwen/Qwen3-30B-A3B-Instruct-2507", "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "exaone-4.0-32b": "LGAI-EXAONE/EXAONE-4.0-32B",
    "exaone-4.0-1.2b": "LGAI-EXAONE/EXAONE-4.0-1.2B", "gemma-3-1b": "google/gemma-3-1b-it",
    "deepseek-v3": "deepseek-ai/DeepSeek-V3", "kimi-k2": "moonshotai/Kimi-K2-Instruct",
    "gemma3-27b": "google/gemma-3-27b-it",
        "solar-open2-250b": "upstage/Solar-Open2-250B", "solar-open2-250b-extend": "upstage/Solar-Open2-250B",
    "hyperclovax-14b": "naver-hyperclovax/HyperCLOVAX-SEED-Think-14B"}


@pytest.mark.each(("name", "released"), RELEASED.items())
def test_released_configs_are_the_recipes_models(name: str, released: str) -> None:
    model = recipes.get(name).model
    assert models.get_family(model.family).from_hf_config(extract_text_config(PUBLISHED[released])) == model


def test_solar_trains_with_plain_rotations_before_its_last_stage() -> None:
    released = models.get_family("solar_open").from_hf_config(PUBLISHED["upstage/Solar-Open-100B"])
    for name in ("solar-open-102b", "solar-open-102b-mid"):
        assert recipes.get(name).model == replace(released, yarn=None)


@pytest.mark.parametrize("changed", [{}, {"num_key_value_heads": None}])
def test_llama_without_num_key_value_heads_uses_num_attention_heads(changed: dict) -> None:
    from transformers import LlamaConfig

    config = {name: value for name, value in build_hf_config(recipes.get("llama-3.1-8b").model).items()
              if name != "num_key_value_heads"} | changed
    assert models.get_family("llama").from_hf_config(config).num_kv_heads == 32
    assert LlamaConfig(**config).num_key_value_heads == 32
    with pytest.raises(UserError, match="lacks 'num_key_value_heads'"):
        models.get_family("qwen3").from_hf_config({
            name: value for name, value in PUBLISHED["Qwen/Qwen3-8B"].items()
            if name != "num_key_value_heads"})


def test_yarn_means_the_same_frequencies_in_transformers() -> None:
    """A YaRN that is not the default survives, and transformers computes its attention factor as
    0.1 ln(factor) + 1."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = replace(recipes.get("solar-open-102b").model, yarn=YarnConfig(8.0, 16384, 24.0, 2.0))
    config = build_hf_config(model)
    assert models.get_family("solar_open").from_hf_config(config) == model
    _, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](AutoConfig.for_model(**config), "cpu")
    assert attention_factor == pytest.approx(1.2079441541679836)
    config["rope_parameters"]["attention_factor"] = 1.0
    with pytest.raises(UserError, match=r"attention_factor = 1\.0,"):
        models.get_family("solar_open").from_hf_config(config)


def test_llamas_scaling_means_the_same_frequencies_in_transformers() -> None:
    """A non-default scaling survives, with the same float32 frequencies as transformers."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from megatron_sov.engine.model.rotary import compute_frequencies

    model = replace(recipes.get("llama-3.1-8b").model, llama3_rope=Llama3RopeConfig(32.0, 2.0, 8.0, 4096))
    config = build_hf_config(model)
    assert models.get_family("llama").from_hf_config(config) == model
    hf_frequencies, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.for_model(**config), "cpu")
    assert attention_factor == 1.0
    assert compute_frequencies(model).tolist() == pytest.approx(hf_frequencies.tolist(), rel=1e-5)
    with pytest.raises(UserError, match="rope_type 'llama3' lacks 'low_freq_factor'"):
        models.get_family("llama").from_hf_config(config | {"rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}})
