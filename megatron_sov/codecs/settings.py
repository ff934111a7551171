"""Settings of codecs and of their training: read from a manifest or from `--set key=value`, checked whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, Protocol, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

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
        raise UserError(f"{where}: must be an object of settings, not {type(raw).__name__}; make the codec again")
    try:
        adapter = TypeAdapter(cls, config=_of(cls))
        settings = adapter.validate_json(json.dumps(raw), strict=True)
    except (ValidationError, ValueError, RecursionError, TypeError) as e:
        errors = e.errors() if isinstance(e, ValidationError) else []
        found = [_sentence(error) for error in errors[:_MAX_PROBLEMS]] or [str(e)]
        raise UserError(list_problems(where, found)) from None
    if found := settings.problems():
        raise UserError(list_problems(where, found))
    return settings


def _of(cls: type[Any]) -> ConfigDict | None:
    """Return how pydantic reads a dataclass; nested ones carry their own `__pydantic_config__`."""
    return None if hasattr(cls, "__pydantic_config__") else ConfigDict(extra="forbid")


def _sentence(error: Any) -> str:
    where = ".".join(map(str, error["loc"]))
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{where}: there is no such setting"
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
