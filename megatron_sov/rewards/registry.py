"""Which rewards there are, by name, and how one is made from settings."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_sov.errors import UserError, list_problems
from megatron_sov.plugins.loading import Loaded, is_reference, telling
from megatron_sov.plugins.registry import Registry
from megatron_sov.plugins.settings import typed_settings
from megatron_sov.plugins.signatures import check_methods
from megatron_sov.rewards.version import settings_of, version_of

BUILT_IN: dict[str, tuple[str, str]] = {
    "math": ("megatron_sov.rewards.math_answers", "Math"),
    "stem": ("megatron_sov.rewards.stem", "Stem"),
    "ifeval": ("megatron_sov.rewards.ifeval", "IfEval"),
    "classifier": ("megatron_sov.rewards.classifier", "Classifier"),
    "composed": ("megatron_sov.rewards.composed", "Composed"),
    "judge": ("megatron_sov.rewards.judge", "Judge"),
    "format": ("megatron_sov.rewards.format", "Format"),
    "language": ("megatron_sov.rewards.language", "Language"),
    "length": ("megatron_sov.rewards.length", "Length"),
    "repetition": ("megatron_sov.rewards.repetition", "Repetition"),
    "code": ("megatron_sov.rewards.code", "Code"),
}
"""Name -> module and class of what is built in."""


def _check(loaded: Loaded) -> None:
    check_methods(loaded.value, loaded.reference, "a reward", {"score": ("row",)})


OWN: Registry[type[Any]] = Registry("reward", "megatron_sov.rewards", BUILT_IN, _check)
"""Rewards that are not built in."""


@dataclass(frozen=True)
class Order:
    """A reward that was asked for: plain values, from which any process makes the same."""

    name: str
    """As `BUILT_IN` or an installed package has it."""
    settings: Mapping[str, Any]
    """As they were given."""
    reference: str = ""
    """FILE.py:NAME or MODULE:NAME of one that a person named; empty: it is known by name."""
    files: Mapping[str, str] = field(default_factory=dict)
    """File -> sha256 of what was loaded by that reference."""


@dataclass(frozen=True)
class Made:
    """A reward that is ready."""

    reward: Any
    """A `Reward`; or a `Composed` of the parts."""
    version: str
    """Hash of its code and settings."""
    parts: Mapping[str, tuple[Order, Made]] = field(default_factory=dict)
    """Of a composition: name -> its parts."""


def order(name: str, settings: Mapping[str, Any]) -> Order:
    """Return the order for a reward that a person named, a built-in one or FILE.py:NAME.

    Raises:
        UserError: there is none of that name, or its file cannot be run.
    """
    if name in BUILT_IN:
        return Order(name, settings)
    if is_reference(name):
        own = OWN.load(name)
        code = OWN.code(own)
        return Order(own, settings, code.reference, code.files) if code else Order(own, settings, name)
    OWN.get(name)
    return Order(name, settings)


def make(asked: Order) -> Made:
    """Return the reward of an order.

    Raises:
        UserError: a setting does not exist, has the wrong type or breaks a rule; all of them are named. Or
            its file fails, or has changed since it was ordered.
    """
    reward, settings, files = _built(asked)
    if not hasattr(reward, "orders"):
        return Made(reward, version_of(reward, settings_of(reward, settings), files))
    orders = {name: order(*wanted) for name, wanted in reward.orders().items()}
    parts = {name: (wanted, make(wanted)) for name, wanted in orders.items()}
    versions = {name: part.version for name, (_, part) in parts.items()}
    return Made(reward, version_of(reward, reward.judging(versions), files), parts)


def build(asked: Order) -> Any:
    """Return the reward of an order without its version, for a process that judges; raises as `make` does."""
    return _built(asked)[0]


def _built(asked: Order) -> tuple[Any, dict[str, Any], dict[str, str] | None]:
    """Return a reward, its settings, and the hashes of its files where it is not built in."""
    made, files = _class(asked)
    settings = typed_settings(made, asked.settings, f"reward {asked.name}")
    with telling(f"reward {asked.reference or asked.name}"):
        reward = made(**settings)
        problems = reward.problems() if hasattr(reward, "problems") else []
    if problems:
        raise UserError(list_problems(f"reward {asked.name}", problems))
    return reward, settings, files


def _class(asked: Order) -> tuple[type[Any], dict[str, str] | None]:
    """Return the class of a reward, and the hashes of its files where it is not built in."""
    if asked.name in BUILT_IN:
        module, name = BUILT_IN[asked.name]
        return getattr(importlib.import_module(module), name), None
    if asked.reference:
        OWN.load(asked.reference)
    made = OWN.get(asked.name)
    code = OWN.code(asked.name)
    files = code.files if code else {}
    # a process that starts later would judge by other code under the same version
    changed = [name for name, digest in asked.files.items() if files.get(name, digest) != digest]
    if changed:
        raise UserError(f"reward {asked.reference}: {changed[0]} has changed since this command began; "
                        "run it again")
    return made, files
