"""Read a task's data files into the rows that lm-eval evaluates, without guessing types.

The builders of `datasets` guess: an ISO date in JSON becomes a timestamp, `NA` in CSV a missing value and
`007` the number 7, so correct answers score 0. Here JSON values stay as written and CSV cells are text.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sov.base.documents.rows import parse_row, read_lines
from megatron_sov.base.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

LOADERS = {"json": (".json", ".jsonl"), "csv": (".csv", ".tsv"), "parquet": (".parquet",)}
"""What may stand as `dataset_path` -> the files that it reads; others are fetched, or are code."""
MAX_FILE_BYTES = 4 << 30
"""Largest data file; a task's rows are held in memory."""
MAX_CELL_CHARS = 64 << 20


class TaskRows(list[dict[str, Any]]):
    """The rows of a split, with the one attribute of `datasets.Dataset` that lm-eval reads."""

    @property
    def features(self) -> dict[str, None]:
        """All field names, in the order of their first appearance."""
        return dict.fromkeys(name for row in self for name in row)


@dataclass(frozen=True)
class TaskFileReader:
    """Reads the data files of a task when lm-eval builds it; the value of the task's `custom_dataset`."""

    loader: str
    """Key of `LOADERS`."""
    files: Mapping[str, Sequence[str]]
    """Split -> its files."""
    to_dataset: bool = False
    """Whether to return `datasets.Dataset` objects, which the `process_docs` of a task expect."""

    def __call__(self, **_: Any) -> dict[str, TaskRows] | dict[str, Dataset]:
        """Return split -> rows. lm-eval passes the task's metadata and `dataset_kwargs`, which are not used.

        Raises:
            UserError: a file cannot be read as the loader's format.
        """
        splits = {split: self._read_split(files) for split, files in self.files.items()}
        if not self.to_dataset:
            return splits
        from datasets import Dataset

        return {split: Dataset.from_list(list(rows)) for split, rows in splits.items()}

    def _read_split(self, files: Sequence[str]) -> TaskRows:
        rows = TaskRows(row for name in files for row in read_rows(self.loader, Path(name)))
        missing = dict.fromkeys(rows.features)
        rows[:] = [{**missing, **row} for row in rows]  # a template may test a field that some rows lack
        return rows


def read_rows(loader: str, file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file.

    Raises:
        UserError: it cannot be read as the loader's format.
    """
    read = {"json": _read_json, "csv": _read_csv, "parquet": _read_parquet}
    return read[loader](file)


def group_files(data_files: Any) -> dict[str, list[str]]:
    """Return split -> files from the forms that `datasets` accepts: a path, a list, or either by split."""
    splits = data_files if isinstance(data_files, dict) else {"train": data_files}
    return {split: files if isinstance(files, list) else [files] for split, files in splits.items()}


def _read_json(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of JSON Lines, or of a JSON list."""
    if not _begins_with_bracket(file):
        for line, raw in read_lines(file, "data file"):
            row = parse_row(raw, "")
            if isinstance(row, str):
                raise UserError(f"{file}: line {line} {row}; write one JSON object per line, or a JSON list")
            yield dict(row)
        return
    try:
        rows = json.loads(_read_whole(file))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: is no valid JSON ({str(e)[:200]}); mend it") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{file}: must hold a list of JSON objects, one for each item")
    yield from rows


def _read_csv(file: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(MAX_CELL_CHARS)
    text = io.StringIO(_read_whole(file), newline="")
    reader = csv.DictReader(text, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
    try:
        names = reader.fieldnames or ()
        if len(set(names)) < len(names):
            raise UserError(f"{file}: has two columns of one name ({', '.join(names):.200}); rename one")
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{file}: line {reader.line_num} has another number of cells than the "
                                f"{len(names)} columns; mend it, or quote a cell with the separator in it")
            yield row
    except csv.Error as e:
        raise UserError(f"{file}: line {reader.line_num} is no valid CSV ({e}); mend it") from None


def _read_parquet(file: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(256):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{file}: is no Parquet file that can be read ({' '.join(str(e).split())[:200]}); "
                        "write it again") from None


def _begins_with_bracket(file: Path) -> bool:
    with open(file, "rb") as f:
        return f.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _read_whole(file: Path) -> str:
    """Return a file's text with its line ends as `\\n`."""
    if file.stat().st_size > MAX_FILE_BYTES:
        raise UserError(f"{file}: is larger than {MAX_FILE_BYTES >> 30} GiB; take fewer items")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{file}: is no UTF-8 text ({e}); write it in UTF-8") from None
