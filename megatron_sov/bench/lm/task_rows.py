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
OPTIONS = {"json": ("field",), "csv": ("delimiter",), "parquet": ()}
"""Loader (`dataset_path`) -> the `dataset_kwargs` that it reads in addition to `data_files`."""
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
    """Key of `OPTIONS`."""
    files: Mapping[str, Sequence[str]]
    """Split -> its files."""
    options: Mapping[str, Any]
    index_fields: frozenset[str] = frozenset()
    """CSV columns that hold the index of a choice where all their cells are integers."""
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
        rows = TaskRows(row for name in files for row in read_rows(self.loader, Path(name), self.options))
        missing = dict.fromkeys(rows.features)
        rows[:] = [{**missing, **row} for row in rows]  # a template may test a field that some rows lack
        for field in self.index_fields.intersection(missing) if self.loader == "csv" else ():
            if all(isinstance(row[field], str) and _is_index(row[field]) for row in rows):
                for row in rows:
                    row[field] = int(row[field])
        return rows


def read_rows(loader: str, file: Path, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file.

    Raises:
        UserError: it cannot be read as the loader's format.
    """
    read = {"json": _read_json, "csv": _read_csv, "parquet": _read_parquet}
    return read[loader](file, options)


def group_files(data_files: Any) -> dict[str, list[str]]:
    """Return split -> files from the forms that `datasets` accepts: a path, a list, or either by split."""
    splits = data_files if isinstance(data_files, dict) else {"train": data_files}
    return {split: files if isinstance(files, list) else [files] for split, files in splits.items()}


def find_option_problem(loader: str, options: Mapping[str, Any]) -> str | None:
    """Check the `dataset_kwargs` of a loader other than `data_files`; return a problem, or None."""
    if unknown := sorted(map(str, set(options) - set(OPTIONS[loader]))):
        return (f"dataset_kwargs has {', '.join(unknown)}, which `dataset_path: {loader}` does not read; "
                f"leave it out, or use {', '.join(('data_files', *OPTIONS[loader]))}")
    if not isinstance(options.get("field", ""), str):
        return f"dataset_kwargs.field is {options['field']!r:.80}; write a text"
    delimiter = options.get("delimiter", ",")
    if not (isinstance(delimiter, str) and len(delimiter) == 1):
        return f"dataset_kwargs.delimiter is {delimiter!r:.80}; write one character"
    return None


def _read_json(file: Path, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the objects of JSON Lines, of a JSON list, or of the list under `field`."""
    field = options.get("field")
    if field is None and not _begins_with_bracket(file):
        for line, raw in read_lines(file, "data file"):
            row = parse_row(raw, "")
            if isinstance(row, str):
                raise UserError(f"{file}: line {line} {row}; write one JSON object per line, or a JSON list")
            yield dict(row)
        return
    try:
        found = json.loads(_read_whole(file))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: is no valid JSON ({str(e)[:200]}); mend it") from None
    if field is not None:
        if not isinstance(found, dict) or field not in found:
            raise UserError(f"{file}: has no {field!r}; set dataset_kwargs.field to a key of the file")
        found = found[field]
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise UserError(f"{file}: must hold a list of JSON objects, one for each item")
    yield from found


def _read_csv(file: Path, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    delimiter = options.get("delimiter") or ("\t" if file.suffix == ".tsv" else ",")
    csv.field_size_limit(MAX_CELL_CHARS)
    reader = csv.DictReader(io.StringIO(_read_whole(file), newline=""), delimiter=delimiter, strict=True)
    try:
        names = reader.fieldnames or ()
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{file}: has two columns named {twice!r:.80}; rename one of them")
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{file}: line {reader.line_num} has another number of cells than the "
                                f"{len(reader.fieldnames or ())} columns; mend it, or quote the cell with "
                                f"{delimiter!r} in it")
            yield row
    except csv.Error as e:
        raise UserError(f"{file}: line {reader.line_num} is no valid CSV ({e}); mend it") from None


def _read_parquet(file: Path, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
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


def _is_index(cell: str) -> bool:
    return cell.isascii() and cell.isdigit() and len(cell) < 10 and (cell == "0" or not cell.startswith("0"))
