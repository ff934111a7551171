"""Tasks in a run: a task handles a shard, or a part of a pass, in any process.

A rename to the final name comes last: an existing result marks a finished task, and no process repeats the
task. A shard has a base table with texts, and a layer table for each step with the same row groups. A single
row group is in memory.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from data_prep.curate.line_ends import unify_line_ends
from data_prep.curate.pipeline.addresses import check_unchanged
from data_prep.curate.pipeline.counts import DocumentCounts
from data_prep.curate.pipeline.pipeline_file import Pipeline, format_output_name
from data_prep.curate.pipeline.plan import (
    OUTPUT, PARSE, Layer, PipelinePlan, SourcePlan, StepPlan, hash_step_files, read_shard_pieces)
from data_prep.curate.pipeline.step import (
    KEPT, RECORD_COLUMNS, SOURCE_COLUMNS, ColumnType, Doc, ShardRef, Step, StepOutcome)
from data_prep.curate.sources.formats import create_reader
from data_prep.curate.sources.source import BrokenRecord, RawDocument, SourceSettings
from data_prep.damaged_files import explain_deletion
from megatron_sov.base.artifacts import create_file, create_folder, translate_disk_errors, write_atomically
from megatron_sov.base.documents.records import count_text_bytes
from megatron_sov.base.documents.rows import replace_surrogates
from megatron_sov.base.errors import UserError, escape_controls
from megatron_sov.base.sealed import SEAL, SEAL_PLACEHOLDER, seal_file, write_sealed_json
from megatron_sov.work.tables.parquet import TableFile, iter_row_groups

GROUP_BYTES, GROUP_ROWS = 8 << 20, 1000
"""Text bytes or rows that close a row group."""
MAX_LISTED = 10_000
"""Broken records listed for each shard; further records are only counted."""
MAX_NAMES = 256
"""Maximum output names in a shard, which are open files."""
_ARROW_TYPES = {"string": pa.string(), "float32": pa.float32(), "int64": pa.int64(), "bool": pa.bool_(),
                "list<string>": pa.list_(pa.string())}


def build_schema(first: str, columns: dict[str, ColumnType]) -> pa.Schema:
    """Return the schema with columns `first` and `text` (strings), then `columns`."""
    return pa.schema([(first, pa.string()), ("text", pa.string()),
                      *((name, _ARROW_TYPES[kind]) for name, kind in columns.items())])


BASE_SCHEMA = build_schema("id", {name: kind for name, kind in SOURCE_COLUMNS.items() if name != "source"})
Task = tuple[str, int]
"""Source name and shard number; for a pass "" and task number."""


@dataclass(frozen=True)
class PipelineStage:
    """Tasks that may run in any order, after the previous stages."""

    number: int
    """Layer number that the tasks write or prepare."""
    kind: str
    """The step's name, `PARSE` or `OUTPUT`."""
    index: int = -1
    """Pass number; -1: tasks write a layer."""
    pass_name: str = ""

    @property
    def name(self) -> str:
        return f"{self.number:02d}-{self.kind}" + (f"-{self.pass_name}" if self.pass_name else "")

    @property
    def task_noun(self) -> str:
        return "tasks" if self.index >= 0 else "shards"


def iter_stages(plan: PipelinePlan) -> Iterator[PipelineStage]:
    yield PipelineStage(0, PARSE)
    for step in plan.steps:
        if step.sources:
            for index, step_pass in enumerate(step.passes):
                yield PipelineStage(step.entry.number, step.entry.kind, index, step_pass.name)
            yield PipelineStage(step.entry.number, step.entry.kind)
    yield PipelineStage(len(plan.pipeline.steps) + 1, OUTPUT)


def list_tasks(plan: PipelinePlan, stage: PipelineStage) -> list[Task]:
    if stage.index >= 0:
        return [("", task) for task in range(_get_step(plan, stage).passes[stage.index].num_tasks)]
    return [(source.settings.name, shard) for source in plan.sources if find_layer(source, stage)
            for shard in source.shards]


def find_layer(source: SourcePlan, stage: PipelineStage) -> Layer | None:
    return next((layer for layer in source.layers if layer.number == stage.number), None)


def _get_step(plan: PipelinePlan, stage: PipelineStage) -> StepPlan:
    return plan.steps[stage.number - 1]


def get_done_mark(plan: PipelinePlan, stage: PipelineStage, task: Task, output: Path) -> Path:
    """Return the path that exists after a task."""
    if stage.index >= 0:
        # Next to the results of the pass, so that nobody deletes the results without the mark.
        folder = LayerView(plan, _get_step(plan, stage), output).work_folder
        return folder / ".done" / f"{stage.index}-{stage.pass_name}" / f"{task[1]:05d}"
    layer = find_layer(plan.get_source(task[0]), stage)
    assert layer is not None, (stage, task)
    return layer.get_result_path(output, task[1])


def run_task(plan_file: Path, output: Path, stage: PipelineStage, task: Task) -> None:
    """Run a task unless its result exists. Raises `UserError` with its name: bad input or a full disk."""
    plan = _read_plan(plan_file)
    mark = get_done_mark(plan, stage, task, output)
    # A cluster may assign a task to two workers: the second finds the result.
    if mark.exists():
        return
    place = f"source {task[0]}, shard {task[1]}" if task[0] else f"pass {stage.pass_name}, task {task[1]}"
    try:
        with translate_disk_errors(mark):
            _run_open_task(plan, plan_file, output=output, stage=stage, task=task, mark=mark)
    except UserError as e:
        raise UserError(f"{place}, {stage.kind}: {e}") from e
    except FileNotFoundError as e:
        file, shared = Path(os.fsdecode(e.filename or "")), output / "shared"
        if shared in file.parents:
            folder = shared / file.relative_to(shared).parts[0]
            raise UserError(f"{place}, {stage.kind}: {e.filename} is missing, which an earlier pass has "
                            f"left; delete {folder} and run the command again") from None
        raise
    except Exception as e:
        e.add_note(f"{place}, step {stage.kind}")
        raise


def _run_open_task(plan: PipelinePlan, plan_file: Path, output: Path, stage: PipelineStage, task: Task,
                   mark: Path) -> None:
    if stage.index >= 0:
        view = LayerView(plan, _get_step(plan, stage), output)
        view.work_folder.mkdir(parents=True, exist_ok=True)
        step = _load_step(plan_file, stage.number, output, loads_inputs=False)
        step.list_passes()[stage.index].run(view, task[1])
        # The mark comes last: a killed pass runs again and writes the same files.
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(mark, "")
        return
    source = plan.get_source(task[0])
    layer = find_layer(source, stage)
    assert layer is not None
    if stage.kind == PARSE:
        writing = parse_shard(plan.pipeline, source, layer, output, task[1])
    elif stage.kind == OUTPUT:
        writing = write_output_shard(plan, source, layer, output, task[1])
    else:
        writing = _write_layer(plan, plan_file, output=output, stage=stage, shard=ShardRef(*task), file=mark)
    # The counts are written before the rows get their final name, which marks the shard as done.
    with writing as counts:
        write_sealed_json(layer.get_counts_file(output, task[1]), counts.to_dict())


@lru_cache(maxsize=2)
def _read_plan(file: Path) -> PipelinePlan:
    return PipelinePlan.read(file)


@lru_cache(maxsize=2)
def _load_step(plan_file: Path, number: int, output: Path, *, loads_inputs: bool) -> Step:
    """Return the process's instance of a step. Raises `UserError`: a step's file changed after the plan."""
    plan = _read_plan(plan_file)
    step = plan.steps[number - 1].entry.build_step(plan.pipeline.folder)
    if loads_inputs:
        step.load_inputs(LayerView(plan, plan.steps[number - 1], output))
    # Compared after loading, so that the loaded content is the hashed content.
    planned = next(layer.reasons["files"] for source in plan.sources for layer in source.layers
                   if layer.number == number)
    if hash_step_files(step) != planned:
        raise UserError(f"{plan_file}: a file that step {number} reads has changed since the plan was made; "
                        "run the command again")
    return step


# The tables of a shard: a base with texts, and layers with outcomes.


@dataclass(frozen=True, slots=True)
class LayerRow:
    """A document after the layers read so far."""

    id: str
    text: str
    columns: dict[str, Any]


class LayerFile(TableFile):
    """A step's layer over a shard: columns `reason`, `text` and the step's columns."""

    def __init__(self, path: Path, added_columns: dict[str, ColumnType]) -> None:
        super().__init__(path, build_schema("reason", added_columns))
        self.added_columns = added_columns

    def write_outcomes(self, outcomes: Sequence[StepOutcome | None]) -> None:
        """Write a row group; None stands for rows that earlier steps dropped."""
        table: dict[str, list[Any]] = {
            "reason": [None if outcome is None else outcome.reason for outcome in outcomes],
            "text": [None if outcome is None else outcome.text for outcome in outcomes]}
        for name in self.added_columns:
            table[name] = [None if outcome is None else outcome.values.get(name) for outcome in outcomes]
        self.write(table)


def iter_row_batches(source: str, files: Sequence[Path]) -> Iterator[list[LayerRow | None]]:
    """Yield a shard's row groups as documents after the last layer; None stands for a dropped document.

    Args:
        source: the source's name.
        files: the base, and layers in order.

    Raises:
        UserError: a file is missing, damaged, or belongs to another shard.
    """
    for tables in iter_row_groups(files, explain_deletion):
        yield _merge_layers(source, tables)


def _merge_layers(source: str, tables: list[pa.Table]) -> list[LayerRow | None]:
    base = tables[0]
    alive = [True] * base.num_rows
    texts: list[str] = base.column("text").to_pylist()
    columns = {name: base.column(name).to_pylist() for name in base.column_names[2:]}
    columns["source"] = [source] * base.num_rows
    for table in tables[1:]:
        # null stands for a document that an earlier step dropped.
        alive = [is_alive and reason == ""
                 for is_alive, reason in zip(alive, table.column("reason").to_pylist(), strict=True)]
        if table.column("text").null_count < table.num_rows:
            texts = _overlay(texts, table.column("text").to_pylist())
        for name in table.column_names[2:]:
            values = table.column(name).to_pylist()
            # A document that the step skipped keeps its earlier value.
            columns[name] = _overlay(columns[name], values) if name in columns else values
    rows: list[LayerRow | None] = []
    for is_alive, identifier, text, *values in zip(alive, base.column("id").to_pylist(), texts,
                                                   *columns.values(), strict=True):
        row = LayerRow(identifier, text, dict(zip(columns, values, strict=True))) if is_alive else None
        rows.append(row)
    return rows


def _overlay(previous: list[Any], updates: list[Any]) -> list[Any]:
    return [old if new is None else new for old, new in zip(previous, updates, strict=True)]


# The first task of a shard: pieces of raw files become documents with an identifier and columns.


@contextmanager
def parse_shard(pipeline: Pipeline, source: SourcePlan, layer: Layer, output: Path,
                shard: int) -> Iterator[DocumentCounts]:
    """Write a shard's documents; the table gets its final name when the with block ends. Raises `UserError`:
    a broken record, if the pipeline has `on_bad: refuse`."""
    counts, buffer = DocumentCounts(), _RowBuffer(source.settings, shard)
    listed = layer.get_quarantine_file(output, shard)
    listed.parent.mkdir(parents=True, exist_ok=True)
    reader = create_reader(source.settings)
    # The blocks end in reverse order, so the table gets its final name last.
    with (TableFile(layer.get_table_file(output, shard), BASE_SCHEMA) as file,
          create_file(listed) as temporary, open(temporary, "w", encoding="utf-8") as quarantine):
        pieces, marks = read_shard_pieces(output, layer, shard)
        for piece in pieces:
            # Line ends are unified before the first step, for every format.
            is_code = piece.format == "code" or source.settings.kind == "math_code"
            for item in reader.read_piece(piece):
                if isinstance(item, BrokenRecord):
                    _record_broken(item, pipeline, quarantine, counts, shard)
                    continue
                text = unify_line_ends(item.text, is_code=is_code)
                counts.add_document(buffer.add(dataclasses.replace(item, text=text)), "", text, None)
                if buffer.is_full:
                    file.write(buffer.pop_rows())
        file.write(buffer.pop_rows())
        # Checked after reading: a changed file would be stored under the address of its old content.
        for name, mark in marks.items():
            check_unchanged(source.settings.get_file(name), mark)
        if (num_more := sum(counts.broken.values()) - MAX_LISTED) > 0:
            quarantine.write(json.dumps({
                "shard": shard, "file": "", "place": f"shard {shard}", "code": "more", "content": "",
                "reason": f"{num_more:,} more are counted, and not listed"}) + "\n")
        quarantine.write(json.dumps({SEAL: SEAL_PLACEHOLDER}) + "\n")
        # `seal_file` reads from the disk.
        quarantine.flush()
        seal_file(temporary)
        yield counts


def _record_broken(item: BrokenRecord, pipeline: Pipeline, quarantine: IO[str], counts: DocumentCounts,
                   shard: int) -> None:
    """Count a broken record. Only `MAX_LISTED` are listed: a source in a wrong format would fill the disk."""
    if pipeline.on_bad == "refuse" and not item.is_left_out:
        raise UserError(f"{item.place}: {item.reason}; mend it, or list such records and go on: "
                        "on_bad: quarantine")
    counts.broken[item.code] = counts.broken.get(item.code, 0) + 1
    if sum(counts.broken.values()) > MAX_LISTED:
        return
    record = {"shard": shard, "file": item.file, "place": item.place, "code": item.code,
              "reason": item.reason, "content": item.content}
    quarantine.write(json.dumps(record) + "\n")


class _RowBuffer:
    """Documents for the next row group."""

    def __init__(self, source: SourceSettings, shard: int) -> None:
        self.source, self.shard = source, shard
        self._columns: dict[str, list[Any]] = {name: [] for name in BASE_SCHEMA.names}
        self._size_bytes = 0

    @property
    def is_full(self) -> bool:
        return self._size_bytes >= GROUP_BYTES or len(self._columns["id"]) >= GROUP_ROWS

    def add(self, document: RawDocument) -> str:
        """Append a document and return its id."""
        # A hash of the place instead of a number: added or deleted documents do not change other ids.
        place_hash = hashlib.blake2b(document.place.encode(), digest_size=8).hexdigest()
        identifier = f"{self.source.name}:{self.shard}:{place_hash}"
        row = {"id": identifier, "text": document.text, "where": document.place, "kind": self.source.kind,
               "synthetic": self.source.synthetic, "extra": None}
        for name in RECORD_COLUMNS:
            value = document.columns.get(name)
            row[name] = None if value in (None, "") else escape_controls(replace_surrogates(str(value)))
        row["licence"] = row["licence"] or self.source.licence or None
        extra = {name: value for name, value in document.columns.items() if name not in RECORD_COLUMNS}
        if extra:
            row["extra"] = replace_surrogates(json.dumps(extra, ensure_ascii=False, sort_keys=True,
                                                          default=str))
        for name, values in self._columns.items():
            values.append(row[name])
        self._size_bytes += count_text_bytes(document.text)
        return identifier

    def pop_rows(self) -> dict[str, list[Any]]:
        """Return column -> values, and empty the buffer."""
        rows, self._columns = self._columns, {name: [] for name in BASE_SCHEMA.names}
        self._size_bytes = 0
        return rows


# The middle tasks of a shard: a step's outcomes.


class LayerView:
    """A step's `View`: documents kept by previous steps, shard by shard."""

    def __init__(self, plan: PipelinePlan, step: StepPlan, output: Path) -> None:
        self.plan, self.step, self.output = plan, step, output

    @cached_property
    def shards(self) -> Sequence[ShardRef]:
        return [ShardRef(name, number)
                for name in self.step.sources for number in self.plan.get_source(name).shards]

    @property
    def work_folder(self) -> Path:
        for name in self.step.sources:
            for layer in self.plan.get_source(name).layers:
                if layer.number == self.step.entry.number:
                    return self.output / layer.shared
        return self.output

    def iter_documents(self, shard: ShardRef) -> Iterator[Doc]:
        for first, rows in self.iter_groups(shard):
            yield from (document for _, document in self.select_documents(shard, first, rows))

    def get_priority(self, source: str) -> int:
        return self.plan.get_source(source).settings.priority

    def iter_groups(self, shard: ShardRef) -> Iterator[tuple[int, list[LayerRow | None]]]:
        """Yield first row number and rows for each row group in a shard, before the step."""
        files = [layer.get_table_file(self.output, shard.number)
                 for layer in self.plan.get_source(shard.source).layers
                 if layer.number < self.step.entry.number]
        first = 0
        for rows in iter_row_batches(shard.source, files):
            yield first, rows
            first += len(rows)

    def select_documents(self, shard: ShardRef, first: int,
                         rows: list[LayerRow | None]) -> list[tuple[int, Doc]]:
        """Return index in the row group and document, for rows that the step's `only` selects."""
        kinds = self.step.entry.only.kinds
        return [(i, Doc(row.id, row.text, shard.source, shard.number, first + i, row.columns))
                for i, row in enumerate(rows)
                if row is not None and (not kinds or row.columns["kind"] in kinds)]


@contextmanager
def _write_layer(plan: PipelinePlan, plan_file: Path, output: Path, stage: PipelineStage, shard: ShardRef,
                 file: Path) -> Iterator[DocumentCounts]:
    """Write a step's layer over a shard; the file gets the final name when the with block ends."""
    step_plan = _get_step(plan, stage)
    view, counts = LayerView(plan, step_plan, output), DocumentCounts()
    step = _load_step(plan_file, stage.number, output, loads_inputs=True)
    with LayerFile(file, step_plan.added_columns) as layer:
        for first, rows in view.iter_groups(shard):
            # Rows that the step does not select stay unchanged.
            outcomes: list[StepOutcome | None] = [None if row is None else KEPT for row in rows]
            for i, document in view.select_documents(shard, first, rows):
                outcomes[i] = outcome = _judge_document(step, step_plan, document)
                counts.add_document(document.id, outcome.reason, document.text, outcome.text)
            try:
                layer.write_outcomes(outcomes)
            except (ValueError, TypeError) as e:
                raise TypeError(f"step {stage.kind} gives a value that is not of its column's type: "
                                f"{e}") from e
        yield counts


def _judge_document(step: Step, step_plan: StepPlan, document: Doc) -> StepOutcome:
    outcome = step.judge_document(document)
    if unknown := set(outcome.values) - set(step_plan.added_columns):
        raise RuntimeError(f"step {step.kind} gives columns that it does not add: {sorted(unknown)}")
    # Texts of dropped and unchanged documents are not stored, which keeps layers small.
    if outcome.text is not None and (outcome.reason or outcome.text == document.text):
        return StepOutcome(outcome.reason, None, outcome.values)
    # A step that removes the whole text drops the document.
    if outcome.text is not None and not outcome.text.strip():
        return StepOutcome("nothing left", None, outcome.values)
    return outcome


# The last task of a shard: kept documents, sorted into one file for each output name.


@contextmanager
def write_output_shard(plan: PipelinePlan, source: SourcePlan, layer: Layer, output: Path,
                       shard: int) -> Iterator[DocumentCounts]:
    """Write a folder with a file for each output name; the folder gets the final name when the with block
    ends. Raises `UserError`: the documents have more than `MAX_NAMES` output names."""
    counts = DocumentCounts()
    files = [other.get_table_file(output, shard) for other in source.layers[:-1]]
    with create_folder(layer.get_result_path(output, shard)) as temporary:
        with ExitStack() as stack:
            sorter = _OutputSorter(plan, temporary, stack)
            for rows in iter_row_batches(source.settings.name, files):
                for row in filter(None, rows):
                    name = sorter.add(source.settings.name, row)
                    counts.add_document(row.id, "", row.text, None, name)
            sorter.write_waiting()
        yield counts


class _OutputSorter:
    """Writes rows to a table for each output name."""

    def __init__(self, plan: PipelinePlan, folder: Path, stack: ExitStack) -> None:
        self.pattern, self.folder, self.stack = plan.pipeline.output.name, folder, stack
        self.schema = build_schema("id", plan.list_columns())
        self.files: dict[str, TableFile] = {}
        self.waiting: dict[str, list[LayerRow]] = {}
        self.waiting_chars = 0

    def add(self, source: str, row: LayerRow) -> str:
        """Add a row to the table for its output name, and return the name."""
        name = format_output_name(self.pattern, source, row.columns)
        if name not in self.files:
            if len(self.files) >= MAX_NAMES:
                raise UserError(f"output.name = {self.pattern!r} sorts documents into more than {MAX_NAMES} "
                                f"names (the last: {name}); make names of columns with fewer values")
            self.files[name] = self.stack.enter_context(
                TableFile(self.folder / f"{name}.parquet", self.schema))
        rows = self.waiting.setdefault(name, [])
        rows.append(row)
        self.waiting_chars += len(row.text)
        # The limit is over all names: with many names no single name would reach it.
        if len(rows) >= GROUP_ROWS or self.waiting_chars >= GROUP_BYTES:
            self.write_waiting()
        return name

    def write_waiting(self) -> None:
        for name, rows in self.waiting.items():
            table: dict[str, list[Any]] = {"id": [row.id for row in rows], "text": [row.text for row in rows]}
            for column in self.schema.names[2:]:
                table[column] = [row.columns.get(column) for row in rows]
            self.files[name].write(table)
        self.waiting, self.waiting_chars = {}, 0
