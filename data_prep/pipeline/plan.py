"""The plan of a run: which source is cut into which shards, which steps each goes through, and the folder of
everything; a plain file that tasks read wherever they run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from data_prep.pipeline.addresses import REASONS_FILE, Mark, address, entries_of, tree_hash
from data_prep.pipeline.columns import SOURCE_COLUMNS
from data_prep.pipeline.cutting import shards_of
from data_prep.pipeline.inputs import input_names, known_file
from data_prep.pipeline.pipeline_file import Pipeline, StepEntry
from data_prep.pipeline.step import ColumnType, Step
from data_prep.sources.formats import reader
from data_prep.sources.source import Piece, SourceSettings
from megatron_sov.artifacts import MANIFEST, atomic_write
from megatron_sov.sealed import PLACE, SEAL, read_json, read_lines, sealed, write_json

PARSE, OUTPUT = "parse", "output"
PIECES = "pieces.jsonl"
"""The number and the pieces of each shard of a source, a line for each shard."""


@dataclass(frozen=True)
class Layer:
    """A folder with one file for each shard of a source."""

    number: int
    """0: parsed documents; then the steps of the file; the last is the output."""
    kind: str
    """Name of the step, or `PARSE`, or `OUTPUT`."""
    folder: str
    """Relative to the run's output folder."""
    reasons: dict[str, Any]
    """What its address follows from."""
    shared: str = ""
    """Folder of the step's passes; "": it has none."""

    def file(self, output: Path, shard: int) -> Path:
        """Return where a shard's documents, or what the step made of them, lie."""
        return output / self.folder / f"{shard:05d}.parquet"

    def counts(self, output: Path, shard: int) -> Path:
        """Return where a shard's counts lie."""
        return output / self.folder / f"{shard:05d}.json"

    def broken(self, output: Path, shard: int) -> Path:
        """Return where what was broken in a shard is listed, of parsed documents."""
        return output / self.folder / f"{shard:05d}.broken.jsonl"

    def rows(self, output: Path, shard: int) -> Path:
        """Return what stands when a shard is done: a file, or of the output a folder."""
        return output / self.folder / f"{shard:05d}" if self.kind == OUTPUT else self.file(output, shard)


@dataclass(frozen=True)
class SourcePlan:
    """One source on its way."""

    settings: SourceSettings
    shards: dict[int, str]
    """Number of each shard, in the order of its documents -> address of what they are parsed from."""
    num_files: int
    raw_bytes: int
    layers: tuple[Layer, ...]
    """Parsed documents, the steps that look at this source, the output."""
    told: tuple[str, ...] = ()
    """What of its folders is passed over, in sentences."""


@dataclass(frozen=True)
class PassPlan:
    """A pass of a step over all of its sources."""

    name: str
    num_tasks: int


@dataclass(frozen=True)
class StepPlan:
    """One step, for all sources that it looks at."""

    entry: StepEntry
    sources: tuple[str, ...]
    passes: tuple[PassPlan, ...]
    adds: dict[str, ColumnType]


@dataclass(frozen=True)
class Plan:
    """A whole run."""

    pipeline: Pipeline
    sources: tuple[SourcePlan, ...]
    steps: tuple[StepPlan, ...]

    @property
    def address(self) -> str:
        """Return what stands for the output: its address follows from everything before it."""
        pack = self.pipeline.pack
        return address({"output": [[s.settings.name, s.layers[-1].folder] for s in self.sources],
                        "pack": None if pack is None else dataclasses.asdict(pack) | {
                            "tokenizer": tree_hash(pack.tokenizer / MANIFEST)}})

    def told(self) -> list[str]:
        """Return a sentence for each folder of which something is passed over."""
        return [f"source {source.settings.name}: {sentence}" for source in self.sources
                for sentence in source.told]

    def source(self, name: str) -> SourcePlan:
        """Return a source by name."""
        return next(s for s in self.sources if s.settings.name == name)

    def columns(self, before: int | None = None) -> dict[str, ColumnType]:
        """Return column -> type of documents as a step of a number sees them; None: as they leave."""
        found: dict[str, ColumnType] = dict(SOURCE_COLUMNS)
        for step in self.steps:
            if before is None or step.entry.number < before:
                found |= step.adds
        return found

    def write(self, file: Path) -> None:
        """Write it where tasks find it."""
        write_json(file, json.loads(TypeAdapter(Plan).dump_json(self)), file.name)

    @staticmethod
    def read(file: Path) -> Plan:
        """Return what `write` has written."""
        return TypeAdapter(Plan).validate_json(json.dumps(read_json(file, of=file.name)))


def make_plan(pipeline: Pipeline, output: Path, *, keep: bool = True) -> Plan:
    """Look at all inputs and return what is to be done.

    Args:
        pipeline: the file.
        output: the run's folder; hashes of inputs, and the pieces of shards, are kept there.
        keep: whether anything may be written.

    Raises:
        UserError: an input cannot be read, or a source holds nothing.
    """
    sources = [_parsed(source, pipeline, output, keep) for source in pipeline.sources]
    steps: list[StepPlan] = []
    for entry in pipeline.steps:
        step = entry.build(pipeline.folder)
        looks_at = [i for i, source in enumerate(sources) if _sees(entry, source.settings, steps)]
        passes = tuple(PassPlan(p.name, sum(len(sources[i].shards) for i in looks_at)
                                if p.num_tasks is None else p.num_tasks) for p in step.passes())
        reasons = {"step": entry.kind, "version": step.version, "settings": entry.settings(),
                   "only": dataclasses.asdict(entry.only) if entry.only.kinds else None,
                   "files": file_hashes(step)}
        reads = [[sources[i].settings.name, sources[i].layers[-1].folder] for i in looks_at]
        if passes:
            together = reasons | {"reads": reads,
                                  "priority": [sources[i].settings.priority for i in looks_at]}
        name = f"{entry.number:02d}-{entry.kind}"
        for i in looks_at:
            mine = together if passes else reasons | {"reads": sources[i].layers[-1].folder}
            folder = f"{name}-{address(mine)}"
            layer = Layer(entry.number, entry.kind, f"shards/{sources[i].settings.name}/{folder}", mine,
                          f"shared/{folder}" if passes else "")
            sources[i] = dataclasses.replace(sources[i], layers=(*sources[i].layers, layer))
        steps.append(StepPlan(entry, tuple(sources[i].settings.name for i in looks_at), passes,
                              dict(step.adds)))
    number = len(pipeline.steps) + 1
    return Plan(pipeline, tuple(_with_output(source, pipeline, number) for source in sources), tuple(steps))


def file_hashes(step: Step) -> list[str]:
    """Return the hashes of what a step's outcomes depend on beside the documents."""
    return [tree_hash(Path(file)) for file in step.files()]


def _sees(entry: StepEntry, source: SourceSettings, before: Sequence[StepPlan]) -> bool:
    """Return whether a step can look at any document of a source."""
    if entry.only.sources and source.name not in entry.only.sources:
        return False
    told_by_step = any("kind" in step.adds for step in before)
    return not entry.only.kinds or told_by_step or source.kind in entry.only.kinds


def _with_output(source: SourcePlan, pipeline: Pipeline, number: int) -> SourcePlan:
    reasons = {"step": OUTPUT, "name": pipeline.output.name, "reads": source.layers[-1].folder,
               "columns": [step.kind for step in pipeline.steps]}
    folder = f"shards/{source.settings.name}/{number:02d}-{OUTPUT}-{address(reasons)}"
    return dataclasses.replace(source, layers=(*source.layers, Layer(number, OUTPUT, folder, reasons)))


def _parsed(source: SourceSettings, pipeline: Pipeline, output: Path, keep: bool) -> SourcePlan:
    """Cut a source into shards."""
    read_by = reader(source)
    pieces = read_by.pieces()
    names = input_names(pieces)
    entries = entries_of([source.file(name) for name in names], known_file(output, source.name), keep=keep)
    marks = {name: entries[str(source.file(name))][:-1] for name in names}
    contents = {name: entries[str(source.file(name))][-1] for name in names}
    settings = json.loads(TypeAdapter(SourceSettings).dump_json(source))
    for outside in ("priority", "folder", "path"):  # what is read says it better
        del settings[outside]
    how = {"step": PARSE, "settings": settings, "on_bad": pipeline.on_bad}
    groups = shards_of(pieces, pipeline.shard_bytes)
    shards = {number: address(how | {"shard": number, "pieces": [
        [dataclasses.astuple(piece), [contents.get(name, "") for name in (piece.file, *piece.beside)]]
        for piece in group]}) for number, group in groups.items()}
    reasons = how | {"shard_bytes": pipeline.shard_bytes,
                     "files": address({"files": [[piece.file for piece in pieces], contents]})}
    folder = f"shards/{source.name}/00-{PARSE}-{address(reasons)}"
    if keep:
        _write_pieces(output / folder / PIECES, groups, marks)
    return SourcePlan(source, shards, len(names), sum(piece.size_bytes for piece in pieces),
                      (Layer(0, PARSE, folder, reasons),), tuple(read_by.told))


def _write_pieces(file: Path, groups: Mapping[int, Sequence[Piece]], marks: Mapping[str, Mark]) -> None:
    """Write what the tasks of shards read, unless it stands there."""
    lines = [json.dumps([number, [dataclasses.asdict(piece) for piece in group],
                         {name: marks[name] for name in input_names(group)}])
             for number, group in groups.items()]
    made = sealed("\n".join([*lines, json.dumps({SEAL: PLACE}), ""]).encode())
    if not file.is_file() or file.read_bytes() != made:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, made)


def pieces_of(output: Path, layer: Layer, shard: int) -> tuple[list[Piece], dict[str, Mark]]:
    """Return the pieces of one shard of a plan that is written, and the files that they are read from with
    their marks when the plan was made."""
    begin = f"[{shard}, ".encode()
    for line in read_lines(output / layer.folder / PIECES):
        if line.startswith(begin):
            _, pieces, marks = json.loads(line)
            return [Piece(**{**piece, "beside": tuple(piece["beside"])}) for piece in pieces], marks
    raise KeyError(f"{layer.folder}: has no shard {shard}")


def note_reasons(output: Path, plan: Plan) -> None:
    """Write into each folder what its address follows from, for those who ask later why another one is
    needed."""
    for source in plan.sources:
        for layer in source.layers:
            folder = output / layer.folder
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / REASONS_FILE).is_file():
                write_json(folder / REASONS_FILE, layer.reasons)
