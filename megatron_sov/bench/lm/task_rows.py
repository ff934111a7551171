"""Read a task's data files without guessing types.

The builders in `datasets` guess: an ISO date in JSON becomes a timestamp, `NA` in CSV a missing value and
`007` the number 7, so that correct answers score 0. Here JSON values keep their types and CSV cells stay
text. """

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from megatron_sov.base.documents.rows import parse_row, read_lines
from megatron_sov.base.errors import UserError

LOADERS = {"json": (".json", ".jsonl"), "csv": (".csv", ".tsv"), "parquet": (".parquet",)}
"""Supported `dataset_path` -> file endings."""
MAX_FILE_BYTES = 4 << 30
"""Largest JSON list or CSV file; a task's rows stay in memory."""
MAX_CELL_CHARS = 64 << 20


class TaskRows(list[dict[str, Any]]):
    """The rows of a split, with the single attribute of `datasets.Dataset` that lm-eval reads."""

    @property
    def features(self) -> dict[str, None]:
        """Field names in order of appearance."""
        return dict.fromkeys(name for row in self for name in row)


@dataclass(frozen=True)
class TaskFileReader:
    """Reads a task's data files for lm-eval; becomes the task's `custom_dataset`."""

    loader: str
    """Key of `LOADERS`."""
    files: Mapping[str, Sequence[str]]
    """Split -> paths."""
    to_dataset: bool = False
    """Return `datasets.Dataset` objects, as `process_docs` in foreign tasks expects."""

    def __call__(self, **_: Any) -> dict[str, TaskRows] | dict[str, Dataset]:
        """Return split -> rows; ignores the metadata and `dataset_kwargs` that lm-eval passes. Raises
        `UserError`: a damaged file."""
        splits = {split: self._read_split(files) for split, files in self.files.items()}
        if not self.to_dataset:
            return splits
        return {split: Dataset.from_list(list(rows)) for split, rows in splits.items()}

    def _read_split(self, files: Sequence[str]) -> TaskRows:
        rows = TaskRows(row for name in files for row in read_rows(self.loader, Path(name)))
        missing = dict.fromkeys(rows.features)
        rows[:] = [{**missing, **row} for row in rows]  # templates may test for fields that some rows lack
        return rows


def read_rows(loader: str, file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows in a file. Raises `UserError`: a damaged file."""
    read = {"json": _read_json, "csv": _read_csv, "parquet": _read_parquet}
    return read[loader](file)


def _read_json(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects in JSON Lines or in a JSON list."""
    with open(file, "rb") as f:
        start = f.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        for line, raw in read_lines(file, "data file"):
            row = parse_row(raw, "")
            if isinstance(row, str):
                raise UserError(f"{file}: line {line} {row}; write one JSON object per line, or a JSON list")
            yield dict(row)
        return
    try:
        rows = json.loads(_read_text(file))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: is no valid JSON ({str(e)[:200]}); correct it") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{file}: must hold a list of JSON objects, an object per item")
    yield from rows


def _read_csv(file: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(MAX_CELL_CHARS)
    text = io.StringIO(_read_text(file), newline="")
    reader = csv.DictReader(text, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
    try:
        names = reader.fieldnames or ()
        if len(set(names)) < len(names):
            raise UserError(f"{file}: has two columns with the same name ({', '.join(names):.200}); rename "
                            "one of them")
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{file}: line {reader.line_num} must have {len(names)} cells, a cell per "
                                "column; correct it, or quote cells that contain the separator")
            yield row
    except csv.Error as e:
        raise UserError(f"{file}: line {reader.line_num} is no valid CSV ({e}); correct it") from None


def _read_parquet(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(256):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{file}: is no readable Parquet file ({' '.join(str(e).split())[:200]}); write it "
                        "again") from None


def _read_text(file: Path) -> str:
    """Read a UTF-8 file; line ends become `\\n`."""
    if file.stat().st_size > MAX_FILE_BYTES:
        raise UserError(f"{file}: is larger than {MAX_FILE_BYTES >> 30} GiB; use fewer items")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{file}: is no UTF-8 text ({e}); write it in UTF-8") from None
