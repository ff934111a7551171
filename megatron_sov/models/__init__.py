"""Model families: one small declaration each.  `get(name)` finds them by transformers' `model_type`."""

from __future__ import annotations

from megatron_sov.errors import UserError, nearest
from megatron_sov.models import exaone_moe, qwen, solar_open
from megatron_sov.models.family import Family

FAMILIES = {family.name: family for family in (
    solar_open.FAMILY, exaone_moe.FAMILY, qwen.QWEN2, qwen.QWEN3, qwen.QWEN3_MOE)}


def get(name: str) -> Family:
    """Return the family of that name.

    Raises:
        UserError: there is none; the message names the nearest and lists all.
    """
    if name not in FAMILIES:
        raise UserError(f"model family {name!r}: is not supported{nearest(name, FAMILIES)} (families: {', '.join(FAMILIES)})")
    return FAMILIES[name]
