"""Settings of steps: paths that start at the pipeline file, and plain values to write down."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter


def resolved(settings: Any, folder: Path) -> Any:
    """Return settings whose relative paths start at a folder instead of at the current one."""
    if isinstance(settings, Path):
        return settings if settings == Path() else folder / settings
    if isinstance(settings, (tuple, list)):
        return type(settings)(resolved(value, folder) for value in settings)
    if isinstance(settings, dict):
        return {key: resolved(value, folder) for key, value in settings.items()}
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        changed = {f.name: resolved(getattr(settings, f.name), folder)
                   for f in dataclasses.fields(settings) if f.init}
        return dataclasses.replace(settings, **changed)
    return settings


def plain(settings: Any) -> Any:
    """Return settings as JSON values, defaults filled in."""
    return json.loads(TypeAdapter(type(settings)).dump_json(settings))
