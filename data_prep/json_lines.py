"""Lines of a JSONL file that a step of its own reads; a wrong line ends it, by file and number."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sov.documents import BadRecord
from megatron_sov.documents.records import decode
from megatron_sov.errors import UserError


def read_objects(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each line stands, for messages, and its object; empty lines are passed over.

    Raises:
        UserError: the file cannot be read, or a line is no JSON object.
    """
    try:
        with open(file, "rb") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield f"{file}:{number}", _object(line, f"{file}:{number}")
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror or e}); "
                        "check the path and its permissions") from None


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(decode(line))
    except BadRecord as e:
        raise UserError(f"{where}: {e.reason}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: is not valid JSON ({e}); every line must be one JSON object") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: is a JSON {type(record).__name__}; every line must be one JSON object")
    if b"\\u" in line:
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: holds half of a surrogate pair (an escape such as \\ud800), which is "
                            "no character; remove it") from None
    return record
