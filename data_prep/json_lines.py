"""Read JSON objects from `.jsonl` files and datasets; a malformed line raises `UserError` with file and
number."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sov.base.documents import BadRecord
from megatron_sov.base.documents.files import ARROW_SUFFIXES, JSON_SUFFIX, PARQUET_SUFFIX
from megatron_sov.base.documents.reading import read_records
from megatron_sov.base.documents.records import decode_utf8
from megatron_sov.base.errors import UserError

_DATASETS = ARROW_SUFFIXES | {PARQUET_SUFFIX, JSON_SUFFIX}
"""File endings of tables and JSON lists."""


def read_objects(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield location ("FILE:LINE") and object per line; skip empty lines. JSON lists, tables and dataset
    folders work too. Raises `UserError`: the file is unreadable, or a line holds no JSON object."""
    if file.is_dir() or file.suffix.lower() in _DATASETS:
        yield from read_records(file)
        return
    try:
        with open(file, "rb") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield f"{file}:{number}", _parse_object(line, f"{file}:{number}")
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror or e}); "
                        "check the path and its permissions") from None


def _parse_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(decode_utf8(line))
    except BadRecord as e:
        raise UserError(f"{where}: {e.reason}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: is not valid JSON ({e}); every line must be one JSON object") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: is a JSON {type(record).__name__}; every line must be one JSON object")
    # only an escape can produce a lone surrogate, so lines without escapes skip the second pass
    if b"\\u" in line:
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: holds half of a surrogate pair (an escape such as \\ud800), which is "
                            "no character; remove it") from None
    return record
