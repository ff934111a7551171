"""Recipes: functions that return one `RunConfig`.  `get(name)` finds them; `names()` lists the built-in ones."""

from __future__ import annotations

from collections.abc import Callable

from megatron_sov.config import RunConfig, from_dict
from megatron_sov.errors import UserError
from megatron_sov.plugins.loading import Loaded, calling
from megatron_sov.plugins.registry import Registry
from megatron_sov.plugins.signatures import takes
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
    """Return the names of all built-in recipes."""
    return sorted(RECIPES)


def get(name: str) -> RunConfig:
    """Return the recipe of that name: built in, declared by an installed package, or named on the command line.

    Raises:
        UserError: there is none (the message names the nearest and lists all), or it makes no config.
    """
    return RECIPES[name]() if name in RECIPES else _made(name, OWN.get(name))


def _check(loaded: Loaded) -> None:
    if not callable(loaded.value) or not takes(loaded.value, ()):
        raise UserError(f"{loaded.reference}: is {loaded.value!r}; a recipe is a function without arguments that returns a "
                        "RunConfig")


OWN: Registry[Callable[[], RunConfig]] = Registry("recipe", "megatron_sov.recipes", RECIPES, _check)
"""Recipes that are not built in."""


def _made(name: str, recipe: Callable[[], RunConfig]) -> RunConfig:
    """Return what somebody's recipe makes, with every value of the type that its setting has."""
    code = OWN.code(name)
    assert code is not None, name
    config = calling(code.reference, recipe)
    if not isinstance(config, RunConfig):
        raise UserError(f"{code.reference}: returns a {type(config).__name__}; a recipe returns a RunConfig")
    try:
        return from_dict(config.to_dict())
    except (UserError, TypeError, ValueError) as e:
        raise UserError(f"{code.reference}: {e}") from None
