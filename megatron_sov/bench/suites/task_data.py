"""The data of tasks: a user's JSON lines, checked row by row against the short rules of a task's file, and as
lm-eval takes them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sov.base.documents.rows import read_objects
from megatron_sov.base.errors import UserError

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
        """Return what a task's `metadata.sov` says."""
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
        """Yield (line, row, what is wrong with it)."""
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
        """Return what is wrong with a file, and count its rows by group."""
        told: list[str] = []
        num_rows = num_bad = 0
        try:
            for line, row, wrong in self._read(path):
                num_rows, num_bad = num_rows + 1, num_bad + bool(wrong)
                if wrong and num_bad <= MAX_TOLD:
                    told.append(f"{path}: line {line}: {wrong}")
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
        """Return the rule in words."""
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
            other = next((other for other in others if other in found), None)
            if other is not None:
                found[name] = found.pop(other)
    return found
