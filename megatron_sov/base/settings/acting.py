"""Conditions under which settings act, declared by the classes of settings, and the search for settings that
were asked for and cannot act.

A class declares `ACTS_WHEN`: names of fields, separated by spaces, -> a condition; "" stands for all fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

from megatron_sov.base.settings.problem import ProblemCode, SettingsProblem, show
from megatron_sov.base.settings.reading import fields_of

Facts = Mapping[str, Any]
"""What is known of a run beside its settings, e.g. "command" and "--data" -> value."""
NO_FACTS: Facts = {}
FACTS = ("command", "--data", "--validation")
"""Deciding keys that are no settings; a condition on one that is not known holds."""


@dataclasses.dataclass(frozen=True)
class Unmet:
    """A condition that fails."""

    deciders: Mapping[str, Any]
    """Deciding settings -> their values."""
    text: str
    """When the setting would act."""
    way_out: str


@dataclasses.dataclass(frozen=True)
class When:
    """A condition on one deciding setting."""

    key: str
    """The deciding setting from the root; ".rank" names a field of the class that declares the condition, and
    "*" any item of a list, of which one has to fulfil the condition."""
    holds: Callable[[Any], bool]
    words: str
    """The condition as the sentence goes on behind the key: "is set"."""
    way_out: str = ""
    """What to do if it fails; empty: change the deciding setting."""

    def find_unmet(self, root: Any, owner: str, facts: Facts) -> Unmet | None:
        """Return how the condition fails; None: it holds.

        Args:
            root: all settings.
            owner: place of the settings that declare the condition.
            facts: of the run.
        """
        key = _absolute(self.key, owner)
        if key in FACTS:
            values = [facts[key]] if key in facts else []
            fails = bool(values) and not self.holds(facts[key])
        else:
            values = list(_values_at(root, key.split(".")))
            fails = not any(map(self.holds, values))
        if not fails:
            return None
        shown = _shown(key)
        return Unmet({shown: values if "*" in key else values[0]}, self.text(owner),
                     self.way_out or f"leave it out, or change {shown}")

    def text(self, owner: str) -> str:
        """Return the condition as a clause."""
        return f"{_shown(_absolute(self.key, owner))} {self.words}"


class AnyOf:
    """Conditions of which one has to hold."""

    def __init__(self, *parts: Condition) -> None:
        self.parts = parts

    def find_unmet(self, root: Any, owner: str, facts: Facts) -> Unmet | None:
        """Return how all parts fail; see `When.find_unmet`."""
        found = [part.find_unmet(root, owner, facts) for part in self.parts]
        failed = [unmet for unmet in found if unmet is not None]
        if len(failed) < len(found):
            return None
        deciders = {key: value for unmet in failed for key, value in unmet.deciders.items()}
        return Unmet(deciders, self.text(owner), failed[0].way_out)

    def text(self, owner: str) -> str:
        """Return the conditions as a clause."""
        return ", or ".join(part.text(owner) for part in self.parts)


class AllOf:
    """Conditions that all have to hold."""

    def __init__(self, *parts: Condition) -> None:
        self.parts = parts

    def find_unmet(self, root: Any, owner: str, facts: Facts) -> Unmet | None:
        """Return how the first part that fails does; see `When.find_unmet`."""
        return next(filter(None, (part.find_unmet(root, owner, facts) for part in self.parts)), None)

    def text(self, owner: str) -> str:
        """Return the conditions as a clause."""
        return " and ".join(part.text(owner) for part in self.parts)


Condition = When | AnyOf | AllOf
ActsWhen = Mapping[str, Condition]
"""Names of fields, separated by spaces, -> when they act; "": all fields of the class."""


def is_set(key: str) -> When:
    """Return the condition that a setting is neither 0, false, null nor empty."""
    return When(key, bool, "is set")


def is_unset(key: str) -> When:
    """Return the condition that a setting is 0, false, null or empty."""
    return When(key, lambda value: not value, "is not set")


def is_one_of(key: str, *values: Any) -> When:
    """Return the condition that a setting has one of these values."""
    return When(key, lambda value: value in values, f"is {_listed(values)}")


def is_none_of(key: str, *values: Any) -> When:
    """Return the condition that a setting has another value than these."""
    return When(key, lambda value: value not in values, f"is not {_listed(values)}")


def find_inert(settings: Any, asked: Iterable[str], facts: Facts = NO_FACTS
              ) -> list[SettingsProblem]:
    """Return a problem for each setting that was asked for and cannot act; it names the deciding settings.

    Args:
        settings: resolved, with the values that were asked for.
        asked: keys with dots; one may name a whole group, whose changed fields are then looked at.
        facts: of the run, see `FACTS`.
    """
    leaves = dict.fromkeys(leaf for key in asked for leaf in _leaves_at(settings, key))
    return list(filter(None, (_inert(settings, leaf, facts) for leaf in leaves)))


def _inert(settings: Any, key: str, facts: Facts) -> SettingsProblem | None:
    for owner, condition in conditions_of(settings, key):
        unmet = condition.find_unmet(settings, owner, facts)
        if unmet is not None:
            deciders = " and ".join(f"{name} = {show(value)}" for name, value in unmet.deciders.items()
                                    if not _holds_settings(value))
            return SettingsProblem(ProblemCode.INERT, key, f"has no effect with {deciders}: it acts when "
                                   f"{unmet.text}", value_at(settings, key), unmet.way_out)
    return None


def _holds_settings(value: Any) -> bool:
    return isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value))


def conditions_of(settings: Any, key: str) -> Iterator[tuple[str, Condition]]:
    """Yield each condition of a setting, those of the groups around it first, with the place of the settings
    that declare it."""
    place: list[str] = []
    node = settings
    for part in key.split("."):
        for names, condition in getattr(type(node), "ACTS_WHEN", {}).items():
            if not names or part in names.split():
                yield ".".join(place), condition
        place.append(part)
        node = _below(node, part)


def _leaves_at(settings: Any, key: str) -> Iterator[str]:
    """Yield the settings that a key stands for: itself, or, of a group, the fields that do not have their
    default."""
    [value] = _values_at(settings, key.split("."))
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            makes = field.default_factory
            default = field.default if makes is dataclasses.MISSING else makes()
            if field.name in fields_of(cast(Any, type(value))) and getattr(value, field.name) != default:
                yield from _leaves_at(settings, f"{key}.{field.name}")
    elif _holds_settings(value):
        for i in range(len(value)):
            yield from _leaves_at(settings, f"{key}.{i}")
    else:
        yield key


def value_at(settings: Any, key: str) -> Any:
    """Return the value of a setting; None below a group that is off or absent."""
    return next(_values_at(settings, key.split(".")), None)


def _values_at(node: Any, parts: list[str]) -> Iterator[Any]:
    for i, part in enumerate(parts):
        if part == "*":
            for item in node:
                yield from _values_at(item, parts[i + 1:])
            return
        node = _below(node, part)
    yield node


def _below(node: Any, part: str) -> Any:
    """Return a field, an item or a value of a table; None where there is none, as below a group that is
    off."""
    if isinstance(node, Mapping):
        return node.get(part)
    if isinstance(node, tuple):
        return node[int(part)] if part.isdecimal() and int(part) < len(node) else None
    return getattr(node, part, None)


def _absolute(key: str, owner: str) -> str:
    return f"{owner}{key}".removeprefix(".") if key.startswith(".") else key


def _shown(key: str) -> str:
    # `policy.parts.kl` is `policy.kl` as the method fills it in
    return key.replace(".parts.", ".")


def _listed(values: tuple[Any, ...]) -> str:
    words = [value if isinstance(value, str) else show(value) for value in values]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
