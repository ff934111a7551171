"""A run's training objectives: built-in objectives, and plug-ins from a user's file."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sov.base.documents import KINDS, ROLLOUTS
from megatron_sov.base.documents.records import find_column_problems
from megatron_sov.base.errors import UserError
from megatron_sov.base.plugins.loading import LoadedPlugin
from megatron_sov.base.plugins.registry import Registry, accepts_arguments, check_methods
from megatron_sov.base.settings import parse_arguments
from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.learning import BUILT_IN

Factory = Callable[[Any], Any]
"""`train.objectives.data_batches.ObjectiveContext` -> `train.objectives.objective.Objective`."""
METHODS = {"collect": ("policy", "step"), "prepare": ("batch",), "loss": ("hidden", "head", "batch")}
"""Required method of an objective -> its arguments (`train/objectives/objective.py`)."""
FORMATS = (*KINDS, ROLLOUTS)
"""Source formats that an objective may list in `formats`."""
COMMAND_FORMATS = {"lm": ("text", "chat"), "sft": ("chat", "text"), "preference": ("preference", "chat"),
               "distill": ("text", "chat"), "policy": (ROLLOUTS,)}
"""Built-in objective -> source formats that its command accepts."""
STATE_METHODS = {"state": (), "restore": ("state",)}
"""Methods of objectives with state -> their arguments."""


def _check_plugin(loaded: LoadedPlugin) -> None:
    """Raise `UserError` if a plug-in lacks methods, or has wrong `formats`, `columns` or arguments."""
    check_methods(loaded.value, loaded.reference, "an objective", METHODS)
    if hasattr(loaded.value, "state") or hasattr(loaded.value, "restore"):
        check_methods(loaded.value, loaded.reference, "an objective with a memory", STATE_METHODS)
    formats = getattr(loaded.value, "formats", FORMATS)
    if not isinstance(formats, tuple) or not formats or not set(formats) <= set(FORMATS):
        raise UserError(f"{loaded.reference}: `formats` is {formats!r}, must be a tuple of "
                        f"{', '.join(map(repr, FORMATS))}")
    columns = getattr(loaded.value, "columns", {})
    if not isinstance(columns, Mapping) or not all(hasattr(c, "made_by") for c in columns.values()):
        raise UserError(f"{loaded.reference}: `columns` is {columns!r}, must be a dict of column -> "
                        "NeededColumn(made_by)")
    if problems := find_column_problems(columns):
        raise UserError(f"{loaded.reference}: `columns`: {'; '.join(problems)}")
    if not accepts_arguments(loaded.value, ("context",)):
        raise UserError(f"{loaded.reference}: has the signature "
                        f"{loaded.attribute}{inspect.signature(loaded.value)}; an objective needs "
                        f"{loaded.attribute}(context, *, setting=default, ...)")


OBJECTIVE_PLUGINS: Registry[Callable[..., Any]] = Registry("objective", BUILT_IN, _check_plugin)
"""Objectives from plug-ins."""


def check_objective(config: RunConfig) -> None:
    """Check that the objective exists and that `objective.options` match its arguments. Raises `UserError`:
    unknown objective, or wrong options (all are named)."""
    name, options = config.objective.name, config.objective.options
    if name in BUILT_IN:
        return
    objective_class = OBJECTIVE_PLUGINS.get(name, config.code)
    parse_arguments(objective_class, options, f"objective {name}", prefix="objective.options", num_ours=1)


def check_command(config: RunConfig, command_objective: str) -> None:
    """Check that a command accepts a source format that the run's objective learns from.

    Args:
        config: run settings.
        command_objective: built-in objective of the command.

    Raises:
        UserError: objective and command do not match.
    """
    name = config.objective.name
    if name in BUILT_IN:
        if name != command_objective:
            raise UserError(f"objective.name = {name}: this command trains with {command_objective!r}; "
                            f"leave the setting out, or use `megatron-sov {BUILT_IN[name]}`")
        return
    formats = PluginFactory(name, OBJECTIVE_PLUGINS.get(name), config).formats
    accepted = COMMAND_FORMATS[command_objective]
    if not set(formats) & set(accepted):
        commands = [BUILT_IN[other] for other, found in COMMAND_FORMATS.items() if set(formats) & set(found)]
        raise UserError(f"objective.name = {name}: learns from {', '.join(formats)}, and this command brings "
                        f"{', '.join(accepted)}; use `megatron-sov {'` or `megatron-sov '.join(commands)}`")


def get_factory(config: RunConfig, built_in: Factory) -> Factory:
    """Return the factory of the run's objective.

    Args:
        config: resolved settings.
        built_in: factory of the command's objective, used unless the run names a plug-in.
    """
    name = config.objective.name
    return built_in if name in BUILT_IN else PluginFactory(name, OBJECTIVE_PLUGINS.get(name), config)


@dataclass(frozen=True)
class PluginFactory:
    """Factory for a plug-in objective; `formats` and `columns` are the data that its class requires."""

    name: str
    """`objective.name`."""
    objective_class: Callable[..., Any]
    config: RunConfig
    """Run settings; `objective.options` has the class's keyword arguments."""

    @property
    def formats(self) -> tuple[str, ...]:
        """Source formats, see `train.objectives.objective.get_formats`."""
        return tuple(getattr(self.objective_class, "formats", ("text", "chat")))

    @property
    def columns(self) -> Mapping[str, Any]:
        """Required columns, see `train.objectives.objective.get_columns`. A class that derives from a
        built-in objective may define `columns_by(config)` for columns that depend on settings."""
        columns_by = getattr(self.objective_class, "columns_by", None)
        if columns_by is not None:
            return columns_by(self.config)
        return getattr(self.objective_class, "columns", {})

    def __call__(self, context: Any) -> Any:
        """Create the objective. Raises `UserError`: the objective has no `coefficients`."""
        objective = self.objective_class(context, **self.config.objective.options)
        if not isinstance(getattr(objective, "coefficients", None), Mapping):
            raise UserError(f"objective {self.name}: has no `coefficients`, a dict of term -> its weight in "
                            "the loss; set it in __init__")
        return objective
