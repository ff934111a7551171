"""A publisher's file of a benchmark, brought into the folder of data in the form that its task reads."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sov.artifacts import write_output
from megatron_sov.documents.rows import read_objects
from megatron_sov.errors import UserError
from megatron_sov.eval.suites.catalogue import TaskFile
from megatron_sov.eval.suites.fields import renamed, rules_of

MAX_FIELD_CHARS = 1 << 30
"""Of a column of a CSV file; a problem's packed tests are long."""
ENDINGS = (".jsonl", ".parquet", ".csv")


@dataclass(frozen=True)
class Span:
    """Rows whose field is a text from one end up to, not including, the other."""

    field: str
    """Such as contest_date."""
    low: str
    """First text; empty: all before `high`."""
    high: str
    """First text that is out; empty: all from `low`."""

    @classmethod
    def of(cls, text: str) -> Span:
        """Read FIELD=FROM..TO.

        Raises:
            UserError: it has another form.
        """
        field, equals, span = text.partition("=")
        low, dots, high = span.partition("..")
        if not (field and equals and dots and (low or high)):
            raise UserError(f"--where {text!r}: must have the form FIELD=FROM..TO, e.g. "
                            "contest_date=2024-08-01..2025-02-01")
        return cls(field, low, high)

    def holds(self, row: dict[str, Any]) -> bool:
        """Return whether a row is in.

        Raises:
            UserError: the row has no such field.
        """
        if self.field not in row:
            raise UserError(f"--where {self.field}: a row has no such field; it has "
                            f"{', '.join(sorted(row))[:200]}")
        value = str(row[self.field])
        return value >= self.low and (not self.high or value < self.high)


def bring(task: TaskFile, source: Path, name: str, data_dir: Path,
          spans: list[Span]) -> tuple[Path, int, int]:
    """Write a file of a task; it appears whole.

    Args:
        task: whose rules the rows must keep.
        source: a file in JSON lines, Parquet or CSV.
        name: of the task's files, below the folder of data.
        data_dir: the folder.
        spans: which rows.

    Returns:
        The file, rows that were written, rows of the source.

    Raises:
        UserError: the source cannot be read, or a row breaks a rule.
    """
    rules, aliases = rules_of(task.sov.get("fields")), task.sov.get("aliases", {})
    lines: list[str] = []
    num_rows = 0
    for number, row in rows_of(source):
        num_rows = number
        if not all(span.holds(row) for span in spans):
            continue
        made = renamed(row, aliases)
        if wrong := "; ".join(said for rule in rules if (said := rule.problem(made))):
            raise UserError(f"--from {source}: row {number}: {wrong}; its columns are "
                            f"{', '.join(sorted(row))[:200]}")
        kept = {rule.name: made[rule.name] for rule in rules if made.get(rule.name) is not None}
        lines.append(json.dumps(kept, ensure_ascii=False, allow_nan=False) + "\n")
    if not lines:
        raise UserError(f"--from {source}: has no rows" + (" that --where asks for" if num_rows else ""))
    target = data_dir / name
    write_output(target, "".join(lines))
    return target, len(lines), num_rows


def rows_of(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, row) of a file, by its ending.

    Raises:
        UserError: it cannot be read, or has another ending.
    """
    if not source.is_file():
        raise UserError(f"--from {source}: there is no such file")
    if source.suffix == ".jsonl":
        found: Iterator[dict[str, Any]] = (row for _, row in read_objects(source, "--from"))
    elif source.suffix == ".parquet":
        found = _parquet(source)
    elif source.suffix == ".csv":
        found = _csv(source)
    else:
        raise UserError(f"--from {source}: must end with {', '.join(ENDINGS)}")
    yield from enumerate(found, 1)


def _parquet(source: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source) as file:
            for batch in file.iter_batches(256):
                for row in batch.to_pylist():
                    yield {str(name): _json(value) for name, value in row.items()}
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"--from {source}: is no Parquet file that can be read "
                        f"({' '.join(str(e).split())[:200]})") from None


def _csv(source: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(MAX_FIELD_CHARS)
    try:
        with open(source, newline="", encoding="utf-8-sig") as f:
            for row in csv.DictReader(f, strict=True):
                yield {str(name): value for name, value in row.items() if name is not None}
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"--from {source}: is no CSV file in UTF-8 ({e})") from None


def _json(value: Any) -> Any:
    """Return a value of a table as JSON has it: a number that is none is null, a date its text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _json(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(part) for part in value]
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
