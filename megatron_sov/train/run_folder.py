"""A run's folder: what lies where, how it is entered, and when it counts as complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_sov.artifacts import atomic_write, disk_errors, to_json
from megatron_sov.config import RunConfig, from_dict
from megatron_sov.errors import UserError
from megatron_sov.mcore.checkpoint import CHECKPOINTS_OF_A_RUN

CONFIG, COMPLETION = "config.json", "complete.json"
FIXED = ("model", "objective", "optim")
"""Parts of the config that a resumed run must not change."""


class RunFolder:
    """Paths and states of RUN/."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / CHECKPOINTS_OF_A_RUN

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after `step` optimizer steps."""
        return self.checkpoints / f"step-{step}"

    def completion(self) -> dict[str, Any] | None:
        """Return the completion manifest of a stage that is complete, else None."""
        file = self.path / COMPLETION
        return json.loads(file.read_text()) if file.is_file() else None

    def complete(self, content: dict[str, Any]) -> None:
        """Declare the stage complete."""
        atomic_write(self.path / COMPLETION, to_json(content))

    def config(self) -> RunConfig | None:
        """Return the config that the folder was made with, or None for a new folder."""
        file = self.path / CONFIG
        if not file.is_file():
            return None
        try:
            return from_dict(json.loads(file.read_text()))
        except ValueError as e:
            raise UserError(f"{file}: is not valid JSON ({e}); restore it or choose another --run") from None

    def enter(self, config: RunConfig, resume: bool) -> None:
        """Check that a run with `config` may work in this folder; changes nothing.

        Raises:
            UserError: the folder holds a run and `resume` was not asked for, or that run had other settings.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; --run needs a folder")
        earlier = self.config()
        if earlier is None:
            if self.path.is_dir() and any(p.name != "lock.json" for p in self.path.iterdir()):
                raise UserError(f"{self.path}: is not empty and holds no run; choose another --run")
            return
        if not resume:
            raise UserError(f"{self.path}: already holds a run of {earlier.recipe}; pass --resume to continue it, or choose another --run")
        before, now = earlier.to_dict(), config.to_dict()
        for part in FIXED:
            for name, value in before[part].items():
                if now[part][name] != value:
                    raise UserError(f"{self.path}: was started with {part}.{name} = {value}, now it is {now[part][name]}; "
                                    "resume with the same setting, or start a new --run --from its checkpoint")

    def prepare(self, config: RunConfig) -> None:
        """Create the folder and write the resolved config."""
        with disk_errors(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path / CONFIG, to_json(config.to_dict()))
