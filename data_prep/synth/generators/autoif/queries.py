"""Prompts of real users: the first turn of conversations, as WildChat and others have them, or a field."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.json_lines import read_objects
from megatron_sov.documents import BadRecord
from megatron_sov.documents.files import PARQUET_SUFFIX, list_files, open_parquet
from megatron_sov.errors import UserError, first_line

CONVERSATIONS = ("conversation", "messages", "conversations", "prompt")
"""Fields that may hold turns, WildChat's first."""
FIELDS = ("prompt", "query", "question", "instruction")
"""Fields that may hold the text itself."""
_ROWS = 1024


@dataclass(frozen=True)
class Query:
    """What a user asks."""

    text: str
    """The turn."""
    digest: str
    """Hash of it."""
    source: str
    """Name of the file."""
    licence: str = ""
    """As the record states it."""


def queries_of(inputs: Sequence[Path], min_chars: int, max_chars: int, toxic: bool) -> Iterator[Query]:
    """Yield the first turns of users that have so many characters, each once.

    Args:
        inputs: JSONL and Parquet files, or folders of them.
        min_chars: of a text, white space around it removed.
        max_chars: likewise.
        toxic: whether to take records whose `toxic` is true.

    Raises:
        UserError: a file cannot be read, or a record has no prompt.
    """
    seen: set[str] = set()
    for file in (file for path in inputs for file in list_files(path)):
        for where, record in _records(file):
            if record.get("toxic") is True and not toxic:
                continue
            text = query_in(record, where).strip()
            digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
            if min_chars <= len(text) <= max_chars and digest not in seen:
                seen.add(digest)
                licence = record.get("licence", record.get("license"))
                yield Query(text, digest, file.name, licence if isinstance(licence, str) else "")


def query_in(record: dict[str, Any], where: str) -> str:
    """Return the first turn of the user in a record.

    Raises:
        UserError: there is none.
    """
    for name in CONVERSATIONS:
        turns = record.get(name)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict) and turn.get("role", turn.get("from")) in ("user", "human"):
                text = turn.get("content", turn.get("value"))
                if isinstance(text, str):
                    return text
    for name in FIELDS:
        text = record.get(name)
        if isinstance(text, str):
            return text
    raise UserError(f"{where}: has no prompt of a user; give a conversation ({', '.join(CONVERSATIONS)}: "
                    f"turns with role and content) or a string ({', '.join(FIELDS)})")


def _records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if file.suffix != PARQUET_SUFFIX:
        yield from read_objects(file)
        return
    from pyarrow import ArrowException

    try:
        table = open_parquet(file)
        wanted = {*CONVERSATIONS, *FIELDS, "toxic", "licence", "license"}
        columns = [name for name in table.schema_arrow.names if name in wanted]
        number = 0
        for group in range(table.num_row_groups):  # a batch of nested values must not span two of them
            for batch in table.iter_batches(_ROWS, row_groups=[group], columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{file}: row {number}", record
    except BadRecord as e:
        raise UserError(f"{file}: {e.reason}") from None
    except (ArrowException, OSError, UnicodeDecodeError) as e:
        raise UserError(f"{file}: is damaged ({first_line(e)}); fetch it again") from None
