"""JSON objects of a user's file, one per line: tasks, documents, calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sov.documents.messages import BadRecord, refuse_deep
from megatron_sov.documents.strict_json import no_constant
from megatron_sov.errors import UserError

MAX_LINE_BYTES = 64 << 20
"""A longer line is no record but a file that lost its line ends."""


def read_objects(path: Path, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, object) of a file in JSON lines, blank lines passed over.

    Args:
        path: the file.
        what: names it in messages, e.g. "--tasks".

    Raises:
        UserError: it cannot be read, or a line is no JSON object; the first one is named.
    """
    try:
        with open(path, "rb") as f:
            number = 0
            while raw := f.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(raw) > MAX_LINE_BYTES:
                    raise UserError(f"{what} {path}: line {number} has more than {MAX_LINE_BYTES >> 20} MiB; "
                                    "each line is one JSON object")
                if raw.strip():
                    yield number, _object(raw, f"{what} {path}: line {number}")
    except OSError as e:
        raise UserError(f"{what} {path}: cannot be read ({e.strerror or e}); "
                        "name a file in JSON lines") from None


def _object(raw: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=no_constant)
        refuse_deep(value)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except BadRecord as e:
        raise UserError(f"{where}: {e.reason}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: is no JSON in UTF-8 ({e}); each line is one JSON object") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: is a {type(value).__name__}, must be a JSON object")
    return value
