"""Code from outside the framework that a run uses: on record, so that a resumed run is the same run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["recipe", "model family", "objective", "data step", "reward",
               "tool environment", "step"]


@dataclass(frozen=True)
class PluginCode:
    """One piece of code that is not built in, noted by the command that loads it; in a file it is a record,
    and loads nothing."""

    kind: Kind
    """What it is."""
    name: str
    """What the settings call it."""
    reference: str
    """FILE.py:NAME with the file's whole path, or MODULE:NAME, as `--plugin` takes it."""
    package: str = ""
    """Installed package and version that declares it; empty: the command line named the file or module."""
    files: dict[str, str] = field(default_factory=dict)
    """File -> sha256 of what ran: the file itself, then what it imports from its own folder or package."""
