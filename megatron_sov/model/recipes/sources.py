"""Sources for a recipe's values: a table from setting to source."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from megatron_sov.base.hints.table import load_package_table
from megatron_sov.model.config import RunConfig

Kind = Literal["published", "config.json", "ours", "yours", "default"]


@dataclass(frozen=True)
class ValueSource:
    kind: Kind
    """published: a paper, report, or its authors' code; config.json: the released Hugging Face config; ours:
    our choice; yours: --config, --set, or a recipe without a table; default: not set."""
    where: str = ""
    """Reference and section, model of the config.json, or a reason."""


Sources = dict[str, ValueSource]
"""Setting -> source. A key may have * for any text; the last matching key applies."""
DEFAULT, YOURS = ValueSource("default"), ValueSource("yours")
UNCOMPARED = "as remembered: not compared with the file"
"""Note for models whose config.json could not be compared."""


@dataclass(frozen=True)
class Setting:
    """A value of a recipe, with its source."""

    key: str
    """Dotted name, as in `--set`."""
    value: Any
    """A number, text, boolean, null, list or table."""
    source: ValueSource


def published(where: str) -> ValueSource:
    """Return the source for a value from a paper, report, or its authors' code."""
    return ValueSource("published", where)


def config_json(model: str) -> ValueSource:
    """Return the source for a value in (or implied by) a released model's config.json."""
    return ValueSource("config.json", model)


def ours(why: str) -> ValueSource:
    """Return the source for an unpublished value that we chose, with a reason."""
    return ValueSource("ours", why)


def read_sources(recipe: str) -> Sources:
    """Return a table of sources.yaml."""
    sources = {}
    for key, text in _load_tables()[recipe].items():
        kind, _, where = text.partition(": ")
        sources[key] = ValueSource(cast("Kind", kind), where)
    return sources


@cache
def _load_tables() -> dict[str, dict[str, str]]:
    tables: dict[str, dict[str, str]] = load_package_table(Path(__file__).with_suffix(".yaml"))
    return tables


def derive_sources(sources: Sources, changed: Sources) -> Sources:
    """Return a derived recipe's table: entries in `changed` replace entries in `sources`."""
    return {key: source for key, source in sources.items() if key not in changed} | changed


def list_settings(config: RunConfig, sources: Sources) -> list[Setting]:
    """Return all settings with sources; without an entry the kind is `yours`, or `default`."""
    return [
        Setting(key, value,
                sources.get(_find_entry(key, sources)) or (DEFAULT if value == default else YOURS))
        for key, value, default in _iter_leaves("", config, dataclasses.MISSING)]


def select_used(config: RunConfig, sources: Sources) -> Sources:
    """Return the entries that match a setting; derived tables may have unused entries."""
    used = {_find_entry(key, sources) for key, _, _ in _iter_leaves("", config, None)}
    return {key: source for key, source in sources.items() if key in used}


def label_changes(before: RunConfig, after: RunConfig, source: ValueSource) -> Sources:
    """Return a table with `source` for every value that differs between `before` and `after`."""
    had = {key: value for key, value, _ in _iter_leaves("", before, None)}
    return {key: source for key, value,
            _ in _iter_leaves("", after, None) if key not in had or had[key] != value}


def _find_entry(key: str, sources: Sources) -> str:
    """Return the last key of a table that matches a setting; "" without a match."""
    return next((pattern for pattern in reversed(sources) if fnmatchcase(key, pattern)), "")


def _iter_leaves(key: str, value: Any, default: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, value, default or MISSING) for every setting in `value`."""
    if dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            if key or f.name != "recipe":  # `recipe` is the name, not a value
                # An optional group is set as a whole: defaults of its fields do not count.
                yield from _iter_leaves(f"{key}.{f.name}".lstrip("."), getattr(value, f.name),
                                        dataclasses.MISSING if default is None else _field_default(f))
    elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        for i, item in enumerate(value):
            yield from _iter_leaves(f"{key}.{i}", item, dataclasses.MISSING)
    elif isinstance(value, dict) and value:
        for name, item in value.items():
            yield f"{key}.{name}", item, dataclasses.MISSING
    else:
        yield key, value, default


def _field_default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
