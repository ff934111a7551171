"""Parameter counts against the published figures and against transformers' own model classes."""

from __future__ import annotations

import re

import pytest

from megatron_sov import models
from megatron_sov.config import LoraConfig
from megatron_sov.models.adapters import adapted_modules, places
from megatron_sov.models.count import num_params
from megatron_sov.models.family import TokenIds
from megatron_sov.recipes import get, names


@pytest.mark.parametrize(("recipe", "total_b", "active_b", "mtp_b"), [
    ("solar-open-102b", 102.65, 12.05, 0.0),
    ("k-exaone-236b", 236.57, 23.67, 0.53),
    ("qwen2-1.5b", 1.54, 1.54, 0.0),
    ("qwen3-8b", 8.19, 8.19, 0.0),
    ("qwen3-moe-30b", 30.53, 3.35, 0.0),
    ("qwen3-4b", 4.02, 4.02, 0.0),
    ("qwen3-4b-2507", 4.02, 4.02, 0.0),
    ("qwen3-30b-a3b-2507", 30.53, 3.35, 0.0),
    ("typhoon-s-8b", 8.19, 8.19, 0.0),
    ("vibethinker-1.5b", 1.54, 1.54, 0.0),
    ("exaone-4.0-32b", 32.0, 32.0, 0.0),
    ("exaone-4.0-1.2b", 1.28, 1.28, 0.0),
    ("hyperclovax-14b", 14.75, 14.75, 0.0),
    ("gemma-3-1b", 1.0, 1.0, 0.0),
    ("gemma3-27b", 27.01, 27.01, 0.0),
    ("gemma2-9b", 9.24, 9.24, 0.0),
    ("gpt-oss-20b", 20.91, 4.19, 0.0),
    ("gpt-oss-120b", 116.83, 5.71, 0.0),
    ("glm-4.5-air", 106.85, 13.42, 2.38),
    ("deepseek-v3", 671.03, 37.55, 11.61),
    ("kimi-k2", 1026.41, 32.86, 0.0),
])
def test_published_figures(recipe: str, total_b: float, active_b: float, mtp_b: float) -> None:
    count = num_params(get(recipe).model)
    assert [round(n / 1e9, 2) for n in (count.total, count.active, count.mtp)] == [total_b, active_b, mtp_b]


def test_the_4b_without_its_embeddings_as_published() -> None:
    model = get("qwen3-4b-2507").model
    assert round((num_params(model).total - model.vocab_size * model.hidden_size) / 1e9, 1) == 3.6


ONE_OF_EACH = {get(name).model: name for name in reversed(names())}
"""Architecture -> a recipe that has it: stages of one model share theirs."""


@pytest.mark.parametrize("recipe", sorted(ONE_OF_EACH.values()))
def test_total_equals_the_model_class_of_transformers(recipe: str) -> None:
    """transformers builds the trunk (it has no multi-token prediction layers) on meta tensors,
    which take no memory."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    model = get(recipe).model
    config = models.get(model.family).to_hf_config(model, "bfloat16", TokenIds())
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert num_params(model).total == sum(p.numel() for p in reference.parameters())


# Which modules of a model an adapter adapts.


@pytest.mark.parametrize("recipe", ["tiny-glm4-moe", "tiny-deepseek-v3", "tiny-k-exaone"])
def test_a_prediction_layer_is_not_adapted_nor_are_its_experts(recipe: str) -> None:
    """Training adapts the trunk: what else stood in the list would be missed in every checkpoint."""
    model = get(recipe).model
    lora = LoraConfig(rank=4, targets=("gate_proj", "up_proj", "down_proj", "experts", "lm_head"))
    assert model.num_mtp_layers == 1
    names = [*places(model, lora), *(of.name for of in adapted_modules(model, lora))]
    numbers = {int(found[1]) for name in names if (found := re.match(r"model\.layers\.(\d+)\.", name))}
    assert numbers == set(range(model.num_layers))
    assert not any(name.startswith("mtp.") for name in names)
