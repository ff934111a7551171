"""The file of a pipeline: sources, steps, output; every mistake in it is told at once, with its line."""

from __future__ import annotations

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

from data_prep.curate.pipeline.step import SOURCE_COLUMNS, STEPS, ColumnType, Step, load_step_class
from data_prep.curate.pipelines import READY
from data_prep.curate.sources.source import KINDS, SourceSettings
from megatron_sov.base.artifacts import MANIFEST
from megatron_sov.base.errors import UserError, find_nearest_name, format_problems, suggest_name
from megatron_sov.base.hints.removed import PIPELINE, suggest_successor
from megatron_sov.base.hints.table import index_words, normalize_word
from megatron_sov.base.settings import (
    AtLeastOne, Bound, Fraction, LocatedDocument, NotBlank, Place, ProblemCode, SettingsProblem,
    find_rule_problems, parse_located_yaml, read_settings_text, split_key, try_parse_settings)

# Settings of steps: paths that start at the pipeline file, and plain values to write down.


def resolve_paths(settings: Any, folder: Path) -> Any:
    """Return settings whose relative paths start at a folder instead of at the current one."""
    if isinstance(settings, Path):
        return settings if settings == Path() else folder / settings
    if isinstance(settings, (tuple, list)):
        return type(settings)(resolve_paths(value, folder) for value in settings)
    if isinstance(settings, dict):
        return {key: resolve_paths(value, folder) for key, value in settings.items()}
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        # Fields that the constructor does not take are made from those that it does.
        changed = {f.name: resolve_paths(getattr(settings, f.name), folder)
                   for f in dataclasses.fields(settings) if f.init}
        return dataclasses.replace(settings, **changed)
    return settings


def to_plain_values(settings: Any) -> Any:
    return json.loads(TypeAdapter(type(settings)).dump_json(settings))


@dataclass(frozen=True)
class StepFilter:
    """Which documents a step looks at; others pass untouched."""

    sources: tuple[str, ...] = ()
    """Names of sources; empty: all."""
    kinds: tuple[str, ...] = ()
    """Values of the column `kind`; empty: all."""


@dataclass(frozen=True)
class StepEntry:
    number: int
    """Place in the file, from 1."""
    kind: str
    written: Mapping[str, Any]
    """Its settings as they stand in the file."""
    only: StepFilter = field(default_factory=StepFilter)

    def build_step(self, folder: Path) -> Step:
        """Return the step, its relative paths starting at the pipeline file's folder."""
        cls = load_step_class(self.kind)
        settings, problems = try_parse_settings(cls.Settings, self.written)
        assert not problems, problems
        return cls(resolve_paths(settings, folder))

    def to_settings(self) -> Any:
        """Return all settings as plain values, defaults filled in, paths as they are written."""
        return to_plain_values(try_parse_settings(load_step_class(self.kind).Settings, self.written)[0])


@dataclass(frozen=True)
class OutputSettings:
    """What becomes of the documents that are kept."""

    name: str = "{source}"
    """Name of the output's source that a document goes to, made of columns in braces."""


@dataclass(frozen=True)
class PackEntry:
    """How the output is packed into token shards."""

    tokenizer: Path
    """Tokenizer that `sov-tokenizer train` wrote."""
    heldout: Fraction = 0.02
    """Expected part of the documents in the split "heldout", in [0, 1)."""
    bos: Literal["none", "start"] = "none"
    """start: documents begin with bos."""
    eod: Literal["append", "none"] = "append"
    """append: documents end with eos."""
    shard_tokens: AtLeastOne = 2_000_000_000
    """Most tokens of one shard."""

    def problems(self) -> list[SettingsProblem]:
        return [] if (self.tokenizer / MANIFEST).is_file() else [SettingsProblem(
            ProblemCode.FILE, "tokenizer", "holds no tokenizer", self.tokenizer,
            "train one with `sov-tokenizer train`, or leave `pack` out")]


@dataclass(frozen=True)
class Pipeline:
    """What a pipeline file says."""

    folder: Path
    """Where it lies; its relative paths start there."""
    name: str
    """For people, and for the card."""
    sources: tuple[SourceSettings, ...]
    """Raw documents."""
    steps: tuple[StepEntry, ...] = ()
    """What is done with them, in order."""
    shard_bytes: int = 256_000_000
    """Bytes on the disk of the pieces that make up one shard, about."""
    on_bad: str = "quarantine"
    """quarantine: broken files and records are listed and the run goes on; refuse: it stops at the first."""
    output: OutputSettings = field(default_factory=OutputSettings)
    """Where documents go that are kept."""
    pack: PackEntry | None = None
    """How they are packed; None: the output is text."""


PrintableText = Annotated[NotBlank, Bound(lambda text: None if text.isprintable() else (
    ProblemCode.BOUND, "must have no control characters", ""))]


@dataclass(frozen=True)
class _Head:
    """The keys of the file that hold one value."""

    name: PrintableText
    shard_bytes: Annotated[int, Ge(1000)] = Pipeline.shard_bytes
    on_bad: Literal["quarantine", "refuse"] = "quarantine"


def load_pipeline(file: Path) -> Pipeline:
    """Read a pipeline file.

    Raises:
        UserError: it cannot be read, or has mistakes; all of them are told, by line.
    """
    if not file.is_file():
        raise UserError(f"{file}: {'is a folder' if file.is_dir() else 'does not exist'}; pass a pipeline "
                        f"file: `cp {READY / 'tiny.yaml'} {file}`, and name your files in its `sources`")
    return read_pipeline(file, parse_located_yaml(read_settings_text(file)))


def read_pipeline(file: Path, located: LocatedDocument) -> Pipeline:
    """Return the pipeline of values that stand in a file.

    Args:
        file: for messages; relative paths start in its folder.
        located: the values, and where they stand.

    Raises:
        UserError: they have mistakes; all of them are told, by line.
    """
    reader = _FileReader(file.absolute().parent, located)
    pipeline = reader.read()
    if found := sorted(set(reader.found)):
        raise UserError(format_problems(str(file),
                                        [f"{file}:{line}: {sentence}" for line, sentence in found]))
    assert pipeline is not None
    return pipeline


class _FileReader:
    """Reads one file, and collects what is wrong with it."""

    def __init__(self, folder: Path, located: LocatedDocument) -> None:
        self.folder, self.located = folder, located
        self.found: list[tuple[int, str]] = [(p.line, p.sentence) for p in located.problems]
        self.columns: dict[str, ColumnType] = dict(SOURCE_COLUMNS)

    def tell(self, place: Place, sentence: str) -> None:
        self.found.append((self.located.line(place), sentence))

    def read(self) -> Pipeline | None:
        """Return the pipeline, or None where not even its outline stands."""
        raw = self.located.value
        if not isinstance(raw, dict):
            if not self.found:
                self.tell((), "holds no mapping; begin with `name:`, `sources:` and `steps:`, as the YAML "
                          "files in data_prep/curate/pipelines do; code of datatrove runs by its own "
                          "executors, and `sov-data pack --input FILE` reads the .jsonl that it writes")
            return None
        parts = ("sources", "steps", "output", "pack")
        known = [f.name for f in dataclasses.fields(_Head)] + list(parts)
        for key in raw:
            if key not in known:
                self.tell((key,), f"{key}: is no key of a pipeline{suggest_name(key, known)}")
        # Reading goes on after a mistake, so that a user sees all of them at once.
        head = self._part(_Head, {k: v for k, v in raw.items() if k in known and k not in parts}, ())
        sources = tuple(self._sources(raw.get("sources")))
        written = raw["sources"] if isinstance(raw.get("sources"), list) else []
        # From what is written and not from what was read: a source with a mistake still counts as one that
        # `only` may name.
        kinds = {str(entry.get("name")): str(entry.get("kind") or "") for entry in written
                 if isinstance(entry, dict)}
        steps = tuple(self._steps(raw.get("steps") or [], kinds))
        output = self._part(OutputSettings, raw.get("output") or {}, ("output",))
        if output:
            # Last, when all steps have added their columns.
            for sentence in find_pattern_problems(output.name, self.columns, _givers):
                self.tell(("output", "name"), f"name = {output.name!r}: {sentence}")
        pack = self._part(PackEntry, raw["pack"], ("pack",)) if raw.get("pack") is not None else None
        if self.found or head is None or output is None:
            return None
        return Pipeline(self.folder, head.name, sources, steps, head.shard_bytes, head.on_bad, output, pack)

    def _part(self, cls: type[Any], written: Any, place: Place, kind: str = "") -> Any:
        """Return a part of the file as its dataclass with paths resolved, or None; notes what is wrong.

        `kind` is the step, if the file writes another program's name for it.
        """
        if not isinstance(written, dict):
            self.tell(place, f"{place[-1]} = {written!r}: must be a mapping of settings")
            return None
        kind = kind or "".join(map(str, place[-1:]))
        settings, problems = try_parse_settings(cls, written, partial(_suggest_setting, kind))
        if settings is not None:
            settings = resolve_paths(settings, self.folder)
            # Rules may open files, so paths are resolved first.
            problems = find_rule_problems(settings)
        for problem in problems:
            self.tell((*place, *split_key(problem.key)), problem.sentence)
        return None if problems else settings

    def _sources(self, written: Any) -> Iterator[SourceSettings]:
        if not isinstance(written, list) or not written:
            self.tell(("sources",), "sources: must be a list of at least one source, each with `name` and "
                                    "`path`")
            return
        names: dict[str, int] = {}
        for i, entry in enumerate(written):
            place: Place = ("sources", i)
            if not isinstance(entry, dict):
                self.tell(place, f"{entry!r}: a source is a mapping with `name` and `path`")
                continue
            if "folder" in entry:
                self.tell((*place, "folder"), "folder: is no setting here; paths start at the pipeline file")
            path = {"path": [entry["path"]]} if isinstance(entry.get("path"), str) else {}
            given = {**entry, **path, "folder": str(self.folder)}
            source = self._part(SourceSettings, given, place)
            name = entry.get("name")
            if isinstance(name, str) and names.setdefault(name, i) != i:
                self.tell((*place, "name"), f"name = {name!r}: line "
                          f"{self.located.line(('sources', names[name], 'name'))} has a source of that name; "
                          "name them apart")
            elif source is not None:
                yield source

    def _steps(self, written: Any, sources: Mapping[str, str]) -> Iterator[StepEntry]:
        """Yield the steps; `sources`: name -> kind, as they are written."""
        if not isinstance(written, list):
            self.tell(("steps",), f"steps = {written!r}: must be a list of steps")
            return
        are_kinds_told = False
        for i, raw in enumerate(written):
            place: Place = ("steps", i)
            entry = {raw: {}} if isinstance(raw, str) else raw
            kinds = [key for key in entry if key != "only"] if isinstance(entry, dict) else []
            if len(kinds) != 1:
                self.tell(place, f"step {i + 1}: must be the name of one step with its settings, and at most "
                                 "`only` beside it")
            else:
                kind = kinds[0]
                if kind not in STEPS:
                    kind = self._tell_unknown(kind, (*place, kind))
                if kind not in STEPS:
                    continue
                only = self._part(StepFilter, entry.get("only") or {}, (*place, "only"))
                if only is not None:
                    self._check_only(only, sources, (*place, "only"))
                    if not are_kinds_told:
                        self._check_kinds_before(only, sources, (*place, "only"))
                # From the step `kind` on, any document may be of any kind.
                are_kinds_told |= kind == "kind"
                yield from self._step(StepEntry(i + 1, kind, {}, only or StepFilter()), entry[kinds[0]],
                                      (*place, kinds[0]))

    def _tell_unknown(self, name: str, place: Place) -> str:
        """Note a step of an unknown name; return the step that it means, or the name."""
        meant = next(iter(index_words("steps").get(normalize_word(name), ())), "")
        if meant in STEPS:
            close = f"; it is {meant} here"
        elif meant:
            close = f"; `{meant}:` of the file does this, outside `steps`"
        else:
            meant = find_nearest_name(name, STEPS)
            close = suggest_successor(name, PIPELINE) or suggest_name(name, STEPS)
            close += f" (there are: {', '.join(STEPS)})"
        self.tell(place, f"{name}: is no step{close}")
        return meant or name

    def _check_kinds_before(self, only: StepFilter, sources: Mapping[str, str], place: Place) -> None:
        """Note that a step would pass over documents of the kinds that it names, since the step `kind`, which
        tells them, comes later or never."""
        asked = {name: kind for name, kind in sources.items() if not only.sources or name in only.sources}
        if not only.kinds or not asked:
            return
        if unknown := [name for name, kind in asked.items() if kind == "auto"]:
            self.tell((*place, "kinds"), f"kinds: the kind of source {unknown[0]!r} is auto, and not known "
                                         "here; put the step kind before this one")
        elif not set(only.kinds) & set(asked.values()):
            self.tell((*place, "kinds"), f"kinds = {', '.join(only.kinds)}: no source here is of such a "
                                         "kind, so no document would be looked at; mend it, or put the step "
                                         "kind before this one")

    def _check_only(self, only: StepFilter, sources: Mapping[str, str], place: Place) -> None:
        for name in only.sources:
            if name not in sources:
                self.tell((*place, "sources"), f"sources = {name!r}: there is no such source"
                                               f"{suggest_name(name, sources)}")
        for kind in only.kinds:
            if kind not in KINDS:
                self.tell((*place, "kinds"), f"kinds = {kind!r}: must be of {', '.join(filter(None, KINDS))}"
                                             f"{suggest_name(kind, KINDS)}")

    def _step(self, entry: StepEntry, written: Any, place: Place) -> Iterator[StepEntry]:
        try:
            cls = load_step_class(entry.kind)
        except UserError as e:
            self.tell(place, str(e))
            return
        if cls.shorthand and isinstance(written, (str, int, float)):
            written = {cls.shorthand: written}
        settings = self._part(cls.Settings, {} if written is None else written, place, entry.kind)
        if settings is None:
            # The columns count even so: steps behind would else be called wrong for this step's mistake.
            self._add_columns(cls.added_columns, entry.kind, place)
            return
        step = cls(settings)
        for file in step.list_files():
            if not Path(file).exists():
                self.tell(place, f"{entry.kind}: {file} does not exist; mend the path, which starts at the "
                                 "pipeline file")
        for name in step.needed_columns:
            if name not in self.columns:
                givers = _givers(name)
                way = f"put the step {' or '.join(givers)} before it" if givers else "no step gives it"
                self.tell(place, f"{entry.kind}: needs the column {name!r}, which nothing before it gives; "
                                 f"{way}")
        self._add_columns(step.added_columns, entry.kind, place)
        yield dataclasses.replace(entry, written=written or {})

    def _add_columns(self, adds: Mapping[str, ColumnType], kind: str, place: Place) -> None:
        for name, column_type in adds.items():
            # Two steps may write the same column (the later value wins), but not of two types.
            before = self.columns.setdefault(name, column_type)
            if before != column_type:
                self.tell(place, f"{kind}: adds the column {name!r} of type {column_type}, which has the "
                                 f"type {before} before it; leave one of the steps out")


def _suggest_setting(kind: str, key: str) -> str:
    """Return our name of a removed or foreign setting of a step; "": unknown."""
    ours = index_words("steps").get(normalize_word(f"{kind}.{key}"), ())
    return suggest_successor(f"{kind}.{key}", PIPELINE).removeprefix("; ") or "".join(
        f"it is {name.rpartition('.')[2]} here" for name in ours)


def _givers(column: str) -> list[str]:
    return [kind for kind in STEPS if column in load_step_class(kind).added_columns]


# Names of the output's sources, made of documents' columns.


OPEN_COLUMNS = frozenset(["where", "url", "title", "date", "own_id", "extra", "licence", "language_hint"])
"""Columns whose values documents choose themselves: as names they would be without end."""
MISSING_VALUE = "none"
"""Stands for a value that a document lacks."""


def find_pattern_problems(pattern: str, columns: Mapping[str, ColumnType],
                       givers: Callable[[str], Sequence[str]] = lambda column: ()) -> list[str]:
    """Return one sentence for each rule that a pattern of names breaks.

    Args:
        pattern: names of columns in braces, and what stands between them.
        columns: the columns that documents have.
        givers: tells which steps would add a column.
    """
    usable = [name for name, kind in columns.items()
              if kind in ("string", "bool") and name not in OPEN_COLUMNS]
    try:
        parts = list(Formatter().parse(pattern))
    except ValueError as e:
        return [f"{e}; write columns in braces, e.g. '{{kind}}-{{level}}'"]
    found = [f"{{{name}}} is no column that names can be made of here{_way(name, usable, columns, givers)} "
             f"(there are: {', '.join(usable)})" for _, name, _, _ in parts
             if name is not None and name not in usable]
    if any(spec or conversion for _, _, spec, conversion in parts):
        found.append("names take columns as they are; write nothing but their names in braces")
    literal = "".join(text for text, _, _, _ in parts)
    if not pattern or re.search(r"[^\w.-]", literal) or pattern.startswith((".", "-")):
        found.append("must be letters, digits, '.', '_', '-' and columns in braces")
    return found


def list_pattern_columns(pattern: str) -> frozenset[str]:
    return frozenset(name for _, name, _, _ in Formatter().parse(pattern) if name)


def _way(name: str, usable: Sequence[str], columns: Mapping[str, ColumnType],
         givers: Callable[[str], Sequence[str]]) -> str:
    steps = [] if name in columns else givers(name)
    return f"; add the step {' or '.join(steps)}" if steps else suggest_name(name, usable)


def format_output_name(pattern: str, source: str, columns: Mapping[str, Any]) -> str:
    """Return the name of the output's source that a document goes to."""
    def text(name: str) -> str:
        value = source if name == "source" else columns.get(name)
        if isinstance(value, bool):
            return "yes" if value else "no"
        # Names become folders: no text of a document may form a path.
        return re.sub(r"[^\w.-]", "-", value or MISSING_VALUE)

    made = "".join(literal + ("" if name is None else text(name))
                   for literal, name, _, _ in Formatter().parse(pattern))
    # A name that begins with "." or "_" would be passed over by readers of datasets.
    return made if made[:1].isalnum() else f"x{made}"
