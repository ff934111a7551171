"""Tasks: of a user's file, or the examples that an environment brings along."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sov.documents.rows import read_objects
from megatron_sov.errors import UserError
from megatron_sov.tools.environment import Environment, Task


def tasks_of(environment: Environment, name: str, path: Path | None) -> list[Task]:
    """Return the tasks of a file in JSON lines, or without one an environment's examples.

    Raises:
        UserError: there are none, or a line is no JSON object.
    """
    if path is None:
        examples: Sequence[Task] = getattr(environment, "EXAMPLES", ())
        if not examples:
            raise UserError(f"tool environment {name}: brings no examples; write tasks into a file in JSON "
                            "lines and name it with --tasks")
        return list(examples)
    found: list[Task] = [task for _, task in read_objects(path, "--tasks")]
    if not found:
        raise UserError(f"--tasks {path}: has no tasks; each line is a JSON object")
    return found


def digest_of(tasks: Sequence[Any]) -> str:
    """Return a hash of tasks."""
    return hashlib.sha256(json.dumps(tasks, sort_keys=True, default=dict).encode()).hexdigest()[:16]
