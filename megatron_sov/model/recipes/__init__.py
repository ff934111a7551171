"""Recipes: functions that return one `RunConfig`, each with a table of where its values come from.

`get(name)` finds them; `names()` lists the built-in ones; `sources(name)` returns the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from megatron_sov.base.errors import UserError
from megatron_sov.base.plugins.loading import LoadedPlugin, calling
from megatron_sov.base.plugins.registry import Registry
from megatron_sov.base.plugins.signatures import takes
from megatron_sov.model.config import RunConfig, from_dict
from megatron_sov.model.recipes import (
    hyperclova_omni, k_exaone, open_models, policies, solar_open, typhoon_s, vibethinker)
from megatron_sov.model.recipes.sources import UNCOMPARED, Sources, derive, relabelled
from megatron_sov.model.recipes.tiny import SHRUNK, shrink


@dataclass(frozen=True)
class Recipe:
    """One entry of the list."""

    build: Callable[[], RunConfig]
    """Returns the configuration, whose `recipe` is the entry's name."""
    sources: Sources = field(default_factory=dict)
    """Where its values come from; empty: they are the user's."""


RECIPES: dict[str, Recipe] = {
    "solar-open-102b": Recipe(solar_open.solar_open_102b, solar_open.SOURCES),
    "solar-open-102b-mid": Recipe(solar_open.solar_open_102b_mid, solar_open.MID_SOURCES),
    "solar-open-102b-extend": Recipe(solar_open.solar_open_102b_extend, solar_open.EXTEND_SOURCES),
    "solar-open-102b-dpo": Recipe(solar_open.solar_open_102b_dpo, solar_open.DPO_SOURCES),
    "solar-open-102b-rl": Recipe(policies.solar_open_102b_rl, policies.SNAPPO_SOURCES),
    "k-exaone-236b": Recipe(k_exaone.k_exaone_236b, k_exaone.SOURCES),
    "k-exaone-236b-extend": Recipe(k_exaone.k_exaone_236b_extend, k_exaone.EXTEND_SOURCES),
    "k-exaone-236b-rl": Recipe(policies.k_exaone_236b_rl, policies.AGAPO_SOURCES),
    "hyperclova-omni-8b": Recipe(hyperclova_omni.hyperclova_omni_8b, hyperclova_omni.SOURCES),
    "hyperclova-omni-8b-continuous": Recipe(hyperclova_omni.hyperclova_omni_8b_continuous,
                                            hyperclova_omni.CONTINUOUS_SOURCES),
    "hyperclova-omni-8b-sft": Recipe(hyperclova_omni.hyperclova_omni_8b_sft, hyperclova_omni.SFT_SOURCES),
    "typhoon-s-8b": Recipe(typhoon_s.typhoon_s_8b, typhoon_s.TYPHOON_SOURCES),
    "typhoon-s-8b-opd": Recipe(typhoon_s.typhoon_s_8b_opd, typhoon_s.OPD_SOURCES),
    "typhoon-s-4b-legal": Recipe(policies.typhoon_s_4b_legal, policies.LEGAL_SOURCES),
    "typhoon-s-4b-legal-agent": Recipe(policies.typhoon_s_4b_legal_agent, policies.LEGAL_AGENT_SOURCES),
    "vibethinker-1.5b": Recipe(vibethinker.vibethinker_1_5b, vibethinker.VIBETHINKER_SOURCES),
    "vibethinker-1.5b-math-16k": Recipe(policies.vibethinker_1_5b_math_16k, policies.MATH_16K_SOURCES),
    "vibethinker-1.5b-math-32k": Recipe(policies.vibethinker_1_5b_math_32k, policies.MATH_32K_SOURCES),
    "vibethinker-1.5b-code": Recipe(policies.vibethinker_1_5b_code, policies.CODE_SOURCES),
    "qwen2-1.5b": Recipe(open_models.qwen2_1_5b, open_models.dense_sources("Qwen/Qwen2.5-Math-1.5B")),
    "qwen3-4b": Recipe(open_models.qwen3_4b, open_models.dense_sources("Qwen/Qwen3-4B")),
    "qwen3-4b-2507": Recipe(open_models.qwen3_4b_2507,
                            open_models.dense_sources("Qwen/Qwen3-4B-Instruct-2507")),
    "qwen3-8b": Recipe(open_models.qwen3_8b, open_models.dense_sources("Qwen/Qwen3-8B")),
    "qwen3-moe-30b": Recipe(open_models.qwen3_moe_30b, open_models.moe_sources("Qwen/Qwen3-30B-A3B")),
    "qwen3-30b-a3b-2507": Recipe(open_models.qwen3_30b_a3b_2507,
                                 open_models.moe_sources("Qwen/Qwen3-30B-A3B-Instruct-2507")),
    "llama-3.1-8b": Recipe(open_models.llama_3_1_8b, open_models.dense_sources("meta-llama/Llama-3.1-8B")),
    "mixtral-8x7b": Recipe(open_models.mixtral_8x7b, open_models.MIXTRAL_SOURCES),
    "glm-4.5-air": Recipe(open_models.glm_4_5_air, open_models.GLM_SOURCES),
    "deepseek-v3": Recipe(open_models.deepseek_v3, open_models.DEEPSEEK_SOURCES),
    "kimi-k2": Recipe(open_models.kimi_k2, open_models.KIMI_SOURCES),
    "gemma-3-1b": Recipe(open_models.gemma_3_1b, open_models.dense_sources(
        "google/gemma-3-1b-it, compared with NeMo's Gemma3Config1B")),
    "gemma3-27b": Recipe(open_models.gemma3_27b, open_models.dense_sources(
        "google/gemma-3-27b-it, compared with NeMo's Gemma3Config27B")),
    "gemma2-9b": Recipe(open_models.gemma2_9b, open_models.dense_sources(
        "google/gemma-2-9b, compared with NeMo's Gemma2Config9B")),
    "gpt-oss-20b": Recipe(open_models.gpt_oss_20b, open_models.SOURCES_20B),
    "gpt-oss-120b": Recipe(open_models.gpt_oss_120b, open_models.SOURCES_120B),
    "exaone-4.0-32b": Recipe(open_models.exaone_4_32b, open_models.dense_sources(
        f"LGAI-EXAONE/EXAONE-4.0-32B, {UNCOMPARED}")),
    "exaone-4.0-1.2b": Recipe(open_models.exaone_4_1_2b, open_models.dense_sources(
        "LGAI-EXAONE/EXAONE-4.0-1.2B, compared with Megatron-Bridge's test_exaone4_provider.py")),
    "hyperclovax-14b": Recipe(open_models.hyperclovax_14b, open_models.dense_sources(
        f"naver-hyperclovax/HyperCLOVAX-SEED-Think-14B, {UNCOMPARED}")),
}
TINY = {
    "tiny-solar-open": "solar-open-102b",
    "tiny-solar-open-mid": "solar-open-102b-mid",
    "tiny-solar-open-extend": "solar-open-102b-extend",
    "tiny-solar-open-dpo": "solar-open-102b-dpo",
    "tiny-solar-open-rl": "solar-open-102b-rl",
    "tiny-k-exaone": "k-exaone-236b",
    "tiny-k-exaone-extend": "k-exaone-236b-extend",
    "tiny-k-exaone-rl": "k-exaone-236b-rl",
    "tiny-hyperclova-omni": "hyperclova-omni-8b",
    "tiny-hyperclova-omni-continuous": "hyperclova-omni-8b-continuous",
    "tiny-hyperclova-omni-sft": "hyperclova-omni-8b-sft",
    "tiny-typhoon-s": "typhoon-s-8b",
    "tiny-typhoon-s-opd": "typhoon-s-8b-opd",
    "tiny-typhoon-s-legal": "typhoon-s-4b-legal",
    "tiny-typhoon-s-legal-agent": "typhoon-s-4b-legal-agent",
    "tiny-vibethinker": "vibethinker-1.5b",
    "tiny-vibethinker-math-16k": "vibethinker-1.5b-math-16k",
    "tiny-vibethinker-math-32k": "vibethinker-1.5b-math-32k",
    "tiny-vibethinker-code": "vibethinker-1.5b-code",
    "tiny-qwen2": "qwen2-1.5b",
    "tiny-qwen3-4b": "qwen3-4b",
    "tiny-qwen3-4b-2507": "qwen3-4b-2507",
    "tiny-qwen3": "qwen3-8b",
    "tiny-qwen3-moe": "qwen3-moe-30b",
    "tiny-qwen3-30b-a3b-2507": "qwen3-30b-a3b-2507",
    "tiny-llama": "llama-3.1-8b",
    "tiny-mixtral": "mixtral-8x7b",
    "tiny-glm4-moe": "glm-4.5-air",
    "tiny-deepseek-v3": "deepseek-v3",
    "tiny-kimi-k2": "kimi-k2",
    "tiny-gemma3": "gemma-3-1b",
    "tiny-gemma3-27b": "gemma3-27b",
    "tiny-gemma2": "gemma2-9b",
    "tiny-gpt-oss": "gpt-oss-20b",
    "tiny-gpt-oss-120b": "gpt-oss-120b",
    "tiny-exaone4": "exaone-4.0-32b",
    "tiny-exaone4-1.2b": "exaone-4.0-1.2b",
    "tiny-hyperclovax": "hyperclovax-14b",
}
"""Tiny recipe -> the one whose structure it has."""


def _shrunk(name: str, big: Recipe) -> RunConfig:
    return shrink(name, big.build())


RECIPES |= {name: Recipe(partial(_shrunk, name, RECIPES[big])) for name, big in TINY.items()}


def names() -> list[str]:
    """Return the names of all built-in recipes."""
    return sorted(RECIPES)


def of_family(family: str) -> list[str]:
    """Return the names of the built-in recipes of models of a family."""
    return [name for name in names() if RECIPES[name].build().model.family == family]


def get(name: str) -> RunConfig:
    """Return the recipe of that name: built in, declared by an installed package,
    or named on the command line.

    A tiny one has the big one's whole name too: `tiny-solar-open-102b`.

    Raises:
        UserError: there is none (the message names the nearest and lists all), or it makes no config.
    """
    return _find(name).build()


def sources(name: str) -> Sources:
    """Return where the values of a recipe come from; empty where its author did not say.

    Raises:
        UserError: there is no such recipe; the message names the nearest and lists all.
    """
    recipe = _find(name)
    if big := TINY.get(recipe.build().recipe if name.startswith("tiny-") else ""):
        return derive(RECIPES[big].sources, relabelled(RECIPES[big].build(), recipe.build(), SHRUNK))
    return recipe.sources


def _find(name: str) -> Recipe:
    found = next((tiny for tiny, big in TINY.items() if name == f"tiny-{big}"), name)
    return RECIPES[found] if found in RECIPES else Recipe(partial(_made, name, OWN.get(name)))


def _check(loaded: LoadedPlugin) -> None:
    if not callable(loaded.value) or not takes(loaded.value, ()):
        raise UserError(f"{loaded.reference}: is {loaded.value!r}; a recipe is a function without arguments "
                        "that returns a RunConfig")


OWN: Registry[Callable[[], RunConfig]] = Registry("recipe", "megatron_sov.model.recipes", RECIPES, _check)
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
