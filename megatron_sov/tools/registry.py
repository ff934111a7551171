"""Which tool environments there are, by name, and how one is made from settings."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from megatron_sov.errors import UserError, list_problems
from megatron_sov.plugins.loading import Loaded, is_reference, telling
from megatron_sov.plugins.registry import Registry
from megatron_sov.plugins.settings import typed_settings
from megatron_sov.plugins.signatures import check_methods
from megatron_sov.rewards.version import settings_of, version_of
from megatron_sov.tools.environment import Environment

BUILT_IN: dict[str, tuple[str, str, str]] = {
    "calculator": ("megatron_sov.tools.worlds.calculator", "Calculator", "arithmetic, exact where it can be"),
    "retrieval": ("megatron_sov.tools.worlds.retrieval", "Retrieval",
                  "search and read documents of your own, by BM25"),
    "python": ("megatron_sov.tools.worlds.python", "Python", "programs in the sandbox"),
    "booking": ("megatron_sov.tools.worlds.booking", "Booking", "hotel rooms: search, book, change, cancel"),
    "tickets": ("megatron_sov.tools.worlds.tickets", "Tickets", "customers' tickets: find, assign, close"),
    "files": ("megatron_sov.tools.worlds.files", "Files", "a tree of text files: list, read, edit, search"),
    "mcp": ("megatron_sov.tools.worlds.mcp", "Mcp", "the tools of an MCP server that a command starts"),
}
"""Name -> module, class and line in the list of what is built in."""
METHODS: dict[str, tuple[str, ...]] = {"reset": ("task",), "tools": (), "call": ("name", "arguments"),
                                       "score": ("answer",), "snapshot": (), "restore": ("state",)}


def _check(loaded: Loaded) -> None:
    check_methods(loaded.value, loaded.reference, "a tool environment", METHODS)


OWN: Registry[type[Any]] = Registry("tool environment", "megatron_sov.environments", BUILT_IN, _check)
"""Environments that are not built in."""


@dataclass(frozen=True)
class Order:
    """An environment that was asked for: plain values, from which any process makes the same."""

    name: str
    """As `BUILT_IN` or an installed package has it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """As they were given."""
    reference: str = ""
    """FILE.py:NAME or MODULE:NAME of one that a person named; empty: it is known by name."""
    files: Mapping[str, str] = field(default_factory=dict)
    """File -> sha256 of what was loaded by that reference."""


def order(name: str, settings: Mapping[str, Any]) -> Order:
    """Return the order for an environment that a person named, a built-in one or FILE.py:NAME.

    Raises:
        UserError: there is none of that name, or its file cannot be run.
    """
    if name in BUILT_IN:
        return Order(name, settings)
    if is_reference(name):
        own = OWN.load(name)
        code = OWN.code(own)
        assert code is not None, f"{name} was loaded and has no record"
        return Order(own, settings, code.reference, code.files)
    OWN.get(name)
    return Order(name, settings)


def make(asked: Order) -> tuple[Environment, str]:
    """Return the environment of an order, and its version: a hash of its code and settings.

    Raises:
        UserError: a setting does not exist, has the wrong type or breaks a rule; all of them are named. Or
            its file fails, or has changed since it was ordered.
    """
    made, files = _class(asked)
    what = f"tool environment {asked.reference or asked.name}"
    settings = typed_settings(made, asked.settings, what)
    with telling(what):
        environment = made(**settings)
        problems = environment.problems() if hasattr(environment, "problems") else []
    if problems:
        raise UserError(list_problems(what, problems))
    return (cast(Environment, environment),
            version_of(environment, settings_of(environment, settings), files))


def _class(asked: Order) -> tuple[type[Any], dict[str, str] | None]:
    """Return the class of an environment, and the hashes of its files where it is not built in."""
    if asked.name in BUILT_IN:
        module, name, _ = BUILT_IN[asked.name]
        return getattr(importlib.import_module(module), name), None
    if asked.reference:
        OWN.load(asked.reference)
    made = OWN.get(asked.name)
    code = OWN.code(asked.name)
    files = code.files if code else {}
    # a process that starts later would play by other code under the same version
    changed = [name for name, digest in asked.files.items() if files.get(name, digest) != digest]
    if changed:
        raise UserError(f"tool environment {asked.reference}: {changed[0]} has changed since this command "
                        "began; run it again")
    return made, files
