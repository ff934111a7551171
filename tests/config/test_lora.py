"""Settings of low-rank adaptation: what they adapt in which model, and everything that is wrong at once."""

from __future__ import annotations

import pytest

from megatron_sov import recipes
from megatron_sov.config import RunConfig, apply_settings, from_dict


def config(recipe: str, *settings: str) -> RunConfig:
    return apply_settings(recipes.get(recipe), ["lora.rank=4", *settings])


@pytest.mark.parametrize(("recipe", "extra"), [
    ("tiny-qwen3", {"gate_proj", "up_proj", "down_proj"}), ("tiny-qwen3-moe", {"experts"}),
    ("tiny-solar-open", {"gate_proj", "up_proj", "down_proj", "experts"})])
def test_all_linear_is_what_the_model_has_without_its_head(recipe: str, extra: set[str]) -> None:
    found = config(recipe)
    assert found.problems() == []
    assert found.lora.adapted(found.model) == {"q_proj", "k_proj", "v_proj", "o_proj", *extra}
    assert not apply_settings(found, ["lora.rank=0"]).lora.adapted(found.model)


def test_settings_come_back_from_json() -> None:
    found = config("tiny-solar-open", 'lora.targets=["q_proj", "experts"]')
    assert from_dict(found.to_dict()) == found
