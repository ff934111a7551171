"""The tasks of a run, one shard or one task of a pass each, as a process anywhere does them.

What a task leaves is complete when its file stands, which is renamed to its name last; a task that is done
is not done again, whoever asks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import psutil

from data_prep.pipeline.counts import Counts
from data_prep.pipeline.layer_view import LayerView
from data_prep.pipeline.layers import LayerFile
from data_prep.pipeline.output import write_output_shard
from data_prep.pipeline.parsing import parse_shard
from data_prep.pipeline.plan import OUTPUT, PARSE, Layer, Plan, SourcePlan, StepPlan, file_hashes
from data_prep.pipeline.step import KEPT, Doc, Outcome, ShardRef, Step
from data_prep.shard_damage import place_in_run
from megatron_sov.artifacts import disk_errors
from megatron_sov.errors import UserError
from megatron_sov.sealed import write_json

Task = tuple[str, int]
"""Name of a source and number of a shard; of a pass "" and the number of its task."""


@dataclass(frozen=True)
class Stage:
    """Tasks that need nothing of each other, and everything of the stages before."""

    number: int
    """Number of the layer that they write, or write towards."""
    kind: str
    """Name of the step, `PARSE` or `OUTPUT`."""
    index: int = -1
    """Number of the pass; -1: the step's outcomes, or no step."""
    pass_name: str = ""
    """Name of the pass."""

    @property
    def name(self) -> str:
        """Return what it is called in messages and folders."""
        return f"{self.number:02d}-{self.kind}" + (f"-{self.pass_name}" if self.pass_name else "")


def stages(plan: Plan) -> Iterator[Stage]:
    """Yield the stages of a run, in order."""
    yield Stage(0, PARSE)
    for step in plan.steps:
        if step.sources:
            for index, step_pass in enumerate(step.passes):
                yield Stage(step.entry.number, step.entry.kind, index, step_pass.name)
            yield Stage(step.entry.number, step.entry.kind)
    yield Stage(len(plan.pipeline.steps) + 1, OUTPUT)


def tasks(plan: Plan, stage: Stage) -> list[Task]:
    """Return all tasks of a stage."""
    if stage.index >= 0:
        return [("", task) for task in range(_step(plan, stage).passes[stage.index].num_tasks)]
    return [(source.settings.name, shard) for source in plan.sources if layer_of(source, stage)
            for shard in source.shards]


def layer_of(source: SourcePlan, stage: Stage) -> Layer | None:
    """Return the layer that a stage writes for a source, None where it does not look at it."""
    return next((layer for layer in source.layers if layer.number == stage.number), None)


def _step(plan: Plan, stage: Stage) -> StepPlan:
    return plan.steps[stage.number - 1]


def done_mark(plan: Plan, stage: Stage, task: Task, output: Path) -> Path:
    """Return what stands when a task is done."""
    if stage.index >= 0:
        # with the pass's results, so that nobody can delete these and leave the mark
        folder = pass_marks(LayerView(plan, _step(plan, stage), output).work)
        return folder / f"{stage.index}-{stage.pass_name}" / f"{task[1]:05d}"
    layer = layer_of(plan.source(task[0]), stage)
    assert layer is not None, (stage, task)
    return layer.rows(output, task[1])


def pass_marks(shared: Path) -> Path:
    """Return the folder with the marks of a step's passes, by the folder of what they have left."""
    return shared / ".done"


def do_task(plan_file: Path, output: Path, stage: Stage, task: Task) -> None:
    """Do one task, unless it is done.

    Raises:
        UserError: the user's data, settings or disk are in the way; the sentence says at which task.
    """
    plan = _plan(plan_file)
    mark = done_mark(plan, stage, task, output)
    if mark.exists():
        return
    where = f"source {task[0]}, shard {task[1]}" if task[0] else f"pass {stage.pass_name}, task {task[1]}"
    try:
        with disk_errors(mark):
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


def _do(plan: Plan, plan_file: Path, output: Path, stage: Stage, task: Task, mark: Path) -> None:
    if stage.index >= 0:
        view = LayerView(plan, _step(plan, stage), output)
        view.work.mkdir(parents=True, exist_ok=True)
        wall, cpu = time.perf_counter(), cpu_seconds()
        _built(plan_file, stage.number, output, started=False).passes()[stage.index].run(view, task[1])
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_json(mark, {"cpu_s": cpu_seconds() - cpu, "wall_s": time.perf_counter() - wall},
                   place_in_run(mark))
        return
    source = plan.source(task[0])
    layer = layer_of(source, stage)
    assert layer is not None
    starts_others = stage.kind == PARSE
    wall, cpu = time.perf_counter(), cpu_seconds(starts_others)
    if stage.kind == PARSE:
        work = parse_shard(plan.pipeline, source, layer, output, task[1])
    elif stage.kind == OUTPUT:
        work = write_output_shard(plan, source, layer, output, task[1])
    else:
        work = _judge_shard(plan, plan_file, output, stage, ShardRef(*task), mark)
    with work as counts:
        counts.wall_s, counts.cpu_s = time.perf_counter() - wall, cpu_seconds(starts_others) - cpu
        write_json(layer.counts(output, task[1]), counts.to_dict())


def cpu_seconds(with_others: bool = False) -> float:
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
def _judge_shard(plan: Plan, plan_file: Path, output: Path, stage: Stage, shard: ShardRef,
                 file: Path) -> Iterator[Counts]:
    """Write a step's layer over a shard; it gets its name when the caller is through with the counts."""
    entry = _step(plan, stage)
    view, counts = LayerView(plan, entry, output), Counts()
    step = _built(plan_file, stage.number, output, started=True)
    with LayerFile(file, entry.adds) as layer:
        for first, rows in view.groups(shard):
            looked_at = view.looked_at(shard, (first, rows))
            outcomes: list[Outcome | None] = [None if row is None else KEPT for row in rows]
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


def _judged(step: Step, entry: StepPlan, documents: list[Doc]) -> list[Outcome]:
    """Return what a step makes of documents, checked."""
    made = list(step.outcomes(documents)) if documents else []
    if len(made) != len(documents):
        raise RuntimeError(f"step {step.kind} gave {len(made)} outcomes for {len(documents)} documents")
    for i, (document, outcome) in enumerate(zip(documents, made, strict=True)):
        if unknown := set(outcome.values) - set(entry.adds):
            raise RuntimeError(f"step {step.kind} gives columns that it does not add: {sorted(unknown)}")
        if outcome.text is not None and (outcome.reason or outcome.text == document.text):
            made[i] = Outcome(outcome.reason, None, outcome.values)
        elif outcome.text is not None and not outcome.text.strip():
            made[i] = Outcome("nothing left", None, outcome.values)
    return made


@lru_cache(maxsize=2)
def _plan(file: Path) -> Plan:
    return Plan.read(file)


@lru_cache(maxsize=2)
def _built(plan_file: Path, number: int, output: Path, *, started: bool) -> Step:
    """Return a step as this process has it.

    Raises:
        UserError: what it read is not what the plan was made for.
    """
    plan = _plan(plan_file)
    found = plan.steps[number - 1].entry.build(plan.pipeline.folder)
    if started:
        found.start(LayerView(plan, plan.steps[number - 1], output))
    planned = next(layer.reasons["files"] for source in plan.sources for layer in source.layers
                   if layer.number == number)
    if file_hashes(found) != planned:
        raise UserError("a file that the step reads has changed since the plan was made; run the command "
                        "again")
    return found
