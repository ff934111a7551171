"""What was asked for of one kind of code, as plain values from which any process makes the same."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.base.plugins.loading import is_reference, telling
from megatron_sov.base.plugins.registry import Registry
from megatron_sov.base.settings import SettingsError, read_arguments, rules_of

BuiltIn = Mapping[str, Sequence[str]]
"""Name -> module and class (and what else is known) of what is built in."""


@dataclass(frozen=True)
class PluginOrder:
    """Something that was asked for."""

    name: str
    """As it is built in, or an installed package has it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """As they were given."""
    reference: str = ""
    """FILE.py:NAME or MODULE:NAME of one that a person named; empty: it is known by name."""
    files: Mapping[str, str] = field(default_factory=dict)
    """File -> sha256 of what was loaded by that reference."""


@dataclass(frozen=True)
class BuiltPlugin:
    """What an order stands for."""

    value: Any
    """An object of its class."""
    settings: Mapping[str, Any]
    """What it was made with."""
    files: Mapping[str, str] | None
    """Hashes of its files; None: it is built in."""


def ordered(name: str, settings: Mapping[str, Any], built_in: BuiltIn,
            own: Registry[type[Any]]) -> PluginOrder:
    """Return the order for what a person named, built in or FILE.py:NAME.

    Raises:
        UserError: there is none of that name, two have it, or its file cannot be run.
    """
    if name in built_in:
        own.refuse_namesakes(name)
        return PluginOrder(name, settings)
    if is_reference(name):
        known_as = own.load(name)
        code = own.code(known_as)
        assert code is not None, f"{name} was loaded and has no record"
        return PluginOrder(known_as, settings, code.reference, code.files)
    own.get(name)
    return PluginOrder(name, settings)


def build(asked: PluginOrder, built_in: BuiltIn, own: Registry[type[Any]]) -> BuiltPlugin:
    """Return what an order stands for.

    Raises:
        UserError: a setting does not exist, has the wrong type or breaks a rule (what `problems()` of the
            class says); all of them are named. Or its file fails, or has changed since it was ordered.
    """
    made, files = _class(asked, built_in, own)
    what = f"{own.kind} {asked.reference or asked.name}"
    settings = read_arguments(made, asked.settings, what)
    with telling(what):
        value = made(**settings)
        problems = rules_of(value)
    if problems:
        raise SettingsError(what, problems)
    return BuiltPlugin(value, settings, files)


def _class(asked: PluginOrder, built_in: BuiltIn, own: Registry[type[Any]],
           ) -> tuple[type[Any], Mapping[str, str] | None]:
    """Return a class, and the hashes of its files where it is not built in."""
    if asked.name in built_in:
        module, name = built_in[asked.name][:2]
        return getattr(importlib.import_module(module), name), None
    if asked.reference:
        own.load(asked.reference)
    made = own.get(asked.name)
    code = own.code(asked.name)
    files = code.files if code else {}
    # a process that starts later would go by other code under the same version
    changed = [name for name, digest in asked.files.items() if files.get(name, digest) != digest]
    if changed:
        raise UserError(f"{own.kind} {asked.reference}: {changed[0]} has changed since this command began; "
                        "run it again")
    return made, files
