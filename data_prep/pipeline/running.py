"""A run from its plan to its end on this machine: stage after stage, what is done left as it is."""

from __future__ import annotations

import json
import shutil
import time
from functools import partial
from pathlib import Path

from data_prep.pipeline.counts import Counts
from data_prep.pipeline.engine import tasks_here
from data_prep.pipeline.finish import KIND, PIPELINE, finish, is_complete, summary_of
from data_prep.pipeline.pipeline_file import Pipeline
from data_prep.pipeline.plan import OUTPUT, Plan, note_reasons
from data_prep.pipeline.progress import StageProgress
from data_prep.pipeline.reuse import take_over
from data_prep.pipeline.tasks import Stage, Task, done_mark, layer_of, stages, tasks
from data_prep.shard_damage import way_out
from megatron_sov.artifacts import MANIFEST, atomic_write, disk_errors, read_manifest
from megatron_sov.errors import UserError
from megatron_sov.outputs import refuse_nowhere
from megatron_sov.sealed import read_json
from megatron_sov.work.arrays import refuse_living
from megatron_sov.work.locks import holding


def check_folder(output: Path) -> None:
    """Raise `UserError` where a run cannot have its folder: it is something else's."""
    refuse_nowhere(output)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir() or not ((output / "plans").is_dir() or (output / "inputs").is_dir()):
        raise UserError(f"{output}: exists and is no folder of a pipeline; choose another output folder")
    if (output / MANIFEST).is_file():
        read_manifest(output, KIND)


def refuse_inside_sources(pipeline: Pipeline, output: Path) -> None:
    """Raise `UserError` where a run's folder lies in a source: its files would be read as documents."""
    for source in pipeline.sources:
        for path in source.path:
            if output.resolve().is_relative_to((source.folder / path).resolve()):
                raise UserError(f"--output {output}: lies in {path!r} of source {source.name}, and would be "
                                "read with it; choose another output folder")


def begin(plan: Plan, output: Path) -> Path:
    """Write the plan where its tasks find it, clear what killed tasks have left, and take back the manifest
    of an earlier plan; returns the plan's file."""
    plans = output / "plans"
    plans.mkdir(exist_ok=True)
    file = plans / f"{plan.address}.json"
    plan.write(file)
    note_reasons(output, plan)
    atomic_write(output / PIPELINE, json.dumps(summary_of(plan, output), indent=1, ensure_ascii=False))
    if not is_complete(plan, output):
        (output / MANIFEST).unlink(missing_ok=True)
    for folder in [output, *(output / layer.folder for source in plan.sources for layer in source.layers)]:
        for leftover in [*folder.glob(".*.tmp-*"), *folder.glob(".*.old-*")]:
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
    take_over(plan, output)
    return file


def open_tasks(plan: Plan, stage: Stage, output: Path) -> list[Task]:
    """Return the tasks of a stage that are still to be done; passes of a step whose outcomes all stand are
    for nobody."""
    if stage.index >= 0 and not open_tasks(plan, Stage(stage.number, stage.kind), output):
        return []
    return [task for task in tasks(plan, stage) if not done_mark(plan, stage, task, output).exists()]


def run_pipeline(plan: Plan, output: Path, workers: int) -> None:
    """Do all that is not done, and finish the run.

    Raises:
        UserError: the user's data, settings or disk are in the way; what is done stays.
    """
    with holding(output, output), disk_errors(output):
        refuse_living(output)
        if is_complete(plan, output):
            print(f"{output}: complete from before")
            return
        _do_stages(plan, begin(plan, output), output, workers, list(stages(plan)))
        stands = finish(plan, output, workers)
    print(stands)


def judge_documents(plan: Plan, output: Path, workers: int) -> None:
    """Do the steps of a plan, and write no corpus: what became of each document stands in its layers.

    Raises:
        UserError: as `run_pipeline`.
    """
    with holding(output, output), disk_errors(output):
        _do_stages(plan, begin(plan, output), output, workers,
                   [stage for stage in stages(plan) if stage.kind != OUTPUT])


def _do_stages(plan: Plan, file: Path, output: Path, workers: int, wanted: list[Stage]) -> None:
    """Do what is not done of some stages, in order."""
    with tasks_here(file, output, workers) as do_tasks:
        for stage in wanted:
            todo = open_tasks(plan, stage, output)
            began = time.monotonic()
            if todo:
                what = "tasks" if stage.index >= 0 else "shards"
                with StageProgress(stage.name, len(todo), what,
                                   partial(_num_done, plan, stage, todo, output)) as progress:
                    do_tasks(stage, todo, progress)
            _tell(plan, stage, output, len(todo), time.monotonic() - began)


def _num_done(plan: Plan, stage: Stage, todo: list[Task], output: Path) -> int:
    return sum(done_mark(plan, stage, task, output).exists() for task in todo)


def _tell(plan: Plan, stage: Stage, output: Path, num_done: int, wall_s: float) -> None:
    """Print a line about a stage."""
    total = len(tasks(plan, stage))
    tasks_text = f"{total} {'task' if stage.index >= 0 else 'shard'}{'' if total == 1 else 's'}"
    kept = total - num_done
    before = f", {kept} from before" if kept else ""
    line = f"{stage.name}: {tasks_text}{before}"
    if stage.index < 0:
        counts = stage_counts(plan, stage, output)
        line += f", {counts.documents_in:,} documents, {counts.documents_kept:,} kept"
        if counts.broken:
            line += f", {sum(counts.broken.values()):,} broken or left out"
        if num_done:
            line += f", {counts.bytes_in * num_done / total / max(wall_s, 1e-9) / 1e6:.1f} MB/s"
    print(line, flush=True)


def stage_counts(plan: Plan, stage: Stage, output: Path) -> Counts:
    """Return the counts of a stage over all sources."""
    return Counts.together(read_json(file := layer.counts(output, shard), way_out(file))
                           for source in plan.sources if (layer := layer_of(source, stage))
                           for shard in source.shards)
