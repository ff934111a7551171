"""Recipes: functions that return one `RunConfig`.  `get(name)` finds them; `names()` lists them."""

from __future__ import annotations

from collections.abc import Callable

from megatron_sov.config import RunConfig
from megatron_sov.errors import UserError, nearest
from megatron_sov.recipes.k_exaone import k_exaone_236b
from megatron_sov.recipes.qwen import qwen2_1_5b, qwen3_8b, qwen3_moe_30b
from megatron_sov.recipes.solar_open import solar_open_102b, solar_open_102b_mid
from megatron_sov.recipes.tiny import shrink

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "solar-open-102b": solar_open_102b,
    "solar-open-102b-mid": solar_open_102b_mid,
    "k-exaone-236b": k_exaone_236b,
    "qwen2-1.5b": qwen2_1_5b,
    "qwen3-8b": qwen3_8b,
    "qwen3-moe-30b": qwen3_moe_30b,
    "tiny-solar-open": lambda: shrink(solar_open_102b()),
    "tiny-k-exaone": lambda: shrink(k_exaone_236b()),
    "tiny-qwen2": lambda: shrink(qwen2_1_5b()),
    "tiny-qwen3": lambda: shrink(qwen3_8b()),
    "tiny-qwen3-moe": lambda: shrink(qwen3_moe_30b()),
}


def names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(RECIPES)


def get(name: str) -> RunConfig:
    """Return the recipe of that name.

    Raises:
        UserError: there is none; the message names the nearest and lists all.
    """
    if name not in RECIPES:
        raise UserError(f"recipe {name!r}: does not exist{nearest(name, RECIPES)} (recipes: {', '.join(names())})")
    return RECIPES[name]()
