"""The documented Python interface: what stands in `__all__`, and on docs/api.md.

Names are found on first use, so that `import megatron_sov` imports neither torch nor megatron.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_sov import convert, recipes
    from megatron_sov.api import generate_text, pretrain
    from megatron_sov.config import RunConfig, apply_settings, from_dict
    from megatron_sov.data.columns import NeededColumn
    from megatron_sov.documents import Document, LeftOut
    from megatron_sov.errors import UserError
    from megatron_sov.models.family import Family
    from megatron_sov.obs.events import read_events
    from megatron_sov.train.lm import LanguageModelling
    from megatron_sov.train.objective import GlobalBatch, LossSums, Objective, per_source, with_denominators
    from megatron_sov.version import __version__

__all__ = [
    "Document", "Family", "GlobalBatch", "LanguageModelling", "LeftOut", "LossSums", "NeededColumn",
    "Objective", "RunConfig", "UserError", "__version__", "apply_settings", "convert", "from_dict",
    "generate_text", "per_source", "pretrain", "read_events", "recipes", "with_denominators",
]
_PLACES = {
    "__version__": "version", "UserError": "errors", "RunConfig": "config", "apply_settings": "config",
    "from_dict": "config", "Family": "models.family", "Document": "documents", "LeftOut": "documents",
    "NeededColumn": "data.columns", "read_events": "obs.events", "pretrain": "api", "generate_text": "api",
}
_ON_MEGATRON = {
    "LanguageModelling": "train.lm", "GlobalBatch": "train.objective", "LossSums": "train.objective",
    "Objective": "train.objective", "per_source": "train.objective", "with_denominators": "train.objective",
}
"""Names whose modules import megatron, which has to find the process prepared for it."""
_ROOMS = ("convert", "recipes")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _ON_MEGATRON:
        importlib.import_module(f"{__name__}.mcore.parallel.cpu_shims").prepare_megatron()
    place = _PLACES.get(name) or _ON_MEGATRON.get(name)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{place}"), name)


def __dir__() -> list[str]:
    return __all__
