"""The task files that come along, what each needs of the user's folder of data, and a publisher's file
brought there in the form that its task reads."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import write_output
from megatron_sov.base.documents.rows import read_objects
from megatron_sov.base.errors import UserError, nearest
from megatron_sov.bench.lm.tasks import DATA, FoundTasks, TaskFolder, find
from megatron_sov.bench.suites.protocol import KEY, Protocol, protocol_of
from megatron_sov.bench.suites.task_data import TaskData, renamed, rules_of

SUITES_FOLDER = Path(__file__).parent / "tasks"
"""For lm-eval's TaskManager, beside the user's own folders."""


@dataclass(frozen=True)
class TaskFile:
    """A task, as its file says; nothing of it has been run."""

    name: str
    path: Path
    config: Mapping[str, Any]
    """All of the file; what `!function` names is a text."""

    @property
    def sov(self) -> Mapping[str, Any]:
        found = (self.config.get("metadata") or {}).get(KEY) or {}
        return found if isinstance(found, Mapping) else {}

    @property
    def protocol(self) -> Protocol | None:
        """Return how answers are sampled and judged; None: as lm-eval does."""
        return protocol_of(self.config.get("metadata"), self.name)

    @property
    def tags(self) -> tuple[str, ...]:
        """Return the names of the lists of tasks that it is in."""
        tag = self.config.get("tag") or ()
        return (tag,) if isinstance(tag, str) else tuple(tag)

    @property
    def told_files(self) -> dict[str, list[str]]:
        """Return split -> files below the folder of data."""
        given = (self.config.get("dataset_kwargs") or {}).get("data_files") or {}
        listed = {split: [files] if isinstance(files, str) else files for split, files in given.items()}
        return {split: [name.removeprefix(f"{DATA}/") for name in names] for split, names in listed.items()}

    def files(self, data_dir: Path) -> dict[str, list[Path]]:
        """Return split -> files in a folder of data."""
        return {split: [data_dir / name for name in names] for split, names in self.told_files.items()}


def read_task(path: Path) -> TaskFile | None:
    """Return the task of a file, with what it includes; None: it has no task.

    Raises:
        UserError: it is no YAML, or includes what is not there or lies outside of its folder.
    """
    if not path.is_file():
        raise UserError(f"task file {path}: cannot be read; there is no such file")
    found = find([TaskFolder(path.parent, trusted=False, option="--tasks")])
    if problem := found.problems.get(str(path)):
        raise UserError(f"task file {problem}")
    return next((task for task in _tasks(found) if task.path == path), None)


def _tasks(found: FoundTasks) -> list[TaskFile]:
    return [TaskFile(name, definition.file, definition.config)
            for name, definition in found.definitions.items() if "task" in definition.config]


@lru_cache(maxsize=1)
def suite_tasks() -> dict[str, TaskFile]:
    """Return name -> task of the files that come along, in their order."""
    found = find([TaskFolder(SUITES_FOLDER, trusted=True)])
    assert not found.problems, found.problems
    return {task.name: task for task in _tasks(found)}


def chosen(names: Sequence[str]) -> list[TaskFile]:
    """Return tasks by their names or tags; all without any.

    Raises:
        UserError: there is none of a name.
    """
    tasks = suite_tasks()
    tags = {tag for task in tasks.values() for tag in task.tags}
    for name in names:
        if name not in tasks and name not in tags:
            raise UserError(f"--tasks {name!r}: is none of those that `megatron-sov eval suites` lists"
                            f"{nearest(name, [*tasks, *tags])}")
    return [task for task in tasks.values() if not names or task.name in names or set(task.tags) & set(names)]


@dataclass(frozen=True)
class DataCheck:
    """What is there of a task's data."""

    task: str
    missing: tuple[str, ...]
    """Files that are not there, below the folder of data."""
    num_items: int
    expected_items: int | None
    """Of the release that figures are published of; None: there is no such release."""
    problems: tuple[str, ...]
    """What is wrong with the files that are there."""

    @property
    def state(self) -> str:
        """Return `ready`, `missing` or `wrong`."""
        return "wrong" if self.problems else "missing" if self.missing else "ready"

    @property
    def note(self) -> str:
        """Return what a score should be read with: another number of items than the release has."""
        if self.missing or self.expected_items in (None, self.num_items):
            return ""
        return f"{self.num_items:,} items; the release has {self.expected_items:,}"


def check_data(task: TaskFile, data_dir: Path) -> DataCheck:
    """Return what is there of a task's data.

    Raises:
        UserError: the task's rules are none.
    """
    files = task.files(data_dir)
    beside = [data_dir / value.removeprefix(f"{DATA}/")
              for value in (task.sov.get("environment_settings") or {}).values()
              if isinstance(value, str) and value.startswith(f"{DATA}/")]
    missing = tuple(str(path.relative_to(data_dir)) for paths in [*files.values(), beside] for path in paths
                    if not path.is_file())
    there = {split: [path for path in paths if path.is_file()] for split, paths in files.items()}
    try:
        num_items, problems = TaskData.of(task.sov).check({s: p for s, p in there.items() if p})
    except UserError as e:
        raise UserError(f"task {task.name}: {e}") from None
    return DataCheck(task.name, missing, num_items, task.sov.get("items"), tuple(problems))


def require_data(task: TaskFile, data_dir: Path) -> None:
    """Do nothing where a task's data are there.

    Raises:
        UserError: they are not, or are wrong: each file is named with what belongs there.
    """
    found = check_data(task, data_dir)
    if found.problems:
        more = f"; and {len(found.problems) - 1} more problems" if found.problems[1:] else ""
        raise UserError(f"task {task.name}: {found.problems[0]}{more}; `megatron-sov eval suites check` "
                        "tells them all")
    if found.missing:
        fields = ", ".join(f"{name} ({rule})" for name, rule in task.sov.get("fields", {}).items())
        raise UserError(f"task {task.name}: --data-dir {data_dir} has no {', '.join(found.missing)}; put "
                        f"{task.sov.get('source', 'its data')} there in JSON lines with the fields {fields}")


MAX_FIELD_CHARS = 1 << 30
"""Of a column of a CSV file; a problem's packed tests are long."""
ENDINGS = (".jsonl", ".parquet", ".csv")


@dataclass(frozen=True)
class SuiteSpan:
    """Rows whose field is a text from one end up to, not including, the other."""

    field: str
    """Such as contest_date."""
    low: str
    """First text; empty: all before `high`."""
    high: str
    """First text that is out; empty: all from `low`."""

    @classmethod
    def of(cls, text: str) -> SuiteSpan:
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
          spans: list[SuiteSpan]) -> tuple[Path, int, int]:
    """Write a file of a task; it appears whole.

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
