"""Read pipeline files (sources, steps, output), and report every mistake with its line at once."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from annotated_types import Ge
from pydantic import TypeAdapter

from data_prep.curate.pipeline.step import (
    READY, RECORD_COLUMNS, SOURCE_COLUMNS, STEPS, ColumnType, Step, load_step_class)
from data_prep.curate.sources.source import KINDS, SourceSettings
from data_prep.libraries import find_library_problems
from megatron_sov.base.errors import UserError, find_nearest_name, format_problems, suggest_name
from megatron_sov.base.hints.removed import PIPELINE, suggest_successor
from megatron_sov.base.hints.table import index_words, normalize_word
from megatron_sov.base.settings import (
    LocatedDocument, NotBlank, Place, find_rule_problems, parse_located_yaml, read_settings_text,
    require_that, split_key, try_parse_settings)

PrintableText = Annotated[NotBlank, require_that(str.isprintable, "must have no control characters")]
OPEN_COLUMNS = frozenset([*RECORD_COLUMNS, "where", "extra"])
"""Columns with values from documents, whose number is not limited."""
MISSING_VALUE = "none"
"""Replaces null in a name."""


def resolve_paths(settings: Any, folder: Path) -> Any:
    """Join relative paths in settings with a folder."""
    if isinstance(settings, Path):
        return settings if settings == Path() else folder / settings
    if isinstance(settings, (tuple, list)):
        return type(settings)(resolve_paths(value, folder) for value in settings)
    if isinstance(settings, dict):
        return {key: resolve_paths(value, folder) for key, value in settings.items()}
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        # The constructor computes fields with `init=False`.
        changed = {f.name: resolve_paths(getattr(settings, f.name), folder)
                   for f in dataclasses.fields(settings) if f.init}
        return dataclasses.replace(settings, **changed)
    return settings


@dataclass(frozen=True)
class StepFilter:
    """Selects documents for a step; the rest stays unchanged."""

    sources: tuple[str, ...] = ()
    """Source names; (): every source."""
    kinds: tuple[str, ...] = ()
    """Values in the column `kind`; (): every kind."""


@dataclass(frozen=True)
class StepEntry:
    """A step as written in the pipeline file."""

    number: int
    """Position in the file, from 1."""
    kind: str
    written: Mapping[str, Any]
    """Settings as in the file, without defaults."""
    only: StepFilter = field(default_factory=StepFilter)

    def build_step(self, folder: Path) -> Step:
        """Create the step; relative paths start at `folder`."""
        cls = load_step_class(self.kind)
        settings, problems = try_parse_settings(cls.Settings, self.written)
        assert not problems, problems
        return cls(resolve_paths(settings, folder))

    def to_settings(self) -> Any:
        """Return plain values with defaults, and paths as in the file."""
        settings = try_parse_settings(load_step_class(self.kind).Settings, self.written)[0]
        return json.loads(TypeAdapter(type(settings)).dump_json(settings))


@dataclass(frozen=True)
class OutputSettings:
    """How to name sources in the output."""

    name: str = "{source}"
    """Pattern for a document's output name; columns in braces."""


@dataclass(frozen=True)
class Pipeline:
    """Content of a pipeline file."""

    folder: Path
    """Folder of the file, where relative paths start."""
    name: str
    sources: tuple[SourceSettings, ...]
    steps: tuple[StepEntry, ...] = ()
    shard_bytes: int = 256_000_000
    """Approximate raw bytes in a shard."""
    on_bad: str = "quarantine"
    """quarantine: list broken files and records; refuse: stop at the first."""
    output: OutputSettings = field(default_factory=OutputSettings)


@dataclass(frozen=True)
class _Head:
    """Keys with a single value."""

    name: PrintableText
    shard_bytes: Annotated[int, Ge(1000)] = Pipeline.shard_bytes
    on_bad: Literal["quarantine", "refuse"] = "quarantine"


def load_pipeline(file: Path) -> Pipeline:
    """Read a pipeline file; raises `UserError` for an unreadable file, or with the mistakes by line."""
    if not file.is_file():
        raise UserError(f"{file}: {'is a folder' if file.is_dir() else 'does not exist'}; pass a pipeline "
                        f"file: `cp {READY / 'tiny.yaml'} {file}`, and name your files in its `sources`")
    return read_pipeline(file, parse_located_yaml(read_settings_text(file)))


def read_pipeline(file: Path, located: LocatedDocument) -> Pipeline:
    """Build the pipeline from parsed values; raises `UserError` with the mistakes by line.

    Args:
        file: for messages; relative paths start in the file's folder.
        located: values with lines.
    """
    reader = _PipelineReader(file.absolute().parent, located)
    pipeline = reader.read_pipeline()
    if problems := sorted(set(reader.problems)):
        raise UserError(format_problems(str(file),
                                        [f"{file}:{line}: {sentence}" for line, sentence in problems]))
    assert pipeline is not None
    return pipeline


class _PipelineReader:
    """Parses a file and collects problems."""

    def __init__(self, folder: Path, located: LocatedDocument) -> None:
        self.folder, self.located = folder, located
        self.problems: list[tuple[int, str]] = [(p.line, p.sentence) for p in located.problems]
        """Line and sentence."""
        self.columns: dict[str, ColumnType] = dict(SOURCE_COLUMNS)

    def add_problem(self, place: Place, sentence: str) -> None:
        self.problems.append((self.located.line(place), sentence))

    def read_pipeline(self) -> Pipeline | None:
        """Return the pipeline, or None if the file has problems."""
        raw = self.located.value
        if not isinstance(raw, dict):
            if not self.problems:
                self.add_problem(
                    (), "holds no mapping; begin with `name:`, `sources:` and `steps:`, as the YAML "
                    "files in data_prep/curate/pipelines do; code of datatrove runs by its own "
                    "executors, and `sov-data pack --input FILE` reads the .jsonl that it writes")
            return None
        parts = ("sources", "steps", "output")
        known = [f.name for f in dataclasses.fields(_Head)] + list(parts)
        for key in raw:
            if key not in known:
                hint = suggest_successor(str(key), PIPELINE) or suggest_name(key, known)
                self.add_problem((key,), f"{key}: is no key of a pipeline{hint}")
        # Reading continues after a mistake, so that the user sees all mistakes at once.
        head_values = {key: value for key, value in raw.items() if key in known and key not in parts}
        head = self._parse_part(_Head, head_values, ())
        sources = tuple(self._parse_sources(raw.get("sources")))
        written = raw["sources"] if isinstance(raw.get("sources"), list) else []
        # From the file instead of `sources`: `only` may name a source with a mistake.
        kinds = {str(entry.get("name")): str(entry.get("kind") or "") for entry in written
                 if isinstance(entry, dict)}
        steps = tuple(self._parse_steps(raw.get("steps") or [], kinds))
        output = self._parse_part(OutputSettings, raw.get("output") or {}, ("output",))
        if output:
            # After all steps have added their columns.
            for sentence in find_pattern_problems(output.name, self.columns, _list_adding_steps):
                self.add_problem(("output", "name"), f"name = {output.name!r}: {sentence}")
        if self.problems or head is None or output is None:
            return None
        return Pipeline(self.folder, head.name, sources, steps, head.shard_bytes, head.on_bad, output)

    def _parse_part(self, cls: type[Any], written: Any, place: Place, kind: str = "") -> Any:
        """Parse settings with resolved paths, or return None after adding problems.

        Args:
            cls: settings class.
            written: values from the file.
            place: for problems.
            kind: our step's name, if the file has a foreign name.
        """
        if not isinstance(written, dict):
            self.add_problem(place, f"{place[-1]} = {written!r}: must be a mapping of settings")
            return None
        kind = kind or "".join(map(str, place[-1:]))
        settings, problems = try_parse_settings(cls, written, partial(_suggest_setting, kind))
        if settings is not None:
            settings = resolve_paths(settings, self.folder)
            # Rules may open files, which needs resolved paths.
            problems = find_rule_problems(settings)
        for problem in problems:
            self.add_problem((*place, *split_key(problem.key)), problem.sentence)
        return None if problems else settings

    def _parse_sources(self, written: Any) -> Iterator[SourceSettings]:
        if not isinstance(written, list) or not written:
            self.add_problem(
                ("sources",), "sources: must be a list of at least one source, each with `name` and `path`")
            return
        names: dict[str, int] = {}
        for i, entry in enumerate(written):
            place: Place = ("sources", i)
            if not isinstance(entry, dict):
                self.add_problem(place, f"{entry!r}: a source is a mapping with `name` and `path`")
                continue
            if "folder" in entry:
                self.add_problem(
                    (*place, "folder"), "folder: is no setting here; paths start at the pipeline file")
            path = {"path": [entry["path"]]} if isinstance(entry.get("path"), str) else {}
            source = self._parse_part(SourceSettings, {**entry, **path, "folder": str(self.folder)}, place)
            name = entry.get("name")
            if isinstance(name, str) and names.setdefault(name, i) != i:
                self.add_problem(
                    (*place, "name"), f"name = {name!r}: line "
                    f"{self.located.line(('sources', names[name], 'name'))} has a source of that name; "
                    "name them apart")
            elif source is not None:
                yield source

    def _parse_steps(self, written: Any, sources: Mapping[str, str]) -> Iterator[StepEntry]:
        """Yield the steps; `sources`: name -> kind as in the file."""
        if not isinstance(written, list):
            self.add_problem(("steps",), f"steps = {written!r}: must be a list of steps")
            return
        has_kind_step = False
        for i, raw in enumerate(written):
            place: Place = ("steps", i)
            entry = {raw: {}} if isinstance(raw, str) else raw
            kinds = [key for key in entry if key != "only"] if isinstance(entry, dict) else []
            if len(kinds) != 1:
                self.add_problem(
                    place, f"step {i + 1}: must be the name of one step with its settings, and at most "
                    "`only` beside it")
            else:
                kind = kinds[0]
                if kind not in STEPS:
                    kind = self._resolve_unknown_step(kind, (*place, kind))
                if kind not in STEPS:
                    continue
                only = self._parse_part(StepFilter, entry.get("only") or {}, (*place, "only"))
                if only is not None:
                    self._check_only(only, sources, (*place, "only"))
                    if not has_kind_step:
                        self._check_kinds_before(only, sources, (*place, "only"))
                # After the step `kind`, a document may have any kind.
                has_kind_step |= kind == "kind"
                yield from self._parse_step(StepEntry(i + 1, kind, {}, only or StepFilter()), entry[kinds[0]],
                                            (*place, kinds[0]))

    def _resolve_unknown_step(self, name: str, place: Place) -> str:
        """Add a problem for an unknown step; return the likely step, or the name."""
        likely = next(iter(index_words("steps").get(normalize_word(name), ())), "")
        if likely in STEPS:
            hint = f"; it is {likely} here"
        elif likely:
            hint = suggest_successor(likely, PIPELINE) or (
                f"; `{likely}:` of the file does this, outside `steps`")
        else:
            likely = find_nearest_name(name, STEPS)
            hint = suggest_successor(name, PIPELINE) or suggest_name(name, STEPS)
            hint += f" (there are: {', '.join(STEPS)})"
        self.add_problem(place, f"{name}: is no step{hint}")
        return likely or name

    def _check_kinds_before(self, only: StepFilter, sources: Mapping[str, str], place: Place) -> None:
        """Add a problem if no document has a kind in `only`: the step `kind` comes later or is missing."""
        kinds = {name: kind for name, kind in sources.items() if not only.sources or name in only.sources}
        if not only.kinds or not kinds:
            return
        if unknown := [name for name, kind in kinds.items() if kind == "auto"]:
            self.add_problem(
                (*place, "kinds"), f"kinds: the kind of source {unknown[0]!r} is auto, and not known "
                "here; put the step kind before this one")
        elif not set(only.kinds) & set(kinds.values()):
            self.add_problem(
                (*place, "kinds"), f"kinds = {', '.join(only.kinds)}: no source here is of such a "
                "kind, so no document would be looked at; mend it, or put the step kind before this one")

    def _check_only(self, only: StepFilter, sources: Mapping[str, str], place: Place) -> None:
        for name in only.sources:
            if name not in sources:
                self.add_problem(
                    (*place, "sources"),
                    f"sources = {name!r}: there is no such source{suggest_name(name, sources)}")
        for kind in only.kinds:
            if kind not in KINDS:
                self.add_problem(
                    (*place, "kinds"), f"kinds = {kind!r}: must be of {', '.join(filter(None, KINDS))}"
                    f"{suggest_name(kind, KINDS)}")

    def _parse_step(self, entry: StepEntry, written: Any, place: Place) -> Iterator[StepEntry]:
        cls = load_step_class(entry.kind)
        if cls.shorthand and isinstance(written, (str, int, float)):
            written = {cls.shorthand: written}
        settings = self._parse_part(cls.Settings, {} if written is None else written, place, entry.kind)
        if settings is None:
            # The columns count: otherwise this mistake would cause problems in later steps.
            self._add_columns(cls.added_columns, entry.kind, place)
            return
        step = cls(settings)
        for file in step.list_files():
            if not Path(file).exists():
                self.add_problem(
                    place, f"{entry.kind}: {file} does not exist; mend the path, which starts at the "
                    "pipeline file")
        for name in step.needed_columns:
            if name not in self.columns:
                steps = _list_adding_steps(name)
                fix = f"put the step {' or '.join(steps)} before it" if steps else "no step gives it"
                self.add_problem(
                    place, f"{entry.kind}: needs the column {name!r}, which nothing before it gives; {fix}")
        self._add_columns(step.added_columns, entry.kind, place)
        yield dataclasses.replace(entry, written=written or {})

    def _add_columns(self, columns: Mapping[str, ColumnType], kind: str, place: Place) -> None:
        for name, column_type in columns.items():
            # Two steps may write the same column (the later value wins), but with one type.
            previous = self.columns.setdefault(name, column_type)
            if previous != column_type:
                self.add_problem(
                    place, f"{kind}: adds the column {name!r} of type {column_type}, which has the "
                    f"type {previous} before it; leave one of the steps out")


def _suggest_setting(kind: str, key: str) -> str:
    """Return our name for a step's removed or foreign setting; "": unknown."""
    names = index_words("steps").get(normalize_word(f"{kind}.{key}"), ())
    return suggest_successor(f"{kind}.{key}", PIPELINE).removeprefix("; ") or "".join(
        f"it is {name.rpartition('.')[2]} here" for name in names)


def _list_adding_steps(column: str) -> list[str]:
    return [kind for kind in STEPS if column in load_step_class(kind).added_columns]


def find_missing_libraries(pipeline: Pipeline) -> list[str]:
    """Return a sentence for each step with an optional library that is not installed."""
    sentences = [sentence for entry in pipeline.steps for sentence in find_library_problems(
        f"step {entry.kind}", *entry.build_step(pipeline.folder).list_libraries())]
    return list(dict.fromkeys(sentences))


def check_libraries(pipeline: Pipeline, file: Path) -> None:
    """Raise `UserError`, which names `file`, if a step's optional library is not installed."""
    if missing := find_missing_libraries(pipeline):
        raise UserError(format_problems(str(file), missing))


# Names of the output's sources, made of documents' columns.


def find_pattern_problems(pattern: str, columns: Mapping[str, ColumnType],
                          list_steps: Callable[[str], Sequence[str]] = lambda column: ()) -> list[str]:
    """Return a sentence for each broken rule.

    Args:
        pattern: column names in braces, and literal text.
        columns: documents' columns.
        list_steps: column -> steps that add the column.
    """
    usable = [name for name, kind in columns.items()
              if kind in ("string", "bool") and name not in OPEN_COLUMNS]
    try:
        parts = list(Formatter().parse(pattern))
    except ValueError as e:
        return [f"{e}; write columns in braces, e.g. '{{kind}}-{{level}}'"]
    problems = []
    for _, name, _, _ in parts:
        if name is not None and name not in usable:
            steps = [] if name in columns else list_steps(name)
            hint = f"; add the step {' or '.join(steps)}" if steps else suggest_name(name, usable)
            problems.append(f"{{{name}}} is no column that names can be made of here{hint} "
                            f"(there are: {', '.join(usable)})")
    if any(spec or conversion for _, _, spec, conversion in parts):
        problems.append("names take columns as they are; write nothing but their names in braces")
    literal = "".join(text for text, _, _, _ in parts)
    if not pattern or re.search(r"[^\w.-]", literal) or pattern.startswith((".", "-")):
        problems.append("must be letters, digits, '.', '_', '-' and columns in braces")
    return problems


def format_output_name(pattern: str, source: str, columns: Mapping[str, Any]) -> str:
    def format_value(name: str) -> str:
        value = source if name == "source" else columns.get(name)
        if isinstance(value, bool):
            return "yes" if value else "no"
        # Names become folders, so values must not form paths.
        return re.sub(r"[^\w.-]", "-", value or MISSING_VALUE)

    output_name = "".join(literal + ("" if name is None else format_value(name))
                          for literal, name, _, _ in Formatter().parse(pattern))
    # Dataset readers skip names that begin with "." or "_".
    return output_name if output_name[:1].isalnum() else f"x{output_name}"
