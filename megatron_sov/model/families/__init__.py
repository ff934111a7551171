"""Model families: one small declaration each.  `get(name)` finds them by transformers' `model_type`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron_sov.base.errors import UserError, nearest
from megatron_sov.base.plugins.loading import LoadedPlugin, PluginCode
from megatron_sov.base.plugins.registry import Registry
from megatron_sov.model.config import ModelConfig
from megatron_sov.model.families.family import Family
from megatron_sov.model.families.supported import (
    DEEPSEEK_V3, EXAONE4, EXAONE_MOE, GEMMA2, GEMMA3, GLM4_MOE, GPT_OSS, HYPERCLOVAX, LLAMA, MIXTRAL, QWEN2,
    QWEN3, QWEN3_MOE, SOLAR_OPEN)

FAMILIES = {family.name: family for family in (
    SOLAR_OPEN, EXAONE_MOE, QWEN2, QWEN3, QWEN3_MOE, LLAMA, MIXTRAL, EXAONE4, HYPERCLOVAX, GLM4_MOE,
    GEMMA2, GEMMA3, GPT_OSS, DEEPSEEK_V3)}
WITHOUT_LAYER = {
    "qwen3_next": "its gated delta net is a layer of Megatron-Core that refuses inference, and takes packed "
                  "rows and context parallelism from 0.19 on, on GPUs alone; a Qwen3-MoE model (family "
                  "'qwen3_moe') can be converted"}
"""Names that people ask for -> why no family has them: what the library's own layers cannot do yet."""


def get(name: str, recorded: Sequence[PluginCode] = ()) -> Family:
    """Return the family of that name: built in, declared by an installed package,
    or named on the command line.

    Args:
        name: as `model.family` and transformers' `model_type` have it.
        recorded: what a config or checkpoint says about its code, for the message alone.

    Raises:
        UserError: there is none; the message names the nearest and lists all, or says what is missing.
    """
    if name in WITHOUT_LAYER and name not in dict(OWN.listing()):
        raise UserError(f"model family {name!r}: is not supported: {WITHOUT_LAYER[name]}")
    return FAMILIES[name] if name in FAMILIES else OWN.get(name, recorded)


def _check(loaded: LoadedPlugin) -> None:
    family = loaded.value
    if not isinstance(family, Family):
        raise UserError(f"{loaded.reference}: is a {type(family).__name__}; a model family is a "
                        "megatron_sov.model.families.family.Family")
    if not family.name.isidentifier():
        raise UserError(f"{loaded.reference}: is called {family.name!r}; "
                        "its name must be transformers' model_type, of letters, digits and _")
    fields = [f.name for f in dataclasses.fields(ModelConfig)]
    unknown = [f"{name!r}{nearest(name, fields)}" for name in (*family.structure, *family.training)
               if name not in fields]
    if unknown:
        raise UserError(f"{loaded.reference}: structure and training hold settings of the model, "
                        f"which has no {', '.join(unknown)}")
    if unsaid := family.unsaid():
        raise UserError(f"{loaded.reference}: says nothing of model.{', model.'.join(unsaid)}, and readers "
                        "of its config.json would take transformers' default; add an item for each to config "
                        "(as KV_HEADS for num_kv_heads), or the field to structure")


OWN: Registry[Family] = Registry("model family", "megatron_sov.families", FAMILIES, _check,
                                 lambda family: family.name)
"""Families that are not built in."""
