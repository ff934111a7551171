"""A run from its plan to its end, here or by a cluster: stage after stage, what is done left as it is."""

from __future__ import annotations

import json
import os
import shutil
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from data_prep.curate.pipeline.counts import DocumentCounts, StageProgress
from data_prep.curate.pipeline.finish import KIND, PIPELINE, build_summary, finish_run, is_complete
from data_prep.curate.pipeline.pipeline_file import Pipeline
from data_prep.curate.pipeline.plan import OUTPUT, PipelinePlan, make_plan
from data_prep.curate.pipeline.tasks import (
    PipelineStage, Task, find_layer, get_done_mark, iter_stages, list_tasks, run_task)
from data_prep.damaged_files import explain_deletion
from megatron_sov.base.artifacts import MANIFEST, read_manifest, translate_disk_errors, write_atomically
from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import check_creatable
from megatron_sov.base.sealed import read_sealed_json
from megatron_sov.work.clusters.cluster import ClusterProfile
from megatron_sov.work.processes.pool import LOST_WORKER, WorkerLost, WorkerPool
from megatron_sov.work.progress.locks import lock_folder
from megatron_sov.work.submit.arrays import (
    FINISH, FINISH_CPUS, Arrays, ClusterOptions, Jobs, TaskFailed, check_no_active_jobs, check_quotable,
    check_restarts, load_array_profile, print_failures)

MAX_NAMED = 8
"""Tasks that are told where a worker was lost."""


def check_run_folder(output: Path) -> None:
    """Raise `UserError` where a run cannot have its folder: it is something else's."""
    check_creatable(output)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir() or not ((output / "plans").is_dir() or (output / "shards").is_dir()):
        raise UserError(f"{output}: exists and is no folder of a pipeline; choose another output folder")
    if (output / MANIFEST).is_file():
        read_manifest(output, KIND)


def check_outside_sources(pipeline: Pipeline, output: Path) -> None:
    """Raise `UserError` where a run's folder lies in a source: its files would be read as documents."""
    for source in pipeline.sources:
        for path in source.path:
            if output.resolve().is_relative_to((source.folder / path).resolve()):
                raise UserError(f"--output {output}: lies in {path!r} of source {source.name}, and would be "
                                "read with it; choose another output folder")


def prepare_run(plan: PipelinePlan, output: Path) -> Path:
    """Write the plan where its tasks find it, clear what killed tasks have left, and take back the manifest
    of an earlier plan; returns the plan's file."""
    plans = output / "plans"
    plans.mkdir(exist_ok=True)
    file = plans / f"{plan.address}.json"
    plan.write(file)
    # Written before anything is done: readers of an unfinished run know it by this file.
    write_atomically(output / PIPELINE, json.dumps(build_summary(plan, output), indent=1, ensure_ascii=False))
    if not is_complete(plan, output):
        # Taken back before the first task: while the plan is at work, the folder must not pass for complete.
        (output / MANIFEST).unlink(missing_ok=True)
    # We hold the lock, so no living process owns a temporary name.
    for folder in [output, *(output / layer.folder for source in plan.sources for layer in source.layers)]:
        for leftover in [*folder.glob(".*.tmp-*"), *folder.glob(".*.old-*")]:
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
    return file


def list_open_tasks(plan: PipelinePlan, stage: PipelineStage, output: Path) -> list[Task]:
    """Return the tasks of a stage that are still to be done; passes of a step whose outcomes all stand are
    for nobody."""
    # Once all outcomes are written, what passes left is not read again, and may be deleted.
    if stage.index >= 0 and not list_open_tasks(plan, PipelineStage(stage.number, stage.kind), output):
        return []
    return [task for task in list_tasks(plan, stage) if not get_done_mark(plan, stage, task, output).exists()]


def run_pipeline(plan: PipelinePlan, output: Path, workers: int) -> None:
    """Do all that is not done, and finish the run.

    Raises:
        UserError: the user's data, settings or disk are in the way; what is done stays.
    """
    # One run at a time in a folder: here by the lock, on a cluster by the jobs that are alive.
    with lock_folder(output, output), translate_disk_errors(output):
        check_no_active_jobs(output)
        if is_complete(plan, output):
            print(f"{output}: complete from before")
            return
        _do_stages(plan, prepare_run(plan, output), output, workers, list(iter_stages(plan)))
        stands = finish_run(plan, output, workers)
    print(stands)


def judge_documents(plan: PipelinePlan, output: Path, workers: int) -> None:
    """Do the steps of a plan, and write no corpus: what became of each document stands in its layers.

    Raises:
        UserError: as `run_pipeline`.
    """
    with lock_folder(output, output), translate_disk_errors(output):
        _do_stages(plan, prepare_run(plan, output), output, workers,
                   [stage for stage in iter_stages(plan) if stage.kind != OUTPUT])


def _do_stages(plan: PipelinePlan, file: Path, output: Path, workers: int,
               wanted: list[PipelineStage]) -> None:
    """Do what is not done of some stages, in order, by processes that are the same for all of them."""
    with WorkerPool(_doer, (file, output), workers) as pool:
        for stage in wanted:
            todo = list_open_tasks(plan, stage, output)
            began = time.monotonic()
            if todo:
                _do_stage(pool, stage, todo)
            _tell(plan, stage, output, len(todo), time.monotonic() - began)


def _do_stage(pool: WorkerPool[tuple[PipelineStage, Task], None], stage: PipelineStage,
              todo: list[Task]) -> None:
    # Results come in the order of the tasks, so the first of those begun is the one that is done.
    under_way: deque[Task] = deque()

    def begun() -> Iterator[tuple[PipelineStage, Task]]:
        for task in todo:
            under_way.append(task)
            yield stage, task

    try:
        with StageProgress(stage.name, len(todo), stage.what) as progress:
            for _ in pool.each(begun()):
                under_way.popleft()
                progress()
    except WorkerLost:
        named = ", ".join(f"{number} of source {source}" for source, number in islice(under_way, MAX_NAMED))
        more = f" and {len(under_way) - MAX_NAMED} more" if len(under_way) > MAX_NAMED else ""
        raise UserError(f"step {stage.kind}: {LOST_WORKER}; these tasks are not finished: {named}{more}; "
                        "take fewer --workers or smaller shard_bytes, and run the command again"
                        ) from None


def _doer(plan_file: Path, output: Path) -> Callable[[tuple[PipelineStage, Task]], None]:
    def do(item: tuple[PipelineStage, Task]) -> None:
        stage, task = item
        try:
            with translate_disk_errors(output):
                run_task(plan_file, output, stage, task)
        except UserError:
            raise
        except Exception as e:  # of another process its notes would be lost
            # As text: a traceback does not travel between processes.
            raise TaskFailed(f"step {stage.kind}: {''.join(traceback.format_exception(e))}") from None

    return do


def _tell(plan: PipelinePlan, stage: PipelineStage, output: Path, num_done: int, wall_s: float) -> None:
    total = len(list_tasks(plan, stage))
    kept = total - num_done
    line = f"{stage.name}: {total} {stage.what[:-1]}{'' if total == 1 else 's'}"
    if kept:
        line += f", {kept} from before"
    if stage.index < 0:
        counts = read_stage_counts(plan, stage, output)
        line += f", {counts.documents_in:,} documents, {counts.documents_kept:,} kept"
        if counts.broken:
            line += f", {sum(counts.broken.values()):,} broken or left out"
        if num_done:
            # Of all bytes the share that was done now: what was done before took none of this time.
            line += f", {counts.bytes_in * num_done / total / max(wall_s, 1e-9) / 1e6:.1f} MB/s"
    print(line, flush=True)


def read_stage_counts(plan: PipelinePlan, stage: PipelineStage, output: Path) -> DocumentCounts:
    return DocumentCounts.together(read_sealed_json(file := layer.counts(output, shard),
                                                    explain_deletion(file))
                           for source in plan.sources if (layer := find_layer(source, stage))
                           for shard in source.shards)


# What a run would do: sources, steps, and how much of each is done.


def describe_plan(plan: PipelinePlan, output: Path) -> str:
    lines = [f"{plan.pipeline.name}: {_many(len(plan.sources), 'source')}, {_many(len(plan.steps), 'step')}"]
    for source in plan.sources:
        lines.append(f"  source {source.settings.name}: {_many(source.num_files, 'file')}, "
                     f"{source.raw_bytes / 1e6:,.1f} MB, {_many(len(source.shards), 'shard')}")
        lines += [f"    {sentence}" for sentence in source.notes]
    if is_complete(plan, output):
        lines.append(f"{output}: complete from before, nothing is done")
        return "\n".join(lines)
    for stage in iter_stages(plan):
        total, left = len(list_tasks(plan, stage)), len(list_open_tasks(plan, stage, output))
        lines.append(f"  {stage.name}: {_many(total, stage.what[:-1])}, {total - left:,} done, "
                     f"{left:,} to do")
    if plan.pipeline.pack is not None:
        lines.append(f"  pack: {plan.pipeline.pack.tokenizer}")
    return "\n".join(lines)


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


# A run as arrays of a cluster's jobs: one for each stage, each waiting for the one before; all submitted at
# once.  A job that fails takes those after it away; the same command, run again, submits what is not done.


def run_array_task(plan_file: Path, output: Path, stage: PipelineStage, todo: Sequence[Task],
                   task: int) -> None:
    check_restarts(f"step {stage.kind}", "take smaller shard_bytes")
    run_task(plan_file, output, stage, todo[task])


def run_finish_task(plan_file: Path, output: Path, task: int) -> None:
    check_restarts("finish", "leave `pack` out and pack by `sov-data pack` in parts")
    finish_run(PipelinePlan.read(plan_file), output, len(os.sched_getaffinity(0)))


def submit_pipeline(pipeline: Pipeline, output: Path, where: ClusterOptions) -> None:
    """Submit what is not done, or tell how far jobs are that work on it.

    Args:
        pipeline: the file.
        output: the run's folder, which all nodes see.
        where: it is submitted to.

    Raises:
        UserError: the profile is wrong, a path cannot stand in a script, the cluster refuses, or jobs of
            another plan are at work.
    """
    output = output.absolute()
    check_quotable(output)
    profile = load_array_profile(where)
    output.mkdir(parents=True, exist_ok=True)
    with lock_folder(output, output):
        before = Jobs.read(output)
        living = before.list_active()
        plan = make_plan(pipeline, output)
        if is_complete(plan, output):
            print(f"{output}: complete from before")
            return
        # Two plans in one folder would take each other's manifest back.
        if living and before.address != plan.address:
            raise UserError(f"{output}: jobs {', '.join(living)} of another plan are at work in this folder; "
                            f"wait for them, or `scancel` them, and run the command again")
        if living:
            print("\n".join([f"{output}: at work in {before.describe(living)}", *_progress(plan, output)]))
            return
        for sentence in plan.list_passed_over():
            print(sentence)
        print_failures(output, [*(stage.name for stage in iter_stages(plan)), FINISH])
        _submit_run(plan, output, profile)


def _submit_run(plan: PipelinePlan, output: Path, profile: ClusterProfile) -> None:
    file = prepare_run(plan, output)
    with Arrays(output, plan.address, profile) as arrays:
        for stage in iter_stages(plan):
            if todo := list_open_tasks(plan, stage, output):
                arrays.submit(stage.name, partial(run_array_task, file, output, stage, todo), len(todo))
        arrays.submit(FINISH, partial(run_finish_task, file, output),
                      cpus=min(profile.cpus_per_node, FINISH_CPUS))
    print("\n".join([*_progress(plan, output), f"{output}: submitted {len(arrays.jobs.numbers)} jobs: "
                     f"{arrays.describe()}; the same command tells how far they are"]))


def _progress(plan: PipelinePlan, output: Path) -> Iterator[str]:
    for stage in iter_stages(plan):
        total, left = len(list_tasks(plan, stage)), len(list_open_tasks(plan, stage, output))
        yield f"  {stage.name}: {total - left:,} of {total:,} {stage.what} done"
