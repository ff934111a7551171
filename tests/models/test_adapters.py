"""Which modules of a model an adapter adapts."""

from __future__ import annotations

import re

import pytest

from megatron_sov.config import LoraConfig
from megatron_sov.models.adapters import adapted_modules, places
from megatron_sov.recipes import get


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
