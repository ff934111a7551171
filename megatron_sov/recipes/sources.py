"""Where the values of a recipe come from: one table per recipe, setting -> source."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from megatron_sov.config import RunConfig

Kind = Literal["published", "config.json", "ours", "yours", "default"]


@dataclass(frozen=True)
class Source:
    """Where a value comes from."""

    kind: Kind
    """published: a paper or report, or its authors' code; config.json: the released Hugging Face config; ours: our choice;
    yours: set by --set, or by a recipe that has no table; default: the recipe leaves the setting as it is."""
    where: str = ""
    """Reference and section; the model whose config.json it is; a word why."""


Sources = Mapping[str, Source]
"""Dotted setting -> source, e.g. `optim.lr`; a key may have * for any text, and the last one that matches holds."""
DEFAULT, YOURS = Source("default"), Source("yours")


@dataclass(frozen=True)
class Setting:
    """One value of a recipe, with its source."""

    key: str
    """Dotted name, as `--set` takes it."""
    value: Any
    """A number, a text, a truth value, null, or a list or table without settings of its own."""
    source: Source
    """Where it comes from."""


def published(where: str) -> Source:
    """Return the source of a value that a paper, a report or its authors' code gives."""
    return Source("published", where)


def config_json(model: str) -> Source:
    """Return the source of a value that stands in the config.json of a released model, or follows from its class."""
    return Source("config.json", model)


def ours(why: str) -> Source:
    """Return the source of a value that nobody published: our choice, with a word why."""
    return Source("ours", why)


def derive(sources: Sources, changed: Sources) -> Sources:
    """Return the table of a recipe that goes back to another one; what `changed` says wins."""
    return {key: source for key, source in sources.items() if key not in changed} | dict(changed)


def settings(config: RunConfig, sources: Sources) -> list[Setting]:
    """Return every value of a recipe with its source; one that no entry names is `default`, or `yours` where it is set."""
    return [Setting(key, value, _source_of(key, sources) or (DEFAULT if value == default else YOURS))
            for key, value, default in _leaves("", config, dataclasses.MISSING)]


def relabelled(before: RunConfig, after: RunConfig, source: Source) -> Sources:
    """Return a table that gives `source` to every value of `after` that `before` does not have."""
    had = {key: value for key, value, _ in _leaves("", before, None)}
    return {key: source for key, value, _ in _leaves("", after, None) if key not in had or had[key] != value}


def _source_of(key: str, sources: Sources) -> Source | None:
    return next((source for pattern, source in reversed(sources.items()) if fnmatchcase(key, pattern)), None)


def _leaves(key: str, value: Any, default: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield dotted key, value and default of every setting below a value; MISSING where a recipe has to set it."""
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
