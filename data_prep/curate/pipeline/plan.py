"""The plan for a run: shards, steps and folders for each source. Tasks read the plan from a JSON file."""

import dataclasses
import json
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
from megatron_sov.base.artifacts import write_atomically
from megatron_sov.base.sealed import (
    SEAL, SEAL_PLACEHOLDER, read_sealed_json, read_sealed_lines, seal_bytes, write_sealed_json)

PARSE, OUTPUT = "parse", "output"
PIECES = "pieces.jsonl"
"""File with a line for each shard: number, pieces, file marks."""
MAX_PIECES = 100_000
"""Maximum pieces in a shard; empty files and files without a format count."""


@dataclass(frozen=True)
class Layer:
    """A folder with a file for each shard in a source."""

    number: int
    """0: parsed documents; 1 to n: steps in the pipeline file; n + 1: the output."""
    kind: str
    """The step's name, `PARSE`, or `OUTPUT`."""
    folder: str
    """Relative to the run's output folder."""
    reasons: dict[str, Any]
    """Plain values that determine the address."""
    shared: str = ""
    """Folder of the step's passes; "": a step without passes."""

    def get_table_file(self, output: Path, shard: int) -> Path:
        """Return the Parquet file with a shard's documents, or with a step's outcomes."""
        return output / self.folder / f"{shard:05d}.parquet"

    def get_counts_file(self, output: Path, shard: int) -> Path:
        return output / self.folder / f"{shard:05d}.json"

    def get_quarantine_file(self, output: Path, shard: int) -> Path:
        """Return the file for broken records in a `PARSE` layer."""
        return output / self.folder / f"{shard:05d}.broken.jsonl"

    def get_result_path(self, output: Path, shard: int) -> Path:
        """Return the path that exists after a shard's task: the table, or a folder for `OUTPUT`."""
        folder = output / self.folder / f"{shard:05d}"
        return folder if self.kind == OUTPUT else self.get_table_file(output, shard)


@dataclass(frozen=True)
class SourcePlan:
    """A source's shards, and a layer per step that processes the source."""

    settings: SourceSettings
    shards: tuple[int, ...]
    """Shard numbers, in document order."""
    num_files: int
    raw_bytes: int
    layers: tuple[Layer, ...]
    """`PARSE`, the steps for this source, `OUTPUT`."""
    notes: tuple[str, ...] = ()
    """Sentences about skipped files."""


@dataclass(frozen=True)
class PassPlan:
    """A pass of a step, and its number of tasks."""

    name: str
    num_tasks: int


@dataclass(frozen=True)
class StepPlan:
    """A step with the sources that it processes, its passes and columns."""

    entry: StepEntry
    sources: tuple[str, ...]
    """Sources that the step processes."""
    passes: tuple[PassPlan, ...]
    added_columns: dict[str, ColumnType]


@dataclass(frozen=True)
class PipelinePlan:
    """Everything that tasks need to know; written to a file before the first task."""

    pipeline: Pipeline
    sources: tuple[SourcePlan, ...]
    steps: tuple[StepPlan, ...]

    @property
    def address(self) -> str:
        """Address of the output, which depends on every step."""
        # `pack` is a removed setting; without the key, complete corpora of earlier releases would run again.
        return compute_address({"output": [[s.settings.name, s.layers[-1].folder] for s in self.sources],
                                "pack": None})

    def list_skip_notes(self) -> list[str]:
        return [f"source {source.settings.name}: {sentence}" for source in self.sources
                for sentence in source.notes]

    def get_source(self, name: str) -> SourcePlan:
        return next(source for source in self.sources if source.settings.name == name)

    def list_columns(self) -> dict[str, ColumnType]:
        """Return column -> type after the last step."""
        columns: dict[str, ColumnType] = dict(SOURCE_COLUMNS)
        for step in self.steps:
            columns |= step.added_columns
        return columns

    def write(self, file: Path) -> None:
        write_sealed_json(file, json.loads(TypeAdapter(PipelinePlan).dump_json(self)), file.name)

    @staticmethod
    def read(file: Path) -> "PipelinePlan":
        return TypeAdapter(PipelinePlan).validate_json(json.dumps(read_sealed_json(file, owner=file.name)))


def make_plan(pipeline: Pipeline, output: Path, *, writes_pieces: bool = True) -> PipelinePlan:
    """List the inputs, divide files into shards and compute folders.

    Args:
        pipeline: the pipeline file.
        output: the run's folder.
        writes_pieces: write the shards' pieces to `output`, for tasks.

    Raises:
        UserError: an unreadable input, or an empty source.
    """
    sources = [_plan_source(source, pipeline, output, writes_pieces) for source in pipeline.sources]
    steps: list[StepPlan] = []
    for entry in pipeline.steps:
        step = entry.build_step(pipeline.folder)
        # A source whose documents the step never selects gets no layer, so a changed step leaves it finished.
        selected = [i for i, source in enumerate(sources) if _selects_source(entry, source.settings, steps)]
        num_shards = sum(len(sources[i].shards) for i in selected)
        passes = tuple(PassPlan(each.name, num_shards if each.num_tasks is None else each.num_tasks)
                       for each in step.list_passes())
        # `only.sources` is not part of the address: it selects layers without changing their content.
        step_reasons = {"step": entry.kind, "version": step.version, "settings": entry.to_settings(),
                        "only": dataclasses.asdict(entry.only) if entry.only.kinds else None,
                        "files": hash_step_files(step)}
        # Passes read all documents, so each outcome depends on all sources.
        shared_reasons = step_reasons | {
            "reads": [[sources[i].settings.name, sources[i].layers[-1].folder] for i in selected],
            "priority": [sources[i].settings.priority for i in selected]}
        for i in selected:
            reasons = shared_reasons if passes else step_reasons | {"reads": sources[i].layers[-1].folder}
            folder = f"{entry.number:02d}-{entry.kind}-{compute_address(reasons)}"
            layer = Layer(entry.number, entry.kind, f"shards/{sources[i].settings.name}/{folder}", reasons,
                          f"shared/{folder}" if passes else "")
            sources[i] = dataclasses.replace(sources[i], layers=(*sources[i].layers, layer))
        steps.append(StepPlan(entry, tuple(sources[i].settings.name for i in selected), passes,
                              dict(step.added_columns)))
    return PipelinePlan(pipeline, tuple(_add_output_layer(source, pipeline) for source in sources),
                        tuple(steps))


def hash_step_files(step: Step) -> list[str]:
    return [hash_tree(Path(file)) for file in step.list_files()]


def _selects_source(entry: StepEntry, source: SourceSettings, previous: Sequence[StepPlan]) -> bool:
    if entry.only.sources and source.name not in entry.only.sources:
        return False
    # After a step that sets `kind`, a source may hold documents of any kind.
    has_kind_step = any("kind" in step.added_columns for step in previous)
    return not entry.only.kinds or has_kind_step or source.kind in entry.only.kinds


def _add_output_layer(source: SourcePlan, pipeline: Pipeline) -> SourcePlan:
    number = len(pipeline.steps) + 1
    # The names of the steps determine the columns of the files.
    reasons = {"step": OUTPUT, "version": 2, "name": pipeline.output.name, "reads": source.layers[-1].folder,
               "columns": [step.kind for step in pipeline.steps]}
    folder = f"shards/{source.settings.name}/{number:02d}-{OUTPUT}-{compute_address(reasons)}"
    return dataclasses.replace(source, layers=(*source.layers, Layer(number, OUTPUT, folder, reasons)))


def _plan_source(source: SourceSettings, pipeline: Pipeline, output: Path, writes_pieces: bool) -> SourcePlan:
    reader = create_reader(source)
    pieces = reader.list_pieces()
    names = list_input_names(pieces)
    marks = {name: read_file_mark(source.get_file(name)) for name in names}
    settings = json.loads(TypeAdapter(SourceSettings).dump_json(source))
    # The path is not part of the address, so moved files with unchanged marks count as parsed. `priority`
    # enters the addresses of steps with passes.
    for excluded in ("priority", "folder", "path"):
        del settings[excluded]
    reasons = {"step": PARSE, "settings": settings, "on_bad": pipeline.on_bad,
               "shard_bytes": pipeline.shard_bytes,
               "files": compute_address({"files": [[piece.file for piece in pieces], marks]})}
    # Version 1 is not part of the address: addresses from releases without versions stay valid.
    if (version := load_reader_class(source.format).version) > 1:
        reasons["version"] = version
    folder = f"shards/{source.name}/00-{PARSE}-{compute_address(reasons)}"
    shards = split_into_shards(pieces, pipeline.shard_bytes)
    if writes_pieces:
        _write_pieces(output / folder / PIECES, shards, marks)
    return SourcePlan(source, tuple(shards), len(names), sum(piece.size_bytes for piece in pieces),
                      (Layer(0, PARSE, folder, reasons),), tuple(reader.notes))


def split_into_shards(pieces: Sequence[SourcePiece], shard_bytes: int) -> dict[int, list[SourcePiece]]:
    """Return shard number -> pieces, in order.

    Args:
        pieces: a source's pieces.
        shard_bytes: maximum size for a shard with several pieces.
    """
    shards: list[list[SourcePiece]] = []
    size_bytes = 0
    for piece in pieces:
        if not shards or size_bytes + piece.size_bytes > shard_bytes or len(shards[-1]) >= MAX_PIECES:
            shards.append([])
            size_bytes = 0
        shards[-1].append(piece)
        size_bytes += piece.size_bytes
    return dict(enumerate(shards))


def _write_pieces(file: Path, shards: Mapping[int, Sequence[SourcePiece]],
                  marks: Mapping[str, FileMark]) -> None:
    lines = []
    for number, pieces in shards.items():
        shard_marks = {name: marks[name] for name in list_input_names(pieces)}
        lines.append(json.dumps([number, [dataclasses.asdict(piece) for piece in pieces], shard_marks]))
    content = seal_bytes("\n".join([*lines, json.dumps({SEAL: SEAL_PLACEHOLDER}), ""]).encode())
    # An unchanged file is not written again, because tasks of an earlier submission may be reading it.
    if not file.is_file() or file.read_bytes() != content:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content)


def read_shard_pieces(output: Path, layer: Layer,
                      shard: int) -> tuple[list[SourcePiece], dict[str, FileMark]]:
    """Return a shard's pieces, and file name -> mark from the time of `make_plan`."""
    # Only the shard's line is parsed: a source may have very many shards.
    prefix = f"[{shard}, ".encode()
    for line in read_sealed_lines(output / layer.folder / PIECES):
        if line.startswith(prefix):
            _, pieces, marks = json.loads(line)
            return [SourcePiece(**{**piece, "companion_files": tuple(piece["companion_files"])})
                    for piece in pieces], marks
    raise KeyError(f"{layer.folder}: has no shard {shard}")
