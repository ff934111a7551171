"""The plan of a run: which source is cut into which shards, which steps each goes through, and the folder of
everything; a plain file that tasks read wherever they run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from data_prep.curate.pipeline.addresses import (
    FileMark, compute_address, hash_tree, list_input_names, read_file_mark)
from data_prep.curate.pipeline.pipeline_file import Pipeline, StepEntry
from data_prep.curate.pipeline.step import SOURCE_COLUMNS, ColumnType, Step
from data_prep.curate.sources.formats import create_reader, load_reader_class
from data_prep.curate.sources.source import SourcePiece, SourceSettings
from megatron_sov.base.artifacts import MANIFEST, write_atomically
from megatron_sov.base.sealed import (
    SEAL, SEAL_PLACEHOLDER, read_sealed_json, read_sealed_lines, seal_bytes, write_sealed_json)

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
        return output / self.folder / f"{shard:05d}.json"

    def broken(self, output: Path, shard: int) -> Path:
        """Return where what was broken in a shard is listed, of parsed documents."""
        return output / self.folder / f"{shard:05d}.broken.jsonl"

    def rows(self, output: Path, shard: int) -> Path:
        """Return what stands when a shard is done: a file, or of the output a folder."""
        return output / self.folder / f"{shard:05d}" if self.kind == OUTPUT else self.file(output, shard)


@dataclass(frozen=True)
class SourcePlan:
    settings: SourceSettings
    shards: tuple[int, ...]
    """Number of each shard, in the order of its documents."""
    num_files: int
    raw_bytes: int
    layers: tuple[Layer, ...]
    """Parsed documents, the steps that look at this source, the output."""
    notes: tuple[str, ...] = ()
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
    added_columns: dict[str, ColumnType]


@dataclass(frozen=True)
class PipelinePlan:
    pipeline: Pipeline
    sources: tuple[SourcePlan, ...]
    steps: tuple[StepPlan, ...]

    @property
    def address(self) -> str:
        """Return what stands for the output: its address follows from everything before it."""
        pack = self.pipeline.pack
        return compute_address({"output": [[s.settings.name, s.layers[-1].folder] for s in self.sources],
                        "pack": None if pack is None else dataclasses.asdict(pack) | {
                            "tokenizer": hash_tree(pack.tokenizer / MANIFEST)}})

    def list_passed_over(self) -> list[str]:
        return [f"source {source.settings.name}: {sentence}" for source in self.sources
                for sentence in source.notes]

    def source(self, name: str) -> SourcePlan:
        return next(s for s in self.sources if s.settings.name == name)

    def columns(self, before: int | None = None) -> dict[str, ColumnType]:
        """Return column -> type of documents as a step of a number sees them; None: as they leave."""
        found: dict[str, ColumnType] = dict(SOURCE_COLUMNS)
        for step in self.steps:
            if before is None or step.entry.number < before:
                found |= step.added_columns
        return found

    def write(self, file: Path) -> None:
        write_sealed_json(file, json.loads(TypeAdapter(PipelinePlan).dump_json(self)), file.name)

    @staticmethod
    def read(file: Path) -> PipelinePlan:
        return TypeAdapter(PipelinePlan).validate_json(json.dumps(read_sealed_json(file, owner=file.name)))


def make_plan(pipeline: Pipeline, output: Path, *, keep: bool = True) -> PipelinePlan:
    """Look at all inputs and return what is to be done.

    Args:
        pipeline: the file.
        output: the run's folder, for the pieces of shards.
        keep: whether they are written.

    Raises:
        UserError: an input cannot be read, or a source holds nothing.
    """
    sources = [_parsed(source, pipeline, output, keep) for source in pipeline.sources]
    steps: list[StepPlan] = []
    for entry in pipeline.steps:
        step = entry.build(pipeline.folder)
        # A step that cannot meet a document of a source has no layer there: changing it leaves that source
        # done.
        looks_at = [i for i, source in enumerate(sources) if _sees(entry, source.settings, steps)]
        passes = tuple(PassPlan(p.name, sum(len(sources[i].shards) for i in looks_at)
                                if p.num_tasks is None else p.num_tasks) for p in step.list_passes())
        # All that outcomes follow from. `only.sources` is left out: it decides which sources have a layer,
        # and not what is in it.
        reasons = {"step": entry.kind, "version": step.version, "settings": entry.settings(),
                   "only": dataclasses.asdict(entry.only) if entry.only.kinds else None,
                   "files": hash_step_files(step)}
        reads = [[sources[i].settings.name, sources[i].layers[-1].folder] for i in looks_at]
        # A step with passes looks at all documents together: its outcome for one follows from all sources.
        if passes:
            together = reasons | {"reads": reads,
                                  "priority": [sources[i].settings.priority for i in looks_at]}
        name = f"{entry.number:02d}-{entry.kind}"
        for i in looks_at:
            mine = together if passes else reasons | {"reads": sources[i].layers[-1].folder}
            folder = f"{name}-{compute_address(mine)}"
            layer = Layer(entry.number, entry.kind, f"shards/{sources[i].settings.name}/{folder}", mine,
                          f"shared/{folder}" if passes else "")
            sources[i] = dataclasses.replace(sources[i], layers=(*sources[i].layers, layer))
        steps.append(StepPlan(entry, tuple(sources[i].settings.name for i in looks_at), passes,
                              dict(step.added_columns)))
    number = len(pipeline.steps) + 1
    return PipelinePlan(pipeline, tuple(_with_output(source, pipeline, number) for source in sources),
                        tuple(steps))


def hash_step_files(step: Step) -> list[str]:
    return [hash_tree(Path(file)) for file in step.list_files()]


def _sees(entry: StepEntry, source: SourceSettings, before: Sequence[StepPlan]) -> bool:
    if entry.only.sources and source.name not in entry.only.sources:
        return False
    # Once a step sets kinds, a source of any kind may hold such documents.
    told_by_step = any("kind" in step.added_columns for step in before)
    return not entry.only.kinds or told_by_step or source.kind in entry.only.kinds


def _with_output(source: SourcePlan, pipeline: Pipeline, number: int) -> SourcePlan:
    # The steps' names say which columns the files have.
    reasons = {"step": OUTPUT, "name": pipeline.output.name, "reads": source.layers[-1].folder,
               "columns": [step.kind for step in pipeline.steps]}
    folder = f"shards/{source.settings.name}/{number:02d}-{OUTPUT}-{compute_address(reasons)}"
    return dataclasses.replace(source, layers=(*source.layers, Layer(number, OUTPUT, folder, reasons)))


def _parsed(source: SourceSettings, pipeline: Pipeline, output: Path, keep: bool) -> SourcePlan:
    read_by = create_reader(source)
    pieces = read_by.list_pieces()
    names = list_input_names(pieces)
    marks = {name: read_file_mark(source.file(name)) for name in names}
    # The path of a source is no part of its address: the same files at another path count as done.
    settings = json.loads(TypeAdapter(SourceSettings).dump_json(source))
    for outside in ("priority", "folder", "path"):  # what is read says it better
        del settings[outside]
    version = load_reader_class(source.format).version
    how = {"step": PARSE, "settings": settings, "on_bad": pipeline.on_bad,
           # Version 1 is left out, so that addresses from before readers had versions still hold.
           **({"version": version} if version > 1 else {})}
    groups = split_into_shards(pieces, pipeline.shard_bytes)
    reasons = how | {"shard_bytes": pipeline.shard_bytes,
                     "files": compute_address({"files": [[piece.file for piece in pieces], marks]})}
    folder = f"shards/{source.name}/00-{PARSE}-{compute_address(reasons)}"
    if keep:
        _write_pieces(output / folder / PIECES, groups, marks)
    return SourcePlan(source, tuple(groups), len(names), sum(piece.size_bytes for piece in pieces),
                      (Layer(0, PARSE, folder, reasons),), tuple(read_by.notes))


def _write_pieces(file: Path, groups: Mapping[int, Sequence[SourcePiece]],
                  marks: Mapping[str, FileMark]) -> None:
    """Write what the tasks of shards read, unless it stands there."""
    lines = [json.dumps([number, [dataclasses.asdict(piece) for piece in group],
                         {name: marks[name] for name in list_input_names(group)}])
             for number, group in groups.items()]
    made = seal_bytes("\n".join([*lines, json.dumps({SEAL: SEAL_PLACEHOLDER}), ""]).encode())
    # Tasks of an earlier submission may be reading it: the same bytes are not written again.
    if not file.is_file() or file.read_bytes() != made:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, made)


def read_shard_pieces(output: Path, layer: Layer, shard: int) -> tuple[
        list[SourcePiece], dict[str, FileMark]]:
    """Return the pieces of one shard of a plan that is written, and the files that they are read from with
    their marks when the plan was made."""
    # A line is parsed only if it is the one: a source may have very many shards.
    begin = f"[{shard}, ".encode()
    for line in read_sealed_lines(output / layer.folder / PIECES):
        if line.startswith(begin):
            _, pieces, marks = json.loads(line)
            return [SourcePiece(**{**piece, "companion_files": tuple(piece["companion_files"])})
                    for piece in pieces], marks
    raise KeyError(f"{layer.folder}: has no shard {shard}")


MAX_PIECES = 100_000
"""Pieces of a shard at most, however small they are: empty files, or files of no format."""


def split_into_shards(pieces: Sequence[SourcePiece], shard_bytes: int) -> dict[int, list[SourcePiece]]:
    """Return number -> pieces of each shard, in the order of the pieces.

    Args:
        pieces: of a source.
        shard_bytes: a shard ends before the piece that would make it larger.
    """
    found: list[list[SourcePiece]] = []
    size_bytes = 0
    for piece in pieces:
        if not found or size_bytes + piece.size_bytes > shard_bytes or len(found[-1]) >= MAX_PIECES:
            found.append([])
            size_bytes = 0
        found[-1].append(piece)
        size_bytes += piece.size_bytes
    return dict(enumerate(found))


def link_or_copy(file: Path | str, name: Path | str) -> None:
    """Give a file a second name; where the disk cannot, copy it."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)
