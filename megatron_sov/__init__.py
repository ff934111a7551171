"""Documented Python interface: the names in `__all__`, see docs/api.md.

Names are imported on first use, so that `import megatron_sov` imports neither torch nor megatron.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_sov import convert
    from megatron_sov.api import (
        distill, evaluate, generate, pack, prefer, pretrain, read_meters, read_rounds, rl_run, sft,
        train_tokenizer)
    from megatron_sov.base.documents import Document, LeftOut
    from megatron_sov.base.errors import UserError
    from megatron_sov.model import recipes
    from megatron_sov.model.config import RunConfig, apply_settings, from_dict
    from megatron_sov.model.families.family import Family
    from megatron_sov.post.policy import PolicyLearning
    from megatron_sov.post.preference import PairLearning, PairLearningWithReference
    from megatron_sov.post.sft import SupervisedFineTuning
    from megatron_sov.runs.obs.events import read_events
    from megatron_sov.runs.obs.meters import Meter
    from megatron_sov.train.data.requirements import NeededColumn
    from megatron_sov.train.objectives.data_objective import LanguageModelling
    from megatron_sov.train.objectives.objective import (
        GlobalBatch, LossSums, Objective, per_source, with_denominators)
    from megatron_sov.version import __version__

__all__ = [
    "Document", "Family", "GlobalBatch", "LanguageModelling", "LeftOut", "LossSums", "Meter",
    "NeededColumn", "Objective", "PairLearning", "PairLearningWithReference", "PolicyLearning",
    "RunConfig", "SupervisedFineTuning", "UserError", "__version__", "apply_settings", "convert",
    "distill", "evaluate", "from_dict", "generate", "pack", "per_source", "prefer", "pretrain",
    "read_events", "read_meters", "read_rounds", "recipes", "rl_run", "sft", "train_tokenizer",
    "with_denominators"]
_MODULES = {
    "__version__": "version", "UserError": "base.errors", "RunConfig": "model.config",
    "apply_settings": "model.config", "from_dict": "model.config", "Family": "model.families.family",
    "Document": "base.documents", "LeftOut": "base.documents", "NeededColumn": "train.data.requirements",
    "read_events": "runs.obs.events", "Meter": "runs.obs.meters",
    **dict.fromkeys(("distill", "evaluate", "generate", "pack", "prefer", "pretrain", "read_meters",
                     "read_rounds", "rl_run", "sft", "train_tokenizer"), "api"),
    "LanguageModelling": "train.objectives.data_objective", "SupervisedFineTuning": "post.sft",
    "PairLearning": "post.preference", "PairLearningWithReference": "post.preference",
    "PolicyLearning": "post.policy",
    **dict.fromkeys(("GlobalBatch", "LossSums", "Objective", "per_source", "with_denominators"),
                    "train.objectives.objective")}
_FOLDERS = {"convert": "convert", "recipes": "model.recipes"}


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return importlib.import_module(f"{__name__}.{_FOLDERS[name]}")
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return __all__
