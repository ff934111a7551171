"""Phases that the data brings along: what `sov-data mix --blend` has shared out by the tags of its
sources."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.engine.data.views import LONG, SHORT
from megatron_sov.model.config import PhaseConfig, RunConfig


def with_mixed_phases(config: RunConfig, recipe: RunConfig) -> RunConfig:
    """Return the settings with the blends of the data's own phases.

    A phase takes the blend of the data's phase of its name where its own is empty, or is the recipe's and
    names a source that the data does not have: those names are the recipe's author's.  Tokens, lengths and
    batches stay its own.  Data of several folders has no phases.

    Args:
        config: settings as they are asked for.
        recipe: the same without --set, which nothing here goes before.

    Raises:
        UserError: the data's phases cannot be read.
    """
    if len(config.data.paths) != 1:
        return config
    [path] = config.data.paths
    try:
        content = read_manifest(path, "tokens").content
    except UserError:
        return config  # told where the data is opened, with everything else that is wrong with it
    mixed = _phases_of(path, content)
    known = {source.get("name") for source in content.get("sources", [])}
    of_recipe = {phase.name: phase.blend for phase in recipe.data.phases}

    def is_open(phase: PhaseConfig) -> bool:
        return not phase.blend or (phase.blend == of_recipe.get(phase.name) and not _names(phase) <= known)

    phases = tuple(dataclasses.replace(phase, blend=mixed[phase.name])
                   if phase.name in mixed and is_open(phase) else phase for phase in config.data.phases)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, phases=phases))


def _phases_of(path: str, content: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return phase -> source -> share."""
    try:
        return {str(phase["name"]): {str(name): float(share) for name, share in phase["blend"].items()}
                for phase in content.get("phases", [])}
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path}: its phases cannot be read ({e!r}); mix the data again") from None


def _names(phase: PhaseConfig) -> set[str]:
    """Return the sources that a blend names, without the lengths of their documents."""
    return {next((name.rpartition(mark)[0] for mark in (LONG, SHORT) if mark in name), name)
            for name in phase.blend}
