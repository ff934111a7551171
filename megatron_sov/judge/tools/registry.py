"""Registry: find tool environments by name, build them, and read their tasks."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from megatron_sov.base.documents.reading import read_records
from megatron_sov.base.errors import UserError
from megatron_sov.base.plugins import registry
from megatron_sov.base.plugins.loading import LoadedPlugin
from megatron_sov.base.plugins.registry import PluginRequest, Registry, check_methods
from megatron_sov.judge.rewards.version import collect_settings, compute_version
from megatron_sov.judge.tools.environment import Environment, Task

BUILT_IN: dict[str, tuple[str, str, str]] = {
    "calculator": ("megatron_sov.judge.tools.worlds.calculator", "Calculator",
                    "arithmetic, exact where it can be"),
    "retrieval": ("megatron_sov.judge.tools.worlds.retrieval", "Retrieval",
                  "search and read documents of your own, by BM25"),
    "python": ("megatron_sov.judge.tools.worlds.python", "Python", "programs in the sandbox"),
    "booking": ("megatron_sov.judge.tools.worlds.virtual", "Booking",
                 "a database of hotel rooms: search, book, change, cancel"),
    "files": ("megatron_sov.judge.tools.worlds.files", "Files",
               "a tree of text files: list, read, edit, search"),
    "virtual": ("megatron_sov.judge.tools.worlds.virtual", "Virtual",
                "tables and tools in Python that a task describes"),
    "verifiers": ("megatron_sov.judge.tools.worlds.verifiers", "Verifiers", "an environment of verifiers"),
}
"""Name -> (module, class, description)."""
METHODS: dict[str, tuple[str, ...]] = {"reset": ("task",), "tools": (), "call": ("name", "arguments"),
                                       "score": ("answer",), "snapshot": (), "restore": ("state",)}


def _check_environment_class(loaded: LoadedPlugin) -> None:
    check_methods(loaded.value, loaded.reference, "a tool environment", METHODS)


ENVIRONMENT_PLUGINS: Registry[type[Any]] = Registry("tool environment", BUILT_IN, _check_environment_class)
"""Registered environments besides `BUILT_IN`."""


def request_environment(name: str, settings: Mapping[str, Any]) -> PluginRequest:
    """Return a request for a built-in environment or FILE.py:NAME.

    Raises:
        UserError: the name is unknown, or the file cannot be executed.
    """
    return registry.request_plugin(name, settings, BUILT_IN, ENVIRONMENT_PLUGINS)


def build_environment(request: PluginRequest) -> Environment:
    """Build an environment; raises like `build_versioned_environment`."""
    return cast(Environment, registry.build_plugin(request, BUILT_IN, ENVIRONMENT_PLUGINS).value)


def build_versioned_environment(request: PluginRequest) -> tuple[Environment, str]:
    """Build an environment and compute its version, a hash over code and settings.

    Raises:
        UserError: settings are unknown or invalid (all are named), or the file fails or has changed since the
            request.
    """
    built = registry.build_plugin(request, BUILT_IN, ENVIRONMENT_PLUGINS)
    return (cast(Environment, built.value),
            compute_version(built.value, collect_settings(built.value, built.settings), built.files))


def read_tasks(environment: Environment, name: str, path: Path | None) -> list[Task]:
    """Read tasks from a JSON Lines file, or return the environment's examples.

    Raises:
        UserError: there are no tasks, or a line is not a JSON object.
    """
    if path is None:
        examples: Sequence[Task] = getattr(environment, "EXAMPLES", ())
        if not examples:
            raise UserError(f"tool environment {name}: brings no examples; write tasks into a file in JSON "
                            "lines and name it with --tasks")
        return list(examples)
    tasks: list[Task] = [task for _, task in read_records(path)]
    if not tasks:
        raise UserError(f"--tasks {path}: has no tasks; each line is a JSON object")
    return tasks


def hash_tasks(tasks: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(tasks, sort_keys=True, default=dict).encode()).hexdigest()[:16]
