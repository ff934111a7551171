"""What a team says of its work in a YAML file: read with limits, each mistake in it told at once."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BeforeValidator, TypeAdapter, ValidationError

from megatron_sov.errors import UserError, list_problems, nearest

T = TypeVar("T")
MAX_BYTES = 2**20


def _plain(value: Any) -> Any:
    """YAML reads 2025-07-24 as a date, and 2025 as a number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number or isinstance(value, datetime.date) else value


Text = Annotated[str, BeforeValidator(_plain)]
"""A text, which may look like a number or a date."""


def read_stated(option: str, file: Path, cls: type[T], parts: Sequence[type[Any]] = ()) -> T:
    """Return what a file says.

    Args:
        option: of the command line, for messages, e.g. "--about".
        file: the YAML file.
        cls: the dataclass that it fills.
        parts: dataclasses inside that one.

    Raises:
        UserError: it cannot be read, or breaks rules; all of them are told.
    """
    try:
        with open(file, encoding="utf-8") as f:
            text = f.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise UserError(f"{option} {file}: is longer than {MAX_BYTES:,} characters; keep to what the "
                            "card asks")
        if "&" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise UserError(f"{option} {file}: uses aliases (*name); write the text out")
        raw = yaml.safe_load(text)
    except UnicodeDecodeError:
        raise UserError(f"{option} {file}: is no text in UTF-8; pass a YAML file") from None
    except OSError as e:
        raise UserError(f"{option} {file}: cannot be read ({e.strerror}); check the path") from None
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError) as e:
        # a tag falls over a value that it does not know in its own way: `!!int ''`, `!!timestamp soon`
        raise UserError(f"{option} {file}: is no YAML ({' '.join(str(e).split())}); mend it") from None
    try:
        said: T = TypeAdapter(cls).validate_python({} if raw is None else raw)
    except ValidationError as e:
        raise UserError(list_problems(f"{option} {file}", [_told(error, cls, parts) for error in e.errors()]
                                      )) from None
    return said


def _told(error: Any, cls: type[Any], parts: Sequence[type[Any]]) -> str:
    where = ".".join(map(str, error["loc"])) or "the file"
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [f.name for c in (parts if len(error["loc"]) > 1 else (cls,)) for f in fields(c)]
        return f"{where}: is no field{nearest(str(error['loc'][-1]), known)} (fields: {', '.join(known)})"
    is_no_object = error["type"] == "dataclass_type"
    rule = "must be fields with values, as `name: value`" if is_no_object else error["msg"]
    return f"{where} = {str(error.get('input'))[:80]!r}: {rule}"
