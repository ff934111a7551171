"""A run as arrays of a cluster's jobs: one for each stage, each waiting for the one before; all submitted at
once.

A job that fails takes those behind it away; the same command, run again, submits what is not done.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.pipeline.finish import finish, is_complete
from data_prep.pipeline.inputs import (
    Batch,
    batches,
    is_much,
    read_batch,
    told,
    unknown_inputs,
)
from data_prep.pipeline.pipeline_file import Pipeline
from data_prep.pipeline.plan import Plan, make_plan
from data_prep.pipeline.running import begin, open_tasks
from data_prep.pipeline.tasks import Stage, Task, do_task, stages, tasks
from megatron_sov.clusters.cluster import ClusterProfile
from megatron_sov.clusters.kubernetes import KubernetesProfile
from megatron_sov.errors import UserError
from megatron_sov.work.arrays import (
    FINISH,
    FINISH_CPUS,
    Arrays,
    ClusterOptions,
    Jobs,
    profile_of,
    refuse_many_restarts,
    refuse_unquotable,
    tell_failures,
)
from megatron_sov.work.locks import holding

READING = "reading"
"""Stands for the address of a plan that there is not yet."""
READING_STAGES = ("inputs", "submit")


@dataclass(frozen=True)
class DoTasks:
    """The work of an array: tasks of a stage."""

    plan_file: Path
    output: Path
    stage: Stage
    todo: tuple[Task, ...]

    def __call__(self, task: int) -> None:
        """Do one of them."""
        refuse_many_restarts(f"step {self.stage.kind}", "take smaller shard_bytes")
        do_task(self.plan_file, self.output, self.stage, self.todo[task])


@dataclass(frozen=True)
class FinishRun:
    """The work of the last job."""

    plan_file: Path
    output: Path

    def __call__(self, task: int) -> None:
        """Finish the run."""
        refuse_many_restarts("finish", "leave `pack` out and pack by `sov-data pack` in parts")
        finish(Plan.read(self.plan_file), self.output, len(os.sched_getaffinity(0)))


@dataclass(frozen=True)
class ReadInputs:
    """The work of the array that reads raw files before there is a plan."""

    output: Path
    batches: tuple[Batch, ...]

    def __call__(self, task: int) -> None:
        """Read one batch of files."""
        refuse_many_restarts("inputs", "cut raw files that are larger than 100 GB")
        read_batch(self.batches[task], self.output)


@dataclass(frozen=True)
class SubmitRest:
    """The work of the job behind that array: what the command would do now."""

    pipeline: Pipeline
    output: Path
    profile: ClusterProfile | KubernetesProfile

    def __call__(self, task: int) -> None:
        """Submit the run."""
        with holding(self.output, self.output):
            plan = make_plan(self.pipeline, self.output)
            if not is_complete(plan, self.output):
                _submit_run(plan, self.output, self.profile)


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
    refuse_unquotable(output)
    profile = profile_of(where)
    (output / "inputs").mkdir(parents=True, exist_ok=True)
    with holding(output, output):
        before = Jobs.read(output)
        living = before.living()
        if living and before.address == READING:
            then = "the same command then submits" if before.namespace else "the last of them submits"
            print(f"{output}: {before.told(living)} read the raw files; {then} the steps")
            return
        unknown = unknown_inputs(pipeline, output)
        plan = None if is_much(unknown) else make_plan(pipeline, output)
        if plan is not None and is_complete(plan, output):
            print(f"{output}: complete from before")
            return
        if living and (plan is None or before.address != plan.address):
            raise UserError(f"{output}: jobs {', '.join(living)} of another plan are at work in this folder; "
                            f"wait for them, or {before.way_to_end} them, and run the command again")
        if plan is None:
            _submit_reading(pipeline, output, profile, unknown)
            return
        if living:
            print("\n".join([f"{output}: at work in {before.told(living)}",
                             *_progress(plan, output)]))
            return
        for sentence in plan.told():
            print(sentence)
        tell_failures(output, [*READING_STAGES, *(stage.name for stage in stages(plan)), FINISH])
        _submit_run(plan, output, profile)


def _submit_reading(pipeline: Pipeline, output: Path, profile: ClusterProfile | KubernetesProfile,
                    unknown: dict[str, dict[Path, int]]) -> None:
    """Submit the jobs that read raw files, and the one behind them that submits the run."""
    tell_failures(output, READING_STAGES)
    found = tuple(batches(unknown))
    reading, rest = READING_STAGES
    with Arrays(output, READING, profile) as arrays:
        first = arrays.submit(reading, ReadInputs(output, found), len(found))
        if isinstance(profile, ClusterProfile):
            second = arrays.submit(rest, SubmitRest(pipeline, output, profile))
            said = (f"2 jobs: {first} reads them, {second} then submits the steps; the same command tells "
                    "how far they are")
        else:  # a pod has no right to make Jobs
            said = f"1 job: {first} reads them; the same command, typed when it has ended, submits the steps"
    print(f"{output}: the contents of {told(unknown)} are not known yet; submitted {said}")


def _submit_run(plan: Plan, output: Path, profile: ClusterProfile | KubernetesProfile) -> None:
    """Submit the tasks of a plan that are not done, and the job that finishes the run."""
    file = begin(plan, output)
    with Arrays(output, plan.address, profile) as arrays:
        for stage in stages(plan):
            if todo := open_tasks(plan, stage, output):
                arrays.submit(stage.name, DoTasks(file, output, stage, tuple(todo)), len(todo))
        arrays.submit(FINISH, FinishRun(file, output), cpus=min(profile.cpus_per_node, FINISH_CPUS))
    print("\n".join([*_progress(plan, output), f"{output}: submitted {len(arrays.jobs.numbers)} jobs: "
                     f"{arrays.told()}; the same command tells how far they are"]))


def _progress(plan: Plan, output: Path) -> Iterator[str]:
    for stage in stages(plan):
        total, left = len(tasks(plan, stage)), len(open_tasks(plan, stage, output))
        what = "tasks" if stage.index >= 0 else "shards"
        yield f"  {stage.name}: {total - left:,} of {total:,} {what} done"


