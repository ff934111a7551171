"""Files that users write in YAML, read into dataclasses; every mistake becomes one sentence."""

from __future__ import annotations

import dataclasses
import reprlib
from pathlib import Path
from typing import Any, TypeVar

import yaml

from megatron_sov.documents.bounded_yaml import BoundedLoader
from megatron_sov.errors import UserError, nearest

T = TypeVar("T")
SHORT = reprlib.Repr()
"""Shows a value in a message: lists of lists by YAML's anchors may have more items than memory holds."""
SHORT.maxlevel, SHORT.maxstring, SHORT.maxother = 3, 80, 80
MAX_BYTES = 1 << 20
"""A larger file is no profile and no chain."""


def read_text(name: str, file: Path) -> str:
    """Return what stands in a file.

    Args:
        name: the file or option, for messages.
        file: where it lies.

    Raises:
        UserError: it may not be read, is no text, or too long.
    """
    try:
        size_bytes = file.stat().st_size
        if size_bytes > MAX_BYTES:
            raise UserError(f"{name}: has {size_bytes:,} bytes, and a file of settings has {MAX_BYTES:,} at "
                            "most; pass a YAML file")
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{name}: is no text in UTF-8 (byte {e.start} is {e.object[e.start]:#04x}); "
                        "pass a YAML file") from None
    except OSError as e:
        raise UserError(f"{name}: cannot be read ({e.strerror}); see to its permissions") from None


def read_yaml(name: str, text: str, cls: type[T], parts: tuple[type, ...], what: str) -> T:
    """Return what a file says.

    Args:
        name: the file or option, for messages.
        text: its content.
        cls: the dataclass that it describes.
        parts: dataclasses inside that one, whose fields are suggested too.
        what: "profile" or "chain", for messages.

    Raises:
        UserError: it is no YAML, has an unknown field, or a value of the wrong type.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        raw: Any = yaml.load(text, Loader=BoundedLoader)
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError) as e:
        # a tag falls over a value that it does not know in its own way: `!!int ''`, `!!timestamp soon`
        raise UserError(f"{name}: is no YAML ({' '.join(str(e).split())}); mend it") from None
    try:
        return TypeAdapter(cls).validate_python(raw)
    except ValidationError as e:
        unknown = ("unexpected_keyword_argument", "extra_forbidden")
        # a misspelt field explains a missing one
        error = min(e.errors(), key=lambda found: found["type"] not in unknown)
        where = ".".join(map(str, error["loc"])) or what
        if error["type"] in unknown:
            known = [f.name for c in (cls, *parts) for f in dataclasses.fields(c)]
            raise UserError(f"{name}: {where} is no field of a "
                            f"{what}{nearest(str(error['loc'][-1]), known)}") from None
        if error["type"] == "missing":
            raise UserError(f"{name}: {where} is missing; every {what} needs it") from None
        quotes = "; put it in quotes" if error["type"] == "string_type" else ""  # YAML reads 2:00:00 as 7200
        value = SHORT.repr(error.get("input"))
        raise UserError(f"{name}: {where} = {value}: {error['msg']}{quotes}") from None
