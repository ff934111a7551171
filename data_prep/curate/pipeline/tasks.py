"""The tasks of a run, one shard or one task of a pass each, as a process anywhere does them.

What a task leaves is complete when its file stands, which is renamed to its name last; a task that is done
is not done again, whoever asks.  A shard has a base file with the texts, and over it a layer for each step,
row by row; all its files have the same groups of rows, which are in memory one at a time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, Any

import psutil
import pyarrow as pa

from data_prep.curate.line_ends import unify_line_ends
from data_prep.curate.pipeline.addresses import check_unchanged
from data_prep.curate.pipeline.counts import DocumentCounts, read_recorded_seal
from data_prep.curate.pipeline.facts import write_shard_facts
from data_prep.curate.pipeline.pipeline_file import Pipeline, format_output_name
from data_prep.curate.pipeline.plan import (
    OUTPUT, PARSE, Layer, PipelinePlan, SourcePlan, StepPlan, hash_step_files, read_shard_pieces)
from data_prep.curate.pipeline.step import (
    KEPT, RECORD_COLUMNS, SOURCE_COLUMNS, ColumnType, Doc, ShardRef, Step, StepOutcome, build_schema)
from data_prep.curate.sources.formats import create_reader
from data_prep.curate.sources.source import BrokenRecord, RawDocument, SourceSettings
from data_prep.damaged_files import explain_deletion, get_place_in_run
from megatron_sov.base.artifacts import create_file, create_folder, translate_disk_errors
from megatron_sov.base.errors import UserError, escape_controls
from megatron_sov.base.sealed import SEAL, SEAL_PLACEHOLDER, read_seal, seal_file, write_sealed_json
from megatron_sov.work.tables.parquet import TableFile, iter_row_groups

GROUP_BYTES, GROUP_ROWS = 8 << 20, 1000
"""A group of rows is closed when its text, or its rows, have become so many."""
BASE_FIRST = (("id", pa.string()), ("text", pa.string()))
LAYER_FIRST = (("reason", pa.string()), ("text", pa.string()))
BASE_SCHEMA = build_schema({name: kind for name, kind in SOURCE_COLUMNS.items() if name != "source"},
                           *BASE_FIRST)


@dataclass(frozen=True, slots=True)
class LayerRow:
    """A document as the layers so far leave it."""

    id: str
    text: str
    columns: dict[str, Any]


def iter_row_batches(source: str, files: Sequence[Path],
                     seals: Sequence[str] = ()) -> Iterator[list[LayerRow | None]]:
    """Yield the groups of rows of a shard: documents as they are behind the last layer, None where one is
    dropped.

    Args:
        source: name of their source.
        files: the base and its layers, in order.
        seals: checksum of each as the counts beside it say it (`noted_seal`); (): nothing says it.

    Raises:
        UserError: a file is missing, damaged, or of another shard.
    """
    yield from (_rows(source, tables) for tables in iter_row_groups(files, seals or [None] * len(files),
                                                                    explain_deletion))


def _rows(source: str, tables: list[pa.Table]) -> list[LayerRow | None]:
    base = tables[0]
    alive = [True] * base.num_rows
    texts: list[str] = base.column("text").to_pylist()
    columns = {name: base.column(name).to_pylist() for name in base.column_names[2:]}
    columns["source"] = [source] * base.num_rows
    for table in tables[1:]:
        reasons = table.column("reason").to_pylist()
        # A layer has null where a document was dropped before, which is not "".
        alive = [a and reason == "" for a, reason in zip(alive, reasons, strict=True)]
        if table.column("text").null_count < table.num_rows:
            texts = [before if text is None else text
                     for before, text in zip(texts, table.column("text").to_pylist(), strict=True)]
        for name in table.column_names[2:]:
            new = table.column(name).to_pylist()
            old = columns.get(name)
            # a document that the step passed over keeps what it has
            columns[name] = (new if old is None else
                             [o if n is None else n for o, n in zip(old, new, strict=True)])
    names = list(columns)
    return [LayerRow(identifier, text, dict(zip(names, values, strict=True))) if a else None
            for a, identifier, text, *values in zip(alive, base.column("id").to_pylist(), texts,
                                                    *columns.values(), strict=True)]


class LayerFile(TableFile):
    """A step's layer over a shard."""

    def __init__(self, path: Path, added_columns: dict[str, ColumnType]) -> None:
        super().__init__(path, build_schema(added_columns, *LAYER_FIRST))
        self.added_columns = added_columns

    def write_outcomes(self, outcomes: Sequence[StepOutcome | None]) -> None:
        """Write what became of a group's rows; None for those that were dropped before."""
        made: dict[str, list[Any]] = {
            "reason": [None if o is None else o.reason for o in outcomes],
            "text": [None if o is None else o.text for o in outcomes]}
        for name in self.added_columns:
            made[name] = [None if o is None else o.values.get(name) for o in outcomes]
        self.write(made)


MAX_LISTED = 10_000
"""Of what is broken in a shard; more is only counted."""
MAX_NAMES = 256
"""Sources of the output that one shard may be sorted into; each has a file open."""
Task = tuple[str, int]
"""Name of a source and number of a shard; of a pass "" and the number of its task."""


# The first task of a shard: its pieces of raw files become documents with an identifier and columns.


@contextmanager
def parse_shard(pipeline: Pipeline, source: SourcePlan, layer: Layer, output: Path,
                shard: int) -> Iterator[DocumentCounts]:
    """Write a shard's documents; they get their name when the caller is through with the counts.

    Raises:
        UserError: something is broken, and the pipeline says `on_bad: refuse`.
    """
    counts, group = DocumentCounts(), _Group(source.settings, shard)
    listed = layer.broken(output, shard)
    listed.parent.mkdir(parents=True, exist_ok=True)
    source_reader = create_reader(source.settings)
    # the rows get their name last: it says that the shard is done
    # Names are given in turn as the blocks are left: the list of what is broken, then the rows.
    with (TableFile(layer.file(output, shard), BASE_SCHEMA) as file, create_file(listed) as temporary,
          open(temporary, "w", encoding="utf-8") as quarantine):
        pieces, marks = read_shard_pieces(output, layer, shard)
        for piece in pieces:
            for item in source_reader.read(piece):
                if isinstance(item, BrokenRecord):
                    _note_broken(item, pipeline, quarantine, counts, shard)
                    continue
                # Here, before any step, for every format: all steps see the same form of lines.
                is_code = piece.format == "code" or source.settings.kind == "math_code"
                text = unify_line_ends(item.text, is_code=is_code)
                counts.count(group.add(dataclasses.replace(item, text=text)), "", text, None)
                if group.is_full:
                    file.write(group.take())
        file.write(group.take())
        # After reading: a file that changed meanwhile would stand under the hash of its old content.
        for name, mark in marks.items():
            check_unchanged(source.settings.file(name), mark)
        if (num_more := sum(counts.broken.values()) - MAX_LISTED) > 0:
            quarantine.write(json.dumps({
                "shard": shard, "file": "", "place": f"shard {shard}", "code": "more", "content": "",
                "reason": f"{num_more:,} more are counted, and not listed"}) + "\n")
        quarantine.write(json.dumps({SEAL: SEAL_PLACEHOLDER}) + "\n")
        # The seal reads the file from the disk.
        quarantine.flush()
        # Checksums go into the counts: a file that is exchanged for a sound one of another shard is found.
        counts.seals = {layer.file(output, shard).name: file.close(), listed.name: seal_file(temporary)}
        yield counts


def _note_broken(item: BrokenRecord, pipeline: Pipeline, quarantine: IO[str], counts: DocumentCounts,
                 shard: int) -> None:
    """Count what is broken, and list it unless much is: a source of a wrong format would fill the disk."""
    if pipeline.on_bad == "refuse" and not item.is_left_out:
        raise UserError(f"{item.place}: {item.reason}; mend it, or list such records and go on: "
                        "on_bad: quarantine")
    counts.broken[item.code] = counts.broken.get(item.code, 0) + 1
    # All are counted; only the first are listed.
    if sum(counts.broken.values()) > MAX_LISTED:
        return
    record = {"shard": shard, "file": item.file, "place": item.place, "code": item.code,
              "reason": item.reason, "content": item.content}
    quarantine.write(json.dumps(record) + "\n")


class _Group:
    """Rows of documents that are not yet written."""

    def __init__(self, source: SourceSettings, shard: int) -> None:
        self.source, self.shard = source, shard
        self._columns: dict[str, list[Any]] = {name: [] for name in BASE_SCHEMA.names}
        self._size_bytes = 0

    @property
    def is_full(self) -> bool:
        return self._size_bytes >= GROUP_BYTES or len(self._columns["id"]) >= GROUP_ROWS

    def add(self, raw: RawDocument) -> str:
        """Take a document; returns its id."""
        # By its place in the source, and not by its number: documents that come or go leave the ids of
        # others.
        place = hashlib.blake2b(raw.place.encode(), digest_size=8).hexdigest()
        identifier = f"{self.source.name}:{self.shard}:{place}"
        given = {name: None if raw.columns.get(name) in (None, "")
                 else escape_controls(_utf8(str(raw.columns[name])))
                 for name in RECORD_COLUMNS}
        rest = {name: value for name, value in raw.columns.items() if name not in RECORD_COLUMNS}
        row = {"id": identifier, "text": raw.text, "where": raw.place, "kind": self.source.kind,
               "synthetic": self.source.synthetic, **given,
               "licence": given["licence"] or self.source.licence or None,
               "extra": _utf8(json.dumps(rest, ensure_ascii=False, sort_keys=True, default=str))
               if rest else None}
        for name, values in self._columns.items():
            values.append(row[name])
        self._size_bytes += len(raw.text.encode())
        return identifier

    def take(self) -> dict[str, list[Any]]:
        taken, self._columns = self._columns, {name: [] for name in BASE_SCHEMA.names}
        self._size_bytes = 0
        return taken


def _utf8(text: str) -> str:
    """Return a string without halves of surrogate pairs, which columns of strangers may hold anywhere."""
    return text.encode("utf-8", "replace").decode()


# The last task of a shard: its documents that are kept, sorted into files by the names that they go to.


@contextmanager
def write_output_shard(plan: PipelinePlan, source: SourcePlan, layer: Layer, output: Path,
                       shard: int) -> Iterator[DocumentCounts]:
    """Write a folder with a file for each name; it gets its own name when the caller is through with the
    counts.

    Raises:
        UserError: documents would go to more than `MAX_NAMES` names.
    """
    counts = DocumentCounts()
    files = [other.file(output, shard) for other in source.layers[:-1]]
    with create_folder(layer.rows(output, shard)) as temporary:
        with ExitStack() as stack:
            sorted_rows = _Sorter(plan, temporary, stack)
            for rows in iter_row_batches(source.settings.name, files,
                                         [read_recorded_seal(file) for file in files]):
                for row in filter(None, rows):
                    sorted_rows.add(source.settings.name, row)
                    counts.count(row.id, "", row.text, None)
            # Files are closed before they are read again to be counted.
            sorted_rows.finish()
        for file in sorted(temporary.glob("*.parquet")):
            write_shard_facts(file)
        counts.seals = {file.name: read_seal(file) for file in temporary.iterdir()}
        yield counts


class _Sorter:
    def __init__(self, plan: PipelinePlan, folder: Path, stack: ExitStack) -> None:
        self.pattern, self.folder, self.stack = plan.pipeline.output.name, folder, stack
        self.schema = build_schema(plan.columns(), *BASE_FIRST)
        self.files: dict[str, TableFile] = {}
        self.waiting: dict[str, list[LayerRow]] = {}
        self.waiting_bytes = 0

    def add(self, source: str, row: LayerRow) -> None:
        name = format_output_name(self.pattern, source, row.columns)
        if name not in self.files:
            if len(self.files) >= MAX_NAMES:
                raise UserError(f"output.name = {self.pattern!r} sorts documents into more than {MAX_NAMES} "
                                f"names (the last: {name}); make names of columns with fewer values")
            self.files[name] = self.stack.enter_context(
                TableFile(self.folder / f"{name}.parquet", self.schema))
        rows = self.waiting.setdefault(name, [])
        rows.append(row)
        self.waiting_bytes += len(row.text)
        # The limit is over all names together: with many names each alone would never be full.
        if len(rows) >= GROUP_ROWS or self.waiting_bytes >= GROUP_BYTES:
            self.finish()

    def finish(self) -> None:
        for name, rows in self.waiting.items():
            made: dict[str, list[Any]] = {"id": [row.id for row in rows], "text": [row.text for row in rows]}
            for column in self.schema.names[2:]:
                made[column] = [row.columns.get(column) for row in rows]
            self.files[name].write(made)
        self.waiting, self.waiting_bytes = {}, 0


# What a step sees of a run: the documents that the steps before it have left, shard by shard.


class LayerView:
    """A `View` of one step over a run's folder."""

    def __init__(self, plan: PipelinePlan, step: StepPlan, output: Path) -> None:
        self.plan, self.step, self.output = plan, step, output

    @cached_property
    def shards(self) -> Sequence[ShardRef]:
        return [ShardRef(name, number)
                for name in self.step.sources for number in self.plan.source(name).shards]

    @property
    def work_folder(self) -> Path:
        shared = next((layer.shared for name in self.step.sources for layer in self.plan.source(name).layers
                       if layer.number == self.step.entry.number), "")
        return self.output / shared

    def iter_documents(self, shard: ShardRef) -> Iterator[list[Doc]]:
        for group in self.groups(shard):
            if batch := [found for _, found in self.looked_at(shard, group)]:
                yield batch

    def get_priority(self, source: str) -> int:
        return self.plan.source(source).settings.priority

    def groups(self, shard: ShardRef) -> Iterator[tuple[int, list[LayerRow | None]]]:
        """Yield the number of its first row and the rows of each group of a shard, before the step."""
        files = [layer.file(self.output, shard.number) for layer in self.plan.source(shard.source).layers
                 if layer.number < self.step.entry.number]
        first = 0
        for rows in iter_row_batches(shard.source, files, [read_recorded_seal(file) for file in files]):
            yield first, rows
            first += len(rows)

    def looked_at(self, shard: ShardRef, group: tuple[int, list[LayerRow | None]]) -> list[tuple[int, Doc]]:
        """Return those rows of a group that the step looks at: place in the group and document."""
        first, rows = group
        kinds = self.step.entry.only.kinds
        return [(i, Doc(row.id, row.text, shard.source, shard.number, first + i, row.columns))
                for i, row in enumerate(rows)
                if row is not None and (not kinds or row.columns["kind"] in kinds)]


@dataclass(frozen=True)
class PipelineStage:
    """Tasks that need nothing of each other, and everything of the stages before."""

    number: int
    """Number of the layer that they write, or write towards."""
    kind: str
    """Name of the step, `PARSE` or `OUTPUT`."""
    index: int = -1
    """Number of the pass; -1: the step's outcomes, or no step."""
    pass_name: str = ""

    @property
    def name(self) -> str:
        return f"{self.number:02d}-{self.kind}" + (f"-{self.pass_name}" if self.pass_name else "")

    @property
    def what(self) -> str:
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
        return [("", task) for task in range(_step(plan, stage).passes[stage.index].num_tasks)]
    return [(source.settings.name, shard) for source in plan.sources if find_layer(source, stage)
            for shard in source.shards]


def find_layer(source: SourcePlan, stage: PipelineStage) -> Layer | None:
    return next((layer for layer in source.layers if layer.number == stage.number), None)


def _step(plan: PipelinePlan, stage: PipelineStage) -> StepPlan:
    return plan.steps[stage.number - 1]


def get_done_mark(plan: PipelinePlan, stage: PipelineStage, task: Task, output: Path) -> Path:
    if stage.index >= 0:
        # with the pass's results, so that nobody can delete these and leave the mark
        folder = get_pass_marks_folder(LayerView(plan, _step(plan, stage), output).work_folder)
        return folder / f"{stage.index}-{stage.pass_name}" / f"{task[1]:05d}"
    layer = find_layer(plan.source(task[0]), stage)
    assert layer is not None, (stage, task)
    return layer.rows(output, task[1])


def get_pass_marks_folder(shared: Path) -> Path:
    return shared / ".done"


def run_task(plan_file: Path, output: Path, stage: PipelineStage, task: Task) -> None:
    """Do one task, unless it is done.

    Raises:
        UserError: the user's data, settings or disk are in the way; the sentence says at which task.
    """
    plan = _plan(plan_file)
    mark = get_done_mark(plan, stage, task, output)
    # Two workers of a cluster may have been given the same task: the second finds it done.
    if mark.exists():
        return
    where = f"source {task[0]}, shard {task[1]}" if task[0] else f"pass {stage.pass_name}, task {task[1]}"
    try:
        with translate_disk_errors(mark):
            _do(plan, plan_file, output, stage, task, mark)
    except UserError as e:
        raise UserError(f"{where}, {stage.kind}: {e}") from e
    except FileNotFoundError as e:
        if shared := _shared_folder_of(e, output):
            raise UserError(f"{where}, {stage.kind}: {e.filename} is missing, which an earlier pass has "
                            f"left; delete {shared} and run the command again") from None
        raise
    except Exception as e:
        e.add_note(f"{where}, step {stage.kind}")
        raise


def _shared_folder_of(error: FileNotFoundError, output: Path) -> Path | None:
    """Return the folder of a step's passes that a missing file lies in; None: it lies in none."""
    file, shared = Path(os.fsdecode(error.filename or "")), output / "shared"
    return shared / file.relative_to(shared).parts[0] if shared in file.parents else None


def _do(plan: PipelinePlan, plan_file: Path, output: Path, stage: PipelineStage, task: Task,
        mark: Path) -> None:
    if stage.index >= 0:
        view = LayerView(plan, _step(plan, stage), output)
        view.work_folder.mkdir(parents=True, exist_ok=True)
        wall, cpu = time.perf_counter(), measure_cpu_seconds()
        _built(plan_file, stage.number, output, started=False).list_passes()[stage.index].run(view, task[1])
        # The mark comes last: a pass that is killed before it is run again, and leaves the same files.
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_sealed_json(mark, {"cpu_s": measure_cpu_seconds() - cpu, "wall_s": time.perf_counter() - wall},
                          get_place_in_run(mark))
        return
    source = plan.source(task[0])
    layer = find_layer(source, stage)
    assert layer is not None
    # Raw files are parsed in processes below this one, whose time counts too.
    starts_others = stage.kind == PARSE
    wall, cpu = time.perf_counter(), measure_cpu_seconds(starts_others)
    if stage.kind == PARSE:
        work = parse_shard(plan.pipeline, source, layer, output, task[1])
    elif stage.kind == OUTPUT:
        work = write_output_shard(plan, source, layer, output, task[1])
    else:
        work = _judge_shard(plan, plan_file, output, stage, ShardRef(*task), mark)
    # Counts are written before the rows get their name, which says that the shard is done.
    with work as counts:
        counts.wall_s, counts.cpu_s = time.perf_counter() - wall, measure_cpu_seconds(starts_others) - cpu
        write_sealed_json(layer.counts(output, task[1]), counts.to_dict())


def measure_cpu_seconds(with_others: bool = False) -> float:
    """Return what this process has used of the cores so far.

    Args:
        with_others: add what those below it have: files are parsed in one below.  To look for them takes
            longer than many a task.
    """
    mine = os.times()
    below = 0.0
    for child in psutil.Process().children(recursive=True) if with_others else ():
        with suppress(psutil.Error):
            times = child.cpu_times()
            below += times.user + times.system
    return mine.user + mine.system + mine.children_user + mine.children_system + below


@contextmanager
def _judge_shard(plan: PipelinePlan, plan_file: Path, output: Path, stage: PipelineStage, shard: ShardRef,
                 file: Path) -> Iterator[DocumentCounts]:
    """Write a step's layer over a shard; it gets its name when the caller is through with the counts."""
    entry = _step(plan, stage)
    view, counts = LayerView(plan, entry, output), DocumentCounts()
    step = _built(plan_file, stage.number, output, started=True)
    with LayerFile(file, entry.added_columns) as layer:
        for first, rows in view.groups(shard):
            looked_at = view.looked_at(shard, (first, rows))
            # Rows that the step does not look at are kept as they are.
            outcomes: list[StepOutcome | None] = [None if row is None else KEPT for row in rows]
            documents = [found for _, found in looked_at]
            for (i, document), outcome in zip(looked_at, _judged(step, entry, documents), strict=True):
                outcomes[i] = outcome
                counts.count(document.id, outcome.reason, document.text, outcome.text)
            try:
                layer.write_outcomes(outcomes)
            except (ValueError, TypeError) as e:
                raise TypeError(f"step {stage.kind} gives a value that is not of its column's type: "
                                f"{e}") from e
        counts.seals = {file.name: layer.close()}
        yield counts


def _judged(step: Step, entry: StepPlan, documents: list[Doc]) -> list[StepOutcome]:
    made = list(step.compute_outcomes(documents)) if documents else []
    if len(made) != len(documents):
        raise RuntimeError(f"step {step.kind} gave {len(made)} outcomes for {len(documents)} documents")
    for i, (document, outcome) in enumerate(zip(documents, made, strict=True)):
        if unknown := set(outcome.values) - set(entry.added_columns):
            raise RuntimeError(f"step {step.kind} gives columns that it does not add: {sorted(unknown)}")
        # A dropped document has no text, and one that is set to what it was is unchanged: layers stay small.
        if outcome.text is not None and (outcome.reason or outcome.text == document.text):
            made[i] = StepOutcome(outcome.reason, None, outcome.values)
        # A step that takes everything out has dropped the document.
        elif outcome.text is not None and not outcome.text.strip():
            made[i] = StepOutcome("nothing left", None, outcome.values)
    return made


@lru_cache(maxsize=2)
def _plan(file: Path) -> PipelinePlan:
    return PipelinePlan.read(file)


@lru_cache(maxsize=2)
def _built(plan_file: Path, number: int, output: Path, *, started: bool) -> Step:
    """Return a step as this process has it.

    Raises:
        UserError: what it read is not what the plan was made for.
    """
    plan = _plan(plan_file)
    found = plan.steps[number - 1].entry.build(plan.pipeline.folder)
    if started:
        found.load_inputs(LayerView(plan, plan.steps[number - 1], output))
    # Compared after loading: what the step has read is then what was hashed, or the task ends.
    planned = next(layer.reasons["files"] for source in plan.sources for layer in source.layers
                   if layer.number == number)
    if hash_step_files(found) != planned:
        raise UserError(f"{plan_file}: a file that step {number} reads has changed since the plan was made; "
                        "run the command again")
    return found
