"""Where the values of a recipe come from: one table per recipe, setting -> source."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from megatron_sov.model.config import RunConfig

Kind = Literal["published", "config.json", "ours", "yours", "default"]


@dataclass(frozen=True)
class ValueSource:
    """Where a value comes from."""

    kind: Kind
    """published: a paper or report, or its authors' code; config.json: the released Hugging Face config;
    ours: our choice; yours: set by --config or --set, or by a recipe without table; default: not set."""
    where: str = ""
    """Reference and section; the model whose config.json it is; a word why."""


Sources = dict[str, ValueSource]
"""Dotted setting -> source; a key may have * for any text, and the last one that matches holds."""
DEFAULT, YOURS = ValueSource("default"), ValueSource("yours")
UNCOMPARED = "as remembered: not compared with the file"
"""Behind the name of a model whose config.json was not at hand, and no other source of its sizes."""


@dataclass(frozen=True)
class Setting:
    """One value of a recipe, with its source."""

    key: str
    """Dotted name, as `--set` takes it."""
    value: Any
    """A number, a text, a truth value, null, or a list or table without settings of its own."""
    source: ValueSource
    """Where it comes from."""


def published(where: str) -> ValueSource:
    """Return the source of a value that a paper, a report or its authors' code gives."""
    return ValueSource("published", where)


def config_json(model: str) -> ValueSource:
    """Return the source of a value that a released model's config.json has, or its class implies."""
    return ValueSource("config.json", model)


def ours(why: str) -> ValueSource:
    """Return the source of a value that nobody published: our choice, with a word why."""
    return ValueSource("ours", why)


def derive(sources: Sources, changed: Sources) -> Sources:
    """Return the table of a recipe that goes back to another one; what `changed` says wins."""
    return {key: source for key, source in sources.items() if key not in changed} | changed


def settings(config: RunConfig, sources: Sources) -> list[Setting]:
    """Return every value with its source; without an entry that is `yours`, or `default` if not set."""
    return [
        Setting(key, value, sources.get(_entry_for(key, sources)) or (DEFAULT if value == default else YOURS))
        for key, value, default in _leaves("", config, dataclasses.MISSING)]


def in_effect(config: RunConfig, sources: Sources) -> Sources:
    """Return the entries that name a value; a derived recipe may have taken over idle ones."""
    used = {_entry_for(key, sources) for key, _, _ in _leaves("", config, None)}
    return {key: source for key, source in sources.items() if key in used}


def relabelled(before: RunConfig, after: RunConfig, source: ValueSource) -> Sources:
    """Return a table that gives `source` to every value of `after` that `before` does not have."""
    had = {key: value for key, value, _ in _leaves("", before, None)}
    return {key: source for key, value, _ in _leaves("", after, None) if key not in had or had[key] != value}


def _entry_for(key: str, sources: Sources) -> str:
    """Return the last key of a table that matches a setting; empty where none does."""
    return next((pattern for pattern in reversed(sources) if fnmatchcase(key, pattern)), "")


def _leaves(key: str, value: Any, default: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield dotted key, value and default (or MISSING) of every setting below a value."""
    if dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            if key or f.name != "recipe":  # the recipe's own name is none of its values
                # what is None by default is set as a whole, whatever its parts would be by themselves
                yield from _leaves(f"{key}.{f.name}".lstrip("."), getattr(value, f.name),
                                   dataclasses.MISSING if default is None else _default(f))
    elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        for i, item in enumerate(value):
            yield from _leaves(f"{key}.{i}", item, dataclasses.MISSING)
    elif isinstance(value, dict) and value:
        for name, item in value.items():
            yield f"{key}.{name}", item, dataclasses.MISSING
    else:
        yield key, value, default


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
