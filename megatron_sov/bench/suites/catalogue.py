"""The task files that come along, what each needs of the user's folder of data, and a publisher's file
brought there in the form that its task reads; JSON lines of the user's, checked row by row against the short
rules of a task's file, and as lm-eval takes them."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sov.base.artifacts import write_output
from megatron_sov.base.documents.rows import read_objects
from megatron_sov.base.errors import UserError, nearest
from megatron_sov.bench.lm.tasks import DATA, FoundTasks, TaskFolder, find
from megatron_sov.bench.suites.protocol import KEY, Protocol, protocol_of

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

OPTION = "--data-dir"
MAX_TOLD = 10
"""Bad rows that are named for each file."""
TEST = "test"
"""The split with the questions, and with the shots where a task has some: lm-eval hands the question that is
asked to what chooses shots only where both are of one split."""


@dataclass(frozen=True)
class TaskData:
    """What a task's `metadata.sov` says of its data."""

    fields: Mapping[str, str]
    """Field -> rule."""
    aliases: Mapping[str, list[str]]
    """Field -> other names that publishers give it."""
    group_field: str = ""
    """Field whose value shots have in common with the question, such as its subject; `file`: the file's
    name."""
    shots_file: str = ""
    """Split of `data_files` that the shots come from."""
    shots_per_group: int = 0
    """Shots that each group has at least."""

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> TaskData:
        return cls(metadata.get("fields", {}), metadata.get("aliases", {}), metadata.get("group_field", ""),
                   metadata.get("shots_file", ""), metadata.get("shots_per_group", 0))

    def rows(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (line, row) of a file; fields have the task's names.

        Raises:
            UserError: it cannot be read, or a row breaks a rule.
        """
        for line, row, wrong in self._read(path):
            if wrong:
                raise UserError(f"{OPTION} {path}: line {line}: {wrong}")
            yield line, row

    def _read(self, path: Path) -> Iterator[tuple[int, dict[str, Any], str]]:
        rules = rules_of(self.fields)
        for line, found in read_objects(path, OPTION):
            row = renamed(found, self.aliases)
            yield line, row, "; ".join(said for rule in rules if (said := rule.problem(row)))

    def check(self, files: Mapping[str, Sequence[Path]]) -> tuple[int, list[str]]:
        """Return how many questions there are, and all that is wrong with the files, the first rows of each.
        """
        groups: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
        problems: list[str] = []
        for split, paths in files.items():
            for path in paths:
                problems += self._problems(path, groups[split == self.shots_file])
        shots, asked = groups[True], groups[False]
        few = [group for group in sorted(asked) if shots[group] < self.shots_per_group]
        if few and self.shots_file in files:
            more = f"; so have {len(few) - 1} other groups" if few[1:] else ""
            problems.append(f"{files[self.shots_file][0]}: has {shots[few[0]]} shots of {few[0][:60]!r}, and "
                            f"needs {self.shots_per_group}{more}")
        return asked.total(), problems

    def _problems(self, path: Path, groups: Counter[str]) -> list[str]:
        told: list[str] = []
        num_rows = num_bad = 0
        try:
            for line, row, wrong in self._read(path):
                num_rows += 1
                if wrong:
                    num_bad += 1
                if wrong and num_bad <= MAX_TOLD:
                    told.append(f"{path}: line {line}: {wrong}")
                # Also rows with a mistake, so that one mistake is not told twice.
                groups[self.group(row, path)] += 1
        except UserError as e:
            return [*told, str(e).removeprefix(f"{OPTION} ")]
        if num_bad > MAX_TOLD:
            told.append(f"{path}: and {num_bad - MAX_TOLD:,} more rows")
        return told if num_rows else [f"{path}: has no rows"]

    def group(self, row: Mapping[str, Any], path: Path) -> str:
        return path.stem if self.group_field == "file" else str(row.get(self.group_field, ""))


def _plain(rule: TaskRule, value: Any) -> Any:
    """Return a value for a table, whose columns have one type: numbers beside texts become texts, what is
    nested becomes JSON."""
    if value is None or rule.kind not in ("value", "list", "object", "any"):
        return value
    return value if rule.kind == "value" and isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def load(data_files: Mapping[str, Any] | None = None, sov: Mapping[str, Any] | None = None,
         **_: Any) -> DatasetDict:
    """Return a task's data as lm-eval takes them (`custom_dataset` of a task file).

    Beside its own fields each row has `group`, `row` (its line) and `is_shot`.  JSON is not read by the
    library that lm-eval uses: that one guesses types from the first rows.

    Args:
        data_files: split -> file or files, of the task's `dataset_kwargs`.
        sov: of the task's metadata.

    Raises:
        UserError: a file is missing or a row breaks a rule, which is named.
    """
    from datasets import Dataset, DatasetDict

    data = TaskData.of(sov or {})
    rules = rules_of(data.fields)
    made: list[dict[str, Any]] = []
    for split, given in (data_files or {}).items():
        for name in [given] if isinstance(given, str) else given:
            path = Path(name)
            made += [{**{rule.name: _plain(rule, row.get(rule.name)) for rule in rules},
                      "group": data.group(row, path), "row": line, "is_shot": split == data.shots_file}
                     for line, row in data.rows(path)]
    if not any(not row["is_shot"] for row in made):
        raise UserError(f"--data-dir: {', '.join(map(str, (data_files or {}).values()))}: no questions are "
                        "there")
    return DatasetDict({TEST: Dataset.from_list(made)})


# The source of functions that task files name is part of a task's hash: a change parts new scores from old.
def questions(dataset: Dataset) -> Dataset:
    """Return the rows that are asked (`process_docs`)."""
    return dataset.select([i for i, is_shot in enumerate(dataset["is_shot"]) if not is_shot])


def shots(dataset: Dataset) -> Dataset:
    """Return the rows that are shown (`process_docs` of the shots)."""
    return dataset.select([i for i, is_shot in enumerate(dataset["is_shot"]) if is_shot])


_RULE = re.compile(r"(?P<kind>text|string|texts|integer|letter|value|list|object|any)"
                   r"(?: (?P<low>-?\d+|[A-J])(?:\.\.(?P<high>-?\d+|[A-J]))?)?(?P<optional> or null)?")
_KINDS: dict[str, Callable[[Any], bool]] = {
    "text": lambda v: isinstance(v, str) and bool(v.strip()),
    "string": lambda v: isinstance(v, str),
    "texts": lambda v: isinstance(v, list) and bool(v) and all(isinstance(part, str) for part in v),
    "integer": lambda v: type(v) is int,
    "letter": lambda v: isinstance(v, str) and len(v) == 1 and "A" <= v <= "J",
    "value": lambda v: type(v) in (int, float) or (isinstance(v, str) and bool(v.strip())),
    "list": lambda v: isinstance(v, list) and bool(v),
    "object": lambda v: isinstance(v, dict),
    "any": lambda v: True,
}
_TOLD = {"text": "a text that is not empty", "string": "a text", "texts": "a list of texts",
         "integer": "a whole number", "letter": "a letter", "value": "a text or a number",
         "list": "a list that is not empty", "object": "an object", "any": "there"}


class TaskRule:
    """A rule such as `text`, `texts 4`, `integer 0..3`, `letter A..D`; with `or null` at its end the field
    may be missing or null."""

    def __init__(self, name: str, rule: Any) -> None:
        """Read a rule.

        Raises:
            UserError: it is none.
        """
        match = _RULE.fullmatch(rule) if isinstance(rule, str) else None
        if match is None:
            raise UserError(f"the rule {rule!r} of the field {name!r} is none; write one of "
                            f"{', '.join(_KINDS)}, with a number or a span such as 0..3 behind it")
        self.name, self.kind, self.is_optional = name, match["kind"], bool(match["optional"])
        self._low, self._high = match["low"], match["high"]

    def problem(self, row: Mapping[str, Any]) -> str:
        """Return what is wrong with a row's field, or an empty text."""
        value = row.get(self.name)
        if value is None:
            if self.is_optional:
                return ""
            return f"{self.name!r} is null" if self.name in row else f"has no {self.name!r}"
        if not _KINDS[self.kind](value) or not self._in_bounds(value):
            shown = repr(value)
            return f"{self.name} = {shown if len(shown) <= 60 else shown[:57] + '...'} must be {self.told}"
        return ""

    def _in_bounds(self, value: Any) -> bool:
        if self._low is None:
            return True
        if self.kind == "texts":
            return int(self._low) <= len(value) <= int(self._high or self._low)
        if self.kind == "integer":
            return bool(int(self._low) <= value <= int(self._high or self._low))
        return bool(self._low <= value <= (self._high or self._low)) if self.kind == "letter" else True

    @property
    def told(self) -> str:
        said = _TOLD[self.kind]
        if self._low is None:
            return said
        span = self._low if self._high is None else f"{self._low} to {self._high}"
        return f"a list of {span} texts" if self.kind == "texts" else f"{said} from {span}"


def rules_of(fields: Any) -> list[TaskRule]:
    """Return the rules of a task file's `fields`; raises as `TaskRule` does."""
    if not isinstance(fields, Mapping) or not fields:
        raise UserError("`fields` must be an object of field -> rule")
    return [TaskRule(str(name), rule) for name, rule in fields.items()]


def renamed(row: Mapping[str, Any], aliases: Mapping[str, list[str]]) -> dict[str, Any]:
    """Return a row whose fields have the task's names; publishers differ in them."""
    found = dict(row)
    for name, others in aliases.items():
        if name not in found:
            # The first alias that is there; a field under its own name wins.
            other = next((other for other in others if other in found), None)
            if other is not None:
                found[name] = found.pop(other)
    return found


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
        tag = self.config.get("tag") or ()
        return (tag,) if isinstance(tag, str) else tuple(tag)

    @property
    def told_files(self) -> dict[str, list[str]]:
        given = (self.config.get("dataset_kwargs") or {}).get("data_files") or {}
        listed = {split: [files] if isinstance(files, str) else files for split, files in given.items()}
        return {split: [name.removeprefix(f"{DATA}/") for name in names] for split, names in listed.items()}

    def files(self, data_dir: Path) -> dict[str, list[Path]]:
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
        if self.problems:
            return "wrong"
        return "missing" if self.missing else "ready"

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
