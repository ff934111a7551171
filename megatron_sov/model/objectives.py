"""Which objective a run learns by: a built-in one, or one of your own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sov.base.documents import KINDS, ROLLOUTS
from megatron_sov.base.documents.records import column_problems
from megatron_sov.base.errors import UserError
from megatron_sov.base.plugins.loading import LoadedPlugin
from megatron_sov.base.plugins.registry import Registry, accepts_arguments, check_methods
from megatron_sov.base.settings import parse_arguments
from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.learning import BUILT_IN

Factory = Callable[[Any], Any]
"""The run's `train.objectives.data_batches.ObjectiveContext` -> a `train.objectives.objective.Objective`."""
METHODS = {"collect": ("policy", "step"), "prepare": ("batch",), "loss": ("hidden", "head", "batch")}
"""What an objective has to have: method -> what it is given (`train/objectives/objective.py`)."""
FORMATS = (*KINDS, ROLLOUTS)
"""Formats of the sources that one may name in `formats`."""
LEARNS_FROM = {"lm": ("text", "chat"), "sft": ("chat", "text"), "preference": ("preference", "chat"),
               "distill": ("text", "chat"), "policy": (ROLLOUTS,)}
"""Built-in objective -> the formats of the data that its command brings."""
MEMORY = {"state": (), "restore": ("state",)}
"""What one with a memory has besides."""


def _check(loaded: LoadedPlugin) -> None:
    check_methods(loaded.value, loaded.reference, "an objective", METHODS)
    if hasattr(loaded.value, "state") or hasattr(loaded.value, "restore"):
        check_methods(loaded.value, loaded.reference, "an objective with a memory", MEMORY)
    formats = getattr(loaded.value, "formats", FORMATS)
    if not isinstance(formats, tuple) or not formats or not set(formats) <= set(FORMATS):
        raise UserError(f"{loaded.reference}: `formats` is {formats!r}, must be a tuple of "
                        f"{', '.join(map(repr, FORMATS))}")
    columns = getattr(loaded.value, "columns", {})
    if not isinstance(columns, Mapping) or not all(hasattr(c, "made_by") for c in columns.values()):
        raise UserError(f"{loaded.reference}: `columns` is {columns!r}, must be a dict of column -> "
                        "NeededColumn(made_by)")
    if problems := column_problems(columns):
        raise UserError(f"{loaded.reference}: `columns`: {'; '.join(problems)}")
    if not accepts_arguments(loaded.value, ("context",)):
        raise UserError(f"{loaded.reference}: is made by "
                        f"{loaded.attribute}{inspect.signature(loaded.value)}; "
                        f"an objective is made by {loaded.attribute}(context), with its own settings "
                        "behind it, by name and with defaults")


OWN: Registry[Callable[..., Any]] = Registry("objective", BUILT_IN, _check)
"""Objectives that are not built in."""


def check(config: RunConfig) -> None:
    """Check that the objective is known and takes `objective.options`, by the types that it declares.

    Raises:
        UserError: it is not, or does not; every wrong option is named.
    """
    name, options = config.objective.name, config.objective.options
    if name in BUILT_IN:
        return
    made = OWN.get(name, config.code)
    parse_arguments(made, options, f"objective {name}", prefix="objective.options", num_ours=1)


def check_command(config: RunConfig, trains_by: str) -> None:
    """Check that a command brings data of a format that the run's objective learns from.

    Args:
        config: the settings.
        trains_by: the built-in objective of the command.

    Raises:
        UserError: it does not.
    """
    name = config.objective.name
    if name in BUILT_IN:
        if name != trains_by:
            raise UserError(f"objective.name = {name}: this command trains by {trains_by!r}; leave the "
                            f"setting out, or use `megatron-sov {BUILT_IN[name]}`")
        return
    formats, brought = OwnFactory(name, OWN.get(name), config).formats, LEARNS_FROM[trains_by]
    if not set(formats) & set(brought):
        commands = [BUILT_IN[other] for other, found in LEARNS_FROM.items() if set(formats) & set(found)]
        raise UserError(f"objective.name = {name}: learns from {', '.join(formats)}, and this command brings "
                        f"{', '.join(brought)}; use `megatron-sov {'` or `megatron-sov '.join(commands)}`")


def factory(config: RunConfig, built_in: Factory) -> Factory:
    """Return what makes the run's objective.

    Args:
        config: resolved settings.
        built_in: the command's own objective, for runs that name no other.
    """
    name = config.objective.name
    return built_in if name in BUILT_IN else OwnFactory(name, OWN.get(name), config)


@dataclass(frozen=True)
class OwnFactory:
    """Makes an objective that is not built in; what its class says of the data is said here too."""

    name: str
    """As the settings have it."""
    made: Callable[..., Any]
    """The class."""
    config: RunConfig
    """The run's settings, with those of its own in `objective.options`."""

    @property
    def formats(self) -> tuple[str, ...]:
        """See `train.objectives.objective.formats_of`."""
        return tuple(getattr(self.made, "formats", ("text", "chat")))

    @property
    def columns(self) -> Mapping[str, Any]:
        """See `train.objectives.objective.columns_of`; a class that derives from a built-in one may need
        columns by the settings, and has `columns_by(config)`."""
        by = getattr(self.made, "columns_by", None)
        found: Mapping[str, Any] = by(self.config) if by is not None else getattr(self.made, "columns", {})
        return found

    def __call__(self, context: Any) -> Any:
        """Return the objective.

        Raises:
            UserError: it has no coefficients.
        """
        objective = self.made(context, **self.config.objective.options)
        if not isinstance(getattr(objective, "coefficients", None), Mapping):
            raise UserError(f"objective {self.name}: has no `coefficients`, a dict of term -> its weight in "
                            "the loss; set it in __init__")
        return objective
