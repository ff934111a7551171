"""Read a task's data files without guessing types.

The builders in `datasets` guess: an ISO date in JSON becomes a timestamp, `NA` in CSV a missing value and
`007` the number 7, so that correct answers score 0. Here JSON values keep their types and CSV cells stay
text. """

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from megatron_sov.base.documents.reading import read_records
from megatron_sov.base.errors import UserError

LOADERS = {"json": (".json", ".jsonl"), "csv": (".csv", ".tsv"), "parquet": (".parquet",)}
"""Supported `dataset_path` -> file endings."""
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
        rows = TaskRows(row for name in files for row in read_rows(Path(name)))
        missing = dict.fromkeys(rows.features)
        rows[:] = [{**missing, **row} for row in rows]  # templates may test for fields that some rows lack
        return rows


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows in a JSON Lines, JSON, CSV or Parquet file. Raises `UserError`: a damaged file."""
    if file.suffix in LOADERS["csv"]:
        return _read_csv(file)
    return (row for _, row in read_records(file))


def _read_csv(file: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(MAX_CELL_CHARS)
    try:
        text = io.StringIO(file.read_text(encoding="utf-8-sig"), newline="")
        reader = csv.DictReader(text, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        names = reader.fieldnames or ()
        if len(set(names)) < len(names):
            raise UserError(f"{file}: has two columns with the same name ({', '.join(names):.200}); rename "
                            "one of them")
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{file}: line {reader.line_num} must have {len(names)} cells, a cell per "
                                "column; correct it, or quote cells that contain the separator")
            yield row
    except UnicodeDecodeError as e:
        raise UserError(f"{file}: is no UTF-8 text ({e}); write it in UTF-8") from None
    except csv.Error as e:
        raise UserError(f"{file}: line {reader.line_num} is no valid CSV ({e}); correct it") from None
