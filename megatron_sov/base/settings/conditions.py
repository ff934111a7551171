"""Conditions under which settings have an effect, and the search for settings without effect.

A settings class declares `ACTS_WHEN`: space-separated field names -> condition; "" stands for all fields.
For example, `"min_lr schedule": is_set(".lr")` in the class of a phase makes `data.phases.0.min_lr` a problem
while `data.phases.0.lr` is not set.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

from megatron_sov.base.settings.problem import ProblemCode, SettingsProblem, format_setting
from megatron_sov.base.settings.reading import list_fields

Facts = Mapping[str, Any]
"""Run properties in addition to settings, for example "command" and "--data" -> value."""
NO_FACTS: Facts = {}
DECIDING_FACTS = ("command", "--data", "--validation")
"""Keys of `Facts` that a condition may name in place of a setting. Without the fact, the condition holds."""


@dataclasses.dataclass(frozen=True)
class UnmetCondition:
    """A condition that does not hold."""

    deciders: Mapping[str, Any]
    """Deciding settings -> their values."""
    text: str
    """The condition as a clause."""
    way_out: str
    """Fix, as the end of the error message."""


@dataclasses.dataclass(frozen=True)
class When:
    """A condition on a deciding setting."""

    key: str
    """Full dotted key of the deciding setting; ".rank" is a field in the class that declares the condition,
    and "*" stands for the items of a list, of which at least one must fulfil the condition."""
    holds: Callable[[Any], bool]
    """Whether a value of the deciding setting fulfils the condition."""
    words: str
    """The condition after the key in a sentence: "is set"."""
    way_out: str = ""
    """Fix, as the end of the error message; "": leave the setting out, or change the deciding setting."""

    def find_unmet(self, root: Any, owner: str, facts: Facts) -> UnmetCondition | None:
        """Return the violated condition, declared by the settings at the key `owner`; None: it holds."""
        key = _resolve_key(self.key, owner)
        if key in DECIDING_FACTS:
            if key not in facts:
                return None
            values = [facts[key]]
        else:
            values = list(_iter_values(root, key.split(".")))
        if any(map(self.holds, values)):
            return None
        public_key = _get_public_key(key)
        way_out = self.way_out or f"leave it out, or change {public_key}"
        return UnmetCondition({public_key: values if "*" in key else values[0]}, self.text(owner), way_out)

    def text(self, owner: str) -> str:
        """Format the condition as a clause."""
        return f"{_get_public_key(_resolve_key(self.key, owner))} {self.words}"


class AnyOf:
    """At least one condition must hold (`When`, `AllOf`)."""

    def __init__(self, *parts: "Condition") -> None:
        self.parts = parts

    def find_unmet(self, root: Any, owner: str, facts: Facts) -> UnmetCondition | None:
        """Join the violated parts if every part is violated; see `When.find_unmet`."""
        results = [part.find_unmet(root, owner, facts) for part in self.parts]
        failed = [unmet for unmet in results if unmet is not None]
        if len(failed) < len(results):
            return None
        deciders = {key: value for unmet in failed for key, value in unmet.deciders.items()}
        return UnmetCondition(deciders, self.text(owner), failed[0].way_out)

    def text(self, owner: str) -> str:
        """Format the conditions as a clause."""
        return ", or ".join(part.text(owner) for part in self.parts)


class AllOf:
    """Every condition must hold (`When`, `AnyOf`)."""

    def __init__(self, *parts: "Condition") -> None:
        self.parts = parts

    def find_unmet(self, root: Any, owner: str, facts: Facts) -> UnmetCondition | None:
        """Return the first violated part; see `When.find_unmet`."""
        results = (part.find_unmet(root, owner, facts) for part in self.parts)
        return next((unmet for unmet in results if unmet is not None), None)

    def text(self, owner: str) -> str:
        """Format the conditions as a clause."""
        return " and ".join(part.text(owner) for part in self.parts)


Condition = When | AnyOf | AllOf
ActsWhen = Mapping[str, Condition]
"""Space-separated field names -> condition for the fields' effect; "": every field of the class."""


def is_set(key: str) -> When:
    """Require a setting to be neither 0, false, null nor empty."""
    return When(key, bool, "is set")


def is_unset(key: str) -> When:
    """Require a setting to be 0, false, null or empty."""
    return When(key, lambda value: not value, "is not set")


def is_one_of(key: str, *values: Any) -> When:
    """Require a setting to equal a value in `values`."""
    return When(key, lambda value: value in values, f"is {_join_values(values)}")


def is_none_of(key: str, *values: Any) -> When:
    """Require a setting to differ from every value in `values`."""
    return When(key, lambda value: value not in values, f"is not {_join_values(values)}")


def find_inert_settings(settings: Any, requested_keys: Iterable[str],
                        facts: Facts = NO_FACTS) -> list[SettingsProblem]:
    """Return a problem per requested setting of the resolved `settings` without effect, naming the deciding
    settings; the key of a group stands for its changed fields."""
    # a dict drops repeated keys and keeps the order
    leaves = dict.fromkeys(leaf for key in requested_keys for leaf in _iter_changed_keys(settings, key))
    problems = [_find_inert_problem(settings, leaf, facts) for leaf in leaves]
    return [problem for problem in problems if problem is not None]


def _find_inert_problem(settings: Any, key: str, facts: Facts) -> SettingsProblem | None:
    for owner, condition in iter_conditions(settings, key):
        unmet = condition.find_unmet(settings, owner, facts)
        if unmet is not None:
            # without lists of settings groups, e.g. extend.stages: too long for a sentence
            deciders = " and ".join(f"{name} = {format_setting(value)}"
                                    for name, value in unmet.deciders.items() if not _holds_settings(value))
            return SettingsProblem(ProblemCode.INERT, key, f"has no effect with {deciders}: it acts when "
                                   f"{unmet.text}", get_setting(settings, key), unmet.way_out)
    return None


def _holds_settings(value: Any) -> bool:
    return isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value))


def iter_conditions(settings: Any, key: str) -> Iterator[tuple[str, Condition]]:
    """Yield (dotted key of the declaring settings, condition) for a setting; outer groups come first."""
    owner: list[str] = []
    node = settings
    for part in key.split("."):
        for names, condition in getattr(type(node), "ACTS_WHEN", {}).items():
            if not names or part in names.split():
                yield ".".join(owner), condition
        owner.append(part)
        node = _get_child(node, part)


def _iter_changed_keys(settings: Any, key: str) -> Iterator[str]:
    """Yield dotted keys: `key` itself, or for a group the fields that differ from the defaults."""
    [value] = _iter_values(settings, key.split("."))  # one value: the key has no "*"
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            if field.name in list_fields(cast(Any, type(value))) and getattr(value, field.name) != default:
                yield from _iter_changed_keys(settings, f"{key}.{field.name}")
    elif _holds_settings(value):
        for i in range(len(value)):
            yield from _iter_changed_keys(settings, f"{key}.{i}")
    else:
        yield key


def get_setting(settings: Any, key: str) -> Any:
    """Return a setting's value by dotted key; None inside a disabled or missing group."""
    return next(_iter_values(settings, key.split(".")), None)


def _iter_values(node: Any, parts: list[str]) -> Iterator[Any]:
    for i, part in enumerate(parts):
        if part == "*":
            for item in node:
                yield from _iter_values(item, parts[i + 1:])
            return
        node = _get_child(node, part)
    yield node


def _get_child(node: Any, part: str) -> Any:
    """Return a field, a list item or a mapping's value; None if missing or inside a disabled group."""
    if isinstance(node, Mapping):
        return node.get(part)
    if isinstance(node, tuple):
        return node[int(part)] if part.isdecimal() and int(part) < len(node) else None
    return getattr(node, part, None)


def _resolve_key(key: str, owner: str) -> str:
    return f"{owner}{key}".removeprefix(".") if key.startswith(".") else key


def _get_public_key(key: str) -> str:
    """Return the key that users set: `policy.kl` sets `policy.parts.kl` for the method in use."""
    return key.replace(".parts.", ".")


def _join_values(values: tuple[Any, ...]) -> str:
    *others, last = (value if isinstance(value, str) else format_setting(value) for value in values)
    return f"{', '.join(others)} or {last}" if others else last
