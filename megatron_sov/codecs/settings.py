"""Settings of codecs and of their training: read from a manifest or from `--set key=value`, checked whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, Protocol, TypeVar, cast, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from megatron_sov.errors import UserError, list_problems

_MAX_PROBLEMS = 20


class Checked(Protocol):
    """A frozen dataclass of plain values that knows its own rules."""

    def problems(self) -> list[str]:
        """Return one sentence for each setting that is not well."""
        ...


S = TypeVar("S", bound=Checked)


def read_settings(cls: type[S], raw: object, where: str) -> S:
    """Return settings of plain values.

    Args:
        cls: a frozen dataclass; unknown fields are refused, and nothing is converted but lists to tuples.
        raw: what stands in the JSON.
        where: the file or option that messages begin with.

    Raises:
        UserError: naming every field that is unknown, of a wrong type or out of bounds.
    """
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: must be an object of settings, not {type(raw).__name__}")
    if unknown := _unknown(cls, raw):
        raise UserError(list_problems(where, unknown[:_MAX_PROBLEMS]))
    try:
        settings = TypeAdapter(cls).validate_json(json.dumps(raw), strict=True)
    except ValidationError as e:
        raise UserError(list_problems(where, list(map(_sentence, e.errors()[:_MAX_PROBLEMS])))) from None
    if found := settings.problems():
        raise UserError(list_problems(where, found))
    return settings


def _unknown(cls: Any, raw: Mapping[Any, Any], above: str = "") -> list[str]:
    """Return one sentence for each key that is no field of a dataclass, or of those inside it."""
    hints, found = get_type_hints(cls), []
    for key, value in raw.items():
        if key not in hints:
            found.append(f"{above}{key}: there is no such setting")
            continue
        inside = next((t for t in (hints[key], *get_args(hints[key])) if is_dataclass(t)), None)
        if inside is not None and isinstance(value, Mapping):
            found += _unknown(inside, value, f"{above}{key}.")
    return found


def _sentence(error: Any) -> str:
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return f"{where}: is missing"
    value = repr(error.get("input"))
    return f"{where} = {value if len(value) <= 80 else value[:77] + '...'}: {error['msg']}"


def plain(settings: object) -> dict[str, Any]:
    """Return settings as they are written to a manifest."""
    return cast("dict[str, Any]", json.loads(json.dumps(asdict(cast(Any, settings)))))


def with_changes(settings: S, changes: Iterable[str], option: str = "--set") -> S:
    """Return settings with `key=value` changes applied, e.g. ``model.grid=4``.

    Values are read as JSON where they parse, else as text.

    Raises:
        UserError: a change without the form, an unknown key, a wrong type, or settings that break a rule.
    """
    raw = plain(settings)
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key:
            raise UserError(f"{option} {change!r}: must have the form key=value, e.g. {option} batch_size=16")
        node: Any = raw
        *path, last = key.split(".")
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict) or (last not in node):
            known = ", ".join(node) if isinstance(node, dict) else ", ".join(raw)
            raise UserError(f"{option} {change!r}: there is no setting {key!r}; there are {known}")
        try:
            node[last] = json.loads(text)
        except (ValueError, RecursionError):
            node[last] = text
    return read_settings(type(settings), raw, option)
