"""Run a pipeline stage by stage, in local processes or Slurm arrays; finished tasks are skipped."""

import json
import shutil
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from data_prep.curate.pipeline.command import DataRunOptions
from data_prep.curate.pipeline.counts import DocumentCounts
from data_prep.curate.pipeline.finish import PIPELINE, build_summary, finish_run, is_complete
from data_prep.curate.pipeline.pipeline_file import (
    Pipeline, check_libraries, find_missing_libraries, load_pipeline)
from data_prep.curate.pipeline.plan import OUTPUT, PipelinePlan, make_plan
from data_prep.curate.pipeline.tasks import (
    PipelineStage, Task, find_layer, get_done_mark, iter_stages, list_tasks, run_task)
from data_prep.damaged_files import explain_deletion
from data_prep.tags import CORPUS
from megatron_sov.base.artifacts import MANIFEST, read_manifest, translate_disk_errors, write_atomically
from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import check_creatable
from megatron_sov.base.sealed import read_sealed_json
from megatron_sov.work.clusters.cluster import ClusterProfile
from megatron_sov.work.processes.pool import LOST_WORKER, WorkerLost, WorkerPool
from megatron_sov.work.progress.locks import lock_folder
from megatron_sov.work.progress.progress_bar import create_bar
from megatron_sov.work.submit.arrays import (
    FINISH, FINISH_CPUS, Arrays, ClusterOptions, Jobs, TaskFailed, check_no_active_jobs, check_quotable,
    check_restarts, load_array_profile, print_failures)

MAX_NAMED_TASKS = 8
"""Tasks that the error after a lost worker names."""


def run_from_options(options: DataRunOptions) -> None:
    """Run, submit or describe the pipeline of `sov-data run`."""
    pipeline = load_pipeline(options.pipeline)
    check_run_folder(options.output)
    check_outside_sources(pipeline, options.output)
    if options.dry_run:
        plan = make_plan(pipeline, options.output, writes_pieces=False)
        print("\n".join([*find_missing_libraries(pipeline), describe_plan(plan, options.output)]))
        return
    check_libraries(pipeline, options.pipeline)
    if options.cluster:
        submit_pipeline(pipeline, options.output, options)
    else:
        options.output.mkdir(parents=True, exist_ok=True)
        plan = make_plan(pipeline, options.output)
        for sentence in plan.list_skip_notes():
            print(sentence)
        run_pipeline(plan, options.output, options.workers)


def check_run_folder(output: Path) -> None:
    """Raise `UserError` if a folder does not belong to a pipeline."""
    check_creatable(output)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir() or not ((output / "plans").is_dir() or (output / "shards").is_dir()):
        raise UserError(f"{output}: exists and is no folder of a pipeline; choose another output folder")
    if (output / MANIFEST).is_file():
        read_manifest(output, CORPUS)


def check_outside_sources(pipeline: Pipeline, output: Path) -> None:
    """Raise `UserError` if a source contains the output folder: the source would read the output."""
    for source in pipeline.sources:
        for path in source.path:
            if output.resolve().is_relative_to((source.folder / path).resolve()):
                raise UserError(f"--output {output}: lies in {path!r} of source {source.name}, and would be "
                                "read with it; choose another output folder")


def run_pipeline(plan: PipelinePlan, output: Path, workers: int) -> None:
    """Run the open tasks and publish the corpus. Raises `UserError`: invalid data or settings, or a full
    disk. Finished tasks stay."""
    # One run at a time in a folder: the lock excludes local runs, active jobs exclude runs on a cluster.
    with lock_folder(output, output), translate_disk_errors(output):
        check_no_active_jobs(output)
        if is_complete(plan, output):
            print(f"{output}: complete from before")
            return
        _run_stages(plan, prepare_run(plan, output), output, workers, list(iter_stages(plan)))
        description = finish_run(plan, output)
    print(description)


def judge_documents(plan: PipelinePlan, output: Path, workers: int) -> None:
    """Run a plan's steps without writing a corpus; layers hold the outcomes. Raises like `run_pipeline`."""
    with lock_folder(output, output), translate_disk_errors(output):
        _run_stages(plan, prepare_run(plan, output), output, workers,
                    [stage for stage in iter_stages(plan) if stage.kind != OUTPUT])


def prepare_run(plan: PipelinePlan, output: Path) -> Path:
    """Write the plan, and delete temporary files, and the manifest unless this plan is complete; return the
    plan's file."""
    plans = output / "plans"
    plans.mkdir(exist_ok=True)
    file = plans / f"{plan.address}.json"
    plan.write(file)
    # Written before the first task: `sov-data inspect` recognizes an unfinished run by pipeline.json.
    write_atomically(output / PIPELINE, json.dumps(build_summary(plan, output), indent=1, ensure_ascii=False))
    if not is_complete(plan, output):
        # Deleted before the first task, so that no reader takes an unfinished folder for a complete corpus.
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
    """List a stage's unfinished tasks. A pass has no open tasks if the step's outcomes exist."""
    # After the last outcome nothing reads the results of passes, so that the user may delete them.
    if stage.index >= 0 and not list_open_tasks(plan, PipelineStage(stage.number, stage.kind), output):
        return []
    return [task for task in list_tasks(plan, stage) if not get_done_mark(plan, stage, task, output).exists()]


def _run_stages(plan: PipelinePlan, file: Path, output: Path, workers: int,
                stages: list[PipelineStage]) -> None:
    with WorkerPool(_create_task_runner, (file, output), workers) as pool:
        for stage in stages:
            open_tasks = list_open_tasks(plan, stage, output)
            start_s = time.monotonic()
            if open_tasks:
                _run_stage(pool, stage, open_tasks)
            _print_stage(plan, stage, output, len(open_tasks), time.monotonic() - start_s)


def _run_stage(pool: WorkerPool[tuple[PipelineStage, Task], None], stage: PipelineStage,
               open_tasks: list[Task]) -> None:
    # Results arrive in the order of the tasks, so each result belongs to the oldest running task.
    running: deque[Task] = deque()

    def iter_items() -> Iterator[tuple[PipelineStage, Task]]:
        for task in open_tasks:
            running.append(task)
            yield stage, task

    try:
        with create_bar(stage.name, len(open_tasks), "task") as bar:
            for _ in pool.each(iter_items()):
                running.popleft()
                bar.update()
    except WorkerLost:
        names = ", ".join(f"{number} of source {source}"
                          for source, number in islice(running, MAX_NAMED_TASKS))
        more = f" and {len(running) - MAX_NAMED_TASKS} more" if len(running) > MAX_NAMED_TASKS else ""
        raise UserError(f"step {stage.kind}: {LOST_WORKER}; these tasks are not finished: {names}{more}; "
                        "take fewer --workers or smaller shard_bytes, and run the command again") from None


def _create_task_runner(plan_file: Path, output: Path) -> Callable[[tuple[PipelineStage, Task]], None]:
    def run_item(item: tuple[PipelineStage, Task]) -> None:
        stage, task = item
        try:
            with translate_disk_errors(output):
                run_task(plan_file, output, stage, task)
        except UserError:
            raise
        except Exception as e:
            # Formatted here: tracebacks and notes are lost between processes.
            raise TaskFailed(f"step {stage.kind}: {''.join(traceback.format_exception(e))}") from None

    return run_item


def _print_stage(plan: PipelinePlan, stage: PipelineStage, output: Path, num_done: int,
                 wall_s: float) -> None:
    total = len(list_tasks(plan, stage))
    line = f"{stage.name}: {_format_count(total, stage.task_noun)}"
    if total > num_done:
        line += f", {total - num_done} from before"
    if stage.index < 0:
        counts = read_stage_counts(plan, stage, output)
        line += f", {counts.documents_in:,} documents, {counts.documents_kept:,} kept"
        if counts.broken:
            line += f", {sum(counts.broken.values()):,} broken or left out"
        if num_done:
            # Earlier runs finished the other shards, whose bytes took none of this time.
            line += f", {counts.bytes_in * num_done / total / max(wall_s, 1e-9) / 1e6:.1f} MB/s"
    print(line, flush=True)


def read_stage_counts(plan: PipelinePlan, stage: PipelineStage, output: Path) -> DocumentCounts:
    files = [layer.get_counts_file(output, shard) for source in plan.sources
             if (layer := find_layer(source, stage)) for shard in source.shards]
    return DocumentCounts.merge_dicts(read_sealed_json(file, explain_deletion(file)) for file in files)


# `--dry-run`


def describe_plan(plan: PipelinePlan, output: Path) -> str:
    """Return lines with sources, and finished and open tasks for each stage."""
    lines = [f"{plan.pipeline.name}: {_format_count(len(plan.sources), 'sources')}, "
             f"{_format_count(len(plan.steps), 'steps')}"]
    for source in plan.sources:
        lines.append(f"  source {source.settings.name}: {_format_count(source.num_files, 'files')}, "
                     f"{source.raw_bytes / 1e6:,.1f} MB, {_format_count(len(source.shards), 'shards')}")
        lines += [f"    {sentence}" for sentence in source.notes]
    if is_complete(plan, output):
        return "\n".join([*lines, f"{output}: complete from before, nothing is done"])
    return "\n".join([*lines, *_iter_progress_lines(plan, output)])


def _format_count(count: int, plural: str) -> str:
    return f"{count:,} {plural[:-1] if count == 1 else plural}"


# Slurm: one array for each stage, all submitted at once; each waits for the previous array. If a job fails,
# Slurm cancels the later arrays, and the same command submits the open tasks.


def submit_pipeline(pipeline: Pipeline, output: Path, options: ClusterOptions) -> None:
    """Submit the open tasks, or print the progress if jobs are active.

    Args:
        pipeline: the pipeline file.
        output: the run's folder; all nodes need access.
        options: cluster profile and limits.

    Raises:
        UserError: an invalid profile, a path that cannot be quoted in a script, a rejected submission, or
            active jobs with another plan.
    """
    output = output.absolute()
    check_quotable(output)
    profile = load_array_profile(options)
    output.mkdir(parents=True, exist_ok=True)
    with lock_folder(output, output):
        jobs = Jobs.read(output)
        active = jobs.list_active()
        plan = make_plan(pipeline, output)
        if is_complete(plan, output):
            print(f"{output}: complete from before")
            return
        # Two plans in one folder would delete each other's manifest.
        if active and jobs.address != plan.address:
            raise UserError(f"{output}: jobs {', '.join(active)} of another plan are at work in this folder; "
                            f"wait for them, or `scancel` them, and run the command again")
        if active:
            print("\n".join([f"{output}: at work in {jobs.describe(active)}",
                             *_iter_progress_lines(plan, output)]))
            return
        for sentence in plan.list_skip_notes():
            print(sentence)
        print_failures(output, [*(stage.name for stage in iter_stages(plan)), FINISH])
        _submit_arrays(plan, output, profile)


def _submit_arrays(plan: PipelinePlan, output: Path, profile: ClusterProfile) -> None:
    file = prepare_run(plan, output)
    with Arrays(output, plan.address, profile) as arrays:
        for stage in iter_stages(plan):
            if open_tasks := list_open_tasks(plan, stage, output):
                arrays.submit(stage.name, partial(run_array_task, file, output, stage, open_tasks),
                              len(open_tasks))
        arrays.submit(FINISH, partial(run_finish_task, file, output),
                      cpus=min(profile.cpus_per_node, FINISH_CPUS))
    print("\n".join([*_iter_progress_lines(plan, output),
                     f"{output}: submitted {len(arrays.jobs.numbers)} jobs: {arrays.describe()}; the same "
                     "command tells how far they are"]))


def _iter_progress_lines(plan: PipelinePlan, output: Path) -> Iterator[str]:
    for stage in iter_stages(plan):
        total, num_open = len(list_tasks(plan, stage)), len(list_open_tasks(plan, stage, output))
        yield f"  {stage.name}: {total - num_open:,} of {total:,} {stage.task_noun} done"


def run_array_task(plan_file: Path, output: Path, stage: PipelineStage, open_tasks: Sequence[Task],
                   index: int) -> None:
    check_restarts(f"step {stage.kind}", "take smaller shard_bytes")
    run_task(plan_file, output, stage, open_tasks[index])


def run_finish_task(plan_file: Path, output: Path, index: int) -> None:
    check_restarts("finish", "give the job more time or memory")
    finish_run(PipelinePlan.read(plan_file), output)
