"""Parameter counts against the published figures and against transformers' own model classes."""

import re
from dataclasses import replace

import pytest
import torch

from megatron_sov.base.settings import SettingsError
from megatron_sov.model.config import LoraConfig, ModelConfig
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.adapters import (
    find_adaptable_modules, find_adapted_modules, find_adapter_places, resolve_targets)
from megatron_sov.model.families.count import (
    compute_mean_keys, compute_train_flops_per_token, count_multiplied_weights, count_params)
from megatron_sov.model.families.family import TokenIds
from megatron_sov.model.recipes import get, names

pytestmark = pytest.mark.usefixtures("solar_open2")


@pytest.mark.each(("recipe", "total_b", "active_b", "mtp_b"), [
    ("solar-open-102b", 102.65, 12.05, 0.0),
    ("k-exaone-236b", 236.57, 23.67, 0.53),
    ("qwen3-moe-30b", 30.53, 3.35, 0.0),
    ("deepseek-v3", 671.03, 37.55, 11.61),
    ("kimi-k2", 1026.41, 32.86, 0.0),
    ("solar-open2-250b", 250.29, 14.74, 0.0),
])
def test_published_figures(recipe: str, total_b: float, active_b: float, mtp_b: float) -> None:
    count = count_params(get(recipe).model)
    assert [round(n / 1e9, 2) for n in (count.total, count.active, count.mtp)] == [total_b, active_b, mtp_b]


def test_linear_attention_costs_a_token_the_same_at_any_length() -> None:
    """Megatron-LM's count of the delta rule: four products of the size of the state (its training.py)."""
    model = get("solar-open2-250b").model
    short, long = (compute_train_flops_per_token(model, length) for length in (4096, 8192))
    # A query of the twelve attention layers, with 64 heads of 128, sees 2,048 keys more on average. Each key
    # costs a product with the key and one with the value: 2 x 128, at 6 FLOPs.
    assert long - short == 6 * 12 * 64 * 2 * 128 * 2048
    states = 36 * (4 * 64 * 128 * 128 + 4 * 24576)
    assert short == 6 * (count_multiplied_weights(model) + 12 * 64 * 2 * 128 * 2048.5 + states)


def test_solar_open_2_has_exactly_the_parameters_of_its_card() -> None:
    model = get("solar-open2-250b").model
    assert count_params(model).total == 250_287_794_944
    # 36 states of 64 x 128 x 128 and 3 x 24,576 inputs in 4 bytes, and keys and values of twelve layers
    assert model.count_state_tokens() == -(-36 * (64 * 128 * 128 + 3 * 24576) * 4 // (12 * 2 * 8 * 128 * 2))
    assert get("qwen3-8b").model.count_state_tokens() == 0


RECIPE_BY_ARCHITECTURE = {get(name).model: name for name in reversed(names())}
"""Architecture -> one recipe of it; the stages of a model share their architecture."""


def build_on_meta(recipe: str) -> tuple[ModelConfig, torch.nn.Module]:
    """Return a model's config, and its trunk as transformers builds it (which has no multi-token prediction
    layers), on meta tensors, which take no memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = get(recipe).model
    config = models.get_family(model.family).to_hf_config(model, "bfloat16", TokenIds())
    with torch.device("meta"):
        return model, AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.tier1_cases(6)
@pytest.mark.parametrize("recipe", sorted(RECIPE_BY_ARCHITECTURE.values()))
def test_total_equals_the_model_class_of_transformers(recipe: str) -> None:
    model, reference = build_on_meta(recipe)
    assert count_params(model).total == sum(p.numel() for p in reference.parameters())


# Which modules of a model an adapter adapts.


@pytest.mark.each("recipe", sorted(r for r in RECIPE_BY_ARCHITECTURE.values() if r.startswith("tiny-")))
def test_adapter_targets_are_all_linear_layers_and_embeddings(recipe: str) -> None:
    model, reference = build_on_meta(recipe)
    hf_named_modules = [(name.rpartition(".")[2], module) for name, module in reference.named_modules()]
    hf_modules = {name for name, module in hf_named_modules
                  if name == "experts" or isinstance(module, torch.nn.Linear | torch.nn.Embedding)}
    # the head of a tied model is its embedding
    hf_modules -= {"lm_head"} if model.tied_embeddings else set()
    assert find_adaptable_modules(model) == hf_modules
    assert resolve_targets(LoraConfig(rank=4), model) == hf_modules - {"lm_head", "embed_tokens"}
    assert not resolve_targets(LoraConfig(rank=0), model)


@pytest.mark.each(("recipe", "targets"), [
    ("tiny-qwen3", ["experts"]), ("tiny-qwen3-moe", ["up_proj"]), ("tiny-qwen3", ["f_a_proj"]),
    ("tiny-solar-open2", ["q_a_proj"]), ("tiny-deepseek-v3", ["k_proj"])])
def test_missing_adapter_targets_are_reported(recipe: str, targets: list[str]) -> None:
    with pytest.raises(SettingsError) as e:
        resolve_targets(LoraConfig(4, targets=("o_proj", *targets)), get(recipe).model)
    assert [(problem.key, problem.rule) for problem in e.value.problems] == [
        ("lora.targets", f"names {target}, which this model lacks") for target in targets]


@pytest.mark.parametrize("recipe", ["tiny-deepseek-v3", "tiny-k-exaone"])
def test_a_prediction_layer_is_not_adapted_nor_are_its_experts(recipe: str) -> None:
    """Training adapts only the trunk: adapters of other layers would be missing in every checkpoint."""
    model = get(recipe).model
    lora = LoraConfig(rank=4, targets=("gate_proj", "up_proj", "down_proj", "experts", "lm_head"))
    assert model.num_mtp_layers == 1
    names = [*find_adapter_places(model, lora),
             *(module.name for module in find_adapted_modules(model, lora))]
    matches = [re.match(r"model\.layers\.(\d+)\.", name) for name in names]
    assert {int(match[1]) for match in matches if match} == set(range(model.num_layers))
    assert not any(name.startswith("mtp.") for name in names)


# Training FLOPs against torch's count in transformers' model classes.

SEQ_LEN = 64


@pytest.mark.parametrize("recipe", ["tiny-solar-open", "tiny-k-exaone", "tiny-qwen3", "tiny-deepseek-v3"])
def test_torch_counts_as_many_in_transformers(recipe: str) -> None:
    """Eager attention multiplies each query with all keys, so the expected count includes masked keys."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    model = replace(get(recipe).model, num_mtp_layers=0)
    hf_config = models.get_family(model.family).to_hf_config(model, "float32", TokenIds())
    config = AutoConfig.for_model(**hf_config)
    config._attn_implementation = config._experts_implementation = "eager"
    reference = AutoModelForCausalLM.from_config(config)
    tokens = torch.arange(SEQ_LEN)[None] % model.vocab_size
    with FlopCounterMode(display=False) as counter:
        reference(input_ids=tokens, labels=tokens).loss.backward()
    latent = model.latent_attention
    value_width = model.head_dim if latent is None else latent.v_head_dim
    # a multiply-add is 2 FLOPs, and the backward pass costs twice the forward pass: 6 in all
    unmasked = 6 * model.num_layers * model.num_heads * (model.head_dim + value_width) * SEQ_LEN
    expected = 6 * count_multiplied_weights(model) + unmasked
    assert counter.get_total_flops() / SEQ_LEN == pytest.approx(expected, rel=2e-3)


@pytest.mark.each(("seq_len", "window"), [(1, 0), (7, 0), (7, 3), (7, 7), (7, 100)])
def test_keys_that_a_query_sees(seq_len: int, window: int) -> None:
    num_keys = [min(i + 1, window or seq_len) for i in range(seq_len)]
    assert compute_mean_keys(seq_len, window) == pytest.approx(sum(num_keys) / seq_len)


def test_windows_limit_keys_and_prediction_layers_have_their_own_head() -> None:
    model = get("k-exaone-236b").model  # 36 sliding layers of 128, 12 global ones, a global prediction layer
    keys = 36 * compute_mean_keys(8192, 128) + 13 * compute_mean_keys(8192, 0)
    assert compute_train_flops_per_token(model, 8192) == pytest.approx(
        6 * count_multiplied_weights(model) + 12 * model.num_heads * model.head_dim * keys)
    norms = 5 * model.hidden_size + 2 * model.head_dim
    trunk_weights = count_multiplied_weights(replace(model, num_mtp_layers=0))
    prediction_weights = count_multiplied_weights(model) - trunk_weights
    assert prediction_weights == count_params(model).mtp - norms + model.vocab_size * model.hidden_size


def test_the_published_rule_of_six_per_active_parameter() -> None:
    """Active parameters without the embedding, which is not multiplied, differ only by norms."""
    model = get("solar-open-102b").model
    active = count_params(model).active - model.vocab_size * model.hidden_size
    assert count_multiplied_weights(model) == pytest.approx(active, rel=1e-4)
