"""A run as Slurm's arrays: one for each stage, each waiting for the one before; all submitted at once.

A job that fails takes those behind it away; the same command, run again, submits what is not done.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.executor import SlurmPipelineExecutor
from datatrove.executor.base import DistributedEnvVars

import data_prep
from data_prep.pipeline.engine import (
    TaskFailed,
    TaskList,
    keeping_failure,
    prepare,
    raise_failures,
    refuse_many_restarts,
)
from data_prep.pipeline.finish import finish, is_complete
from data_prep.pipeline.inputs import (
    batch_of,
    batches,
    is_much,
    read_batch,
    told,
    unknown_inputs,
    write_batches,
)
from data_prep.pipeline.pipeline_file import Pipeline
from data_prep.pipeline.plan import Plan, make_plan
from data_prep.pipeline.running import begin, only_one, open_tasks
from data_prep.pipeline.slurm_jobs import Jobs
from data_prep.pipeline.tasks import stages, tasks
from megatron_sov.artifacts import disk_errors
from megatron_sov.clusters import client, cluster
from megatron_sov.clusters.cluster import ClusterProfile
from megatron_sov.errors import UserError
from megatron_sov.runs.background import environment_outside_jobs

PROGRAM = "launch_pickled_pipeline"
"""What the executor's jobs call to read what this command has pickled, and nothing else."""
FINISH_CPUS = 16
READING = "reading"
"""Stands for the address of a plan that there is not yet."""
READING_STAGES = ("inputs", "submit")
BATCHES = "batches.json"
DEFAULT_MAX_ARRAY = 1001
_NOT_IN_SCRIPTS = re.compile(r"""[\s%\\"'$`;&|<>()*?\[\]{}!#~]""")
"""What the executor's scripts, which quote nothing, or Slurm's names of logs take for something else."""


class SlurmArray(SlurmPipelineExecutor):
    """The executor, with the options that a profile leaves empty left out, its program called by its path,
    since a container may have a PATH of its own, and no job for statistics: that one waits for an array of
    its own for ever where there is more than one (github.com/huggingface/datatrove/issues/238)."""

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        """Return the options of the script."""
        options = super().get_sbatch_args(max_array)
        return {name: value for name, value in options.items() if value or name == "requeue"}

    def get_launch_file_contents(self, sbatch_args: dict[str, Any], run_script: str) -> str:
        """Return the script."""
        program = self.logging_dir.resolve_paths(f"bin/{PROGRAM}")
        text: str = super().get_launch_file_contents(sbatch_args, run_script.replace(PROGRAM, program))
        return text

    def get_distributed_env(self, node_rank: int = -1) -> DistributedEnvVars:
        """Return what its own blocks would ask for.  The executor asks `scontrol` for the nodes' names before
        each task, which a container may lack; a task of ours has one node, and asks for nothing."""
        return DistributedEnvVars(
            datatrove_node_ips=os.environ.get("SLURM_NODELIST", ""), datatrove_gpus_on_node="0",
            datatrove_cpus_per_task=str(self.cpus_per_task), datatrove_mem_per_cpu=str(self.mem_per_cpu_gb),
            datatrove_executor="SLURM")

    def launch_merge_stats(self) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class FinishRun:
    """The one block of the last job."""

    plan_file: Path
    output: Path
    logs: Path

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        """Finish the run."""
        with keeping_failure(self.logs, rank):
            refuse_many_restarts("finish", "leave `pack` out and pack by `sov-data pack` in parts")
            finish(Plan.read(self.plan_file), self.output, len(os.sched_getaffinity(0)))


@dataclass(frozen=True)
class ReadInputs:
    """The one block of the array that reads raw files before there is a plan."""

    output: Path
    logs: Path

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        """Read one batch of files."""
        with keeping_failure(self.logs, rank), disk_errors(self.output):
            refuse_many_restarts("inputs", "cut raw files that are larger than 100 GB")
            read_batch(batch_of(self.logs / BATCHES, rank), self.output)


@dataclass(frozen=True)
class SubmitRest:
    """The one block of the job behind that array: does what the command would do now."""

    pipeline: Pipeline
    output: Path
    logs: Path
    profile: ClusterProfile

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        """Submit the run."""
        with keeping_failure(self.logs, rank), only_one(self.output):
            plan = make_plan(self.pipeline, self.output)
            if not is_complete(plan, self.output):
                _submit_run(plan, self.output, self.profile)


def refuse_unquotable(output: Path) -> None:
    """Raise `UserError` where a run's folder cannot stand in the executor's scripts."""
    if found := _NOT_IN_SCRIPTS.search(str(output)):
        raise UserError(f"--output {output}: {found[0]!r} cannot stand in the scripts of Slurm's jobs; "
                        "choose a folder without blanks and signs of the shell")


def refuse_enroot(profile: ClusterProfile) -> None:
    """Raise `UserError` where a profile's container is one that jobs of `sov-data` cannot start."""
    if profile.container.kind == "enroot":
        raise UserError("container.kind = enroot: is not known to `sov-data`; take pyxis, apptainer or none")


def submit_pipeline(pipeline: Pipeline, output: Path, name: str, *, account: str | None,
                    partition: str | None) -> None:
    """Submit what is not done, or tell how far jobs are that work on it.

    Args:
        pipeline: the file.
        output: the run's folder, which all nodes see.
        name: cluster profile.
        account: Slurm account; None: the profile's.
        partition: partition; None: the profile's.

    Raises:
        UserError: the profile is wrong, a path cannot stand in a script, Slurm refuses, or jobs of another
            plan are at work.
    """
    output = output.absolute()
    refuse_unquotable(output)
    profile = cluster.load(name, account=account, partition=partition)
    (output / "inputs").mkdir(parents=True, exist_ok=True)
    with only_one(output):
        before = Jobs.read(output)
        living = before.living()
        if living and before.address == READING:
            print(f"{output}: Slurm's jobs {', '.join(living)} read the raw files; the last of them submits "
                  "the steps")
            return
        unknown = unknown_inputs(pipeline, output)
        plan = None if is_much(unknown) else make_plan(pipeline, output)
        if plan is not None and is_complete(plan, output):
            print(f"{output}: complete from before")
            return
        if living and (plan is None or before.address != plan.address):
            raise UserError(f"{output}: jobs {', '.join(living)} of another plan are at work in this folder; "
                            "wait for them, or `scancel` them, and run the command again")
        if plan is None:
            _submit_reading(pipeline, output, profile, unknown)
            return
        if living:
            print("\n".join([f"{output}: at work in Slurm's jobs {', '.join(living)}",
                             *_progress(plan, output)]))
            return
        for sentence in plan.told():
            print(sentence)
        _tell_failures([*READING_STAGES, *(stage.name for stage in stages(plan)), "finish"], output)
        _submit_run(plan, output, profile)


def _submit_reading(pipeline: Pipeline, output: Path, profile: ClusterProfile,
                    unknown: dict[str, dict[Path, int]]) -> None:
    """Submit the jobs that read raw files, and the one behind them that submits the run."""
    _tell_failures(READING_STAGES, output)
    client.check_partition(profile.partition)
    found = list(batches(unknown))
    reading, rest = (output / "logs" / name for name in READING_STAGES)
    for logs in (reading, rest):
        prepare(logs, [], 0)
    write_batches(reading / BATCHES, found)
    jobs = Jobs(READING, {})
    with cancelled_where_one_fails(jobs), outside_jobs():
        after = submit_array(ReadInputs(output, reading), len(found), reading, profile, None, 1)
        jobs.numbers[reading.name] = after
        jobs.write(output)
        block = SubmitRest(pipeline, output, rest, profile)
        jobs.numbers[rest.name] = submit_array(block, 1, rest, profile, after, 1)
        jobs.write(output)
    print(f"{output}: the contents of {told(unknown)} are not known yet; submitted 2 jobs: "
          f"{jobs.numbers[reading.name]} reads them, {jobs.numbers[rest.name]} then submits the steps; the "
          "same command tells how far they are")


def _submit_run(plan: Plan, output: Path, profile: ClusterProfile) -> None:
    """Submit the tasks of a plan that are not done, and the job that finishes the run."""
    file = begin(plan, output)
    client.check_partition(profile.partition)
    jobs = _submit_all(plan, file, output, profile)
    named = ", ".join(f"{what} {number}" for what, number in jobs.numbers.items())
    print("\n".join([*_progress(plan, output), f"{output}: submitted {len(jobs.numbers)} jobs: {named}; "
                     "the same command tells how far they are"]))


@contextlib.contextmanager
def cancelled_where_one_fails(jobs: Jobs) -> Iterator[None]:
    """Cancel what has been submitted where the rest cannot be."""
    try:
        yield
    except BaseException:
        client.cancel(list(jobs.numbers.values()))
        raise


def _submit_all(plan: Plan, file: Path, output: Path, profile: ClusterProfile) -> Jobs:
    jobs, after = Jobs(plan.address, {}), None
    with cancelled_where_one_fails(jobs), outside_jobs():
        for stage in stages(plan):
            if todo := open_tasks(plan, stage, output):
                logs = output / "logs" / stage.name
                prepare(logs, todo, len(todo))
                block = TaskList(file, output, logs, stage)
                after = submit_array(block, len(todo), logs, profile, after, 1)
                jobs.numbers[stage.name] = after
                jobs.write(output)
        logs = output / "logs" / "finish"
        prepare(logs, [], 0)
        jobs.numbers["finish"] = submit_array(FinishRun(file, output, logs), 1, logs, profile, after,
                                         min(profile.cpus_per_node, FINISH_CPUS))
        jobs.write(output)
    return jobs


def submit_array(block: Callable[..., None], num_tasks: int, logs: Path, profile: ClusterProfile,
            after: str | None, cpus: int, gpus: int = 0) -> str:
    """Submit one array; returns its number.

    Args:
        block: what each task calls, with its number as `rank`.
        num_tasks: tasks of the array.
        logs: folder of its logs, with its name.
        profile: of the cluster.
        after: number of an array that has to end well before; None: of none.
        cpus: cores of a task.
        gpus: of a task.

    Raises:
        UserError: Slurm refuses it.
    """
    most = _max_array_size()
    per_job = math.ceil(num_tasks / most)
    memory = profile.memory_bytes // profile.cpus_per_node >> 20
    executor = SlurmArray(
        [block], tasks=num_tasks, time=profile.time_limit, partition=profile.partition, cpus_per_task=cpus,
        job_name=logs.name, qos=profile.qos, logging_dir=str(logs), skip_completed=False,
        env_command="\n".join(_environment(profile, logs)), tasks_per_job=per_job, max_array_size=-1,
        depends_job_id=after, job_id_retriever=_job_number, randomize_start_duration=0,
        srun_args={"cpus-per-task": str(cpus)} | _srun_options(profile),  # srun does not inherit it
        sbatch_args={"account": profile.account, "constraint": profile.constraint,
                     "mem-per-cpu": f"{memory}M" if memory else "",
                     "gres": f"gpu:{gpus}" if gpus else "", "kill-on-invalid-dep": "yes",
                     "signal": f"USR1@{profile.signal_lead_s}"})
    client.check_script(executor.get_launch_file_contents(executor.get_sbatch_args(1), "true"))
    try:
        executor.launch_job()
    except subprocess.CalledProcessError as e:
        raise UserError(f"Slurm refuses the job of {logs.name} (sbatch ended with {e.returncode}, its words "
                        "stand above); change the profile") from None
    return str(executor.job_id)


def _max_array_size() -> int:
    """Return how many jobs an array may have here."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", client.ask("scontrol", "show", "config").stdout)
    return max(1, int(found[1]) - 1 if found else DEFAULT_MAX_ARRAY - 1)


def _job_number(printed: str) -> str:
    found = re.search(r"job (\d+)", printed)
    if found is None:
        raise UserError(f"sbatch printed {printed.strip()[:200]!r} and no number of a job; is it Slurm's "
                        "own?")
    return found[1]


def _environment(profile: ClusterProfile, logs: Path) -> Iterator[str]:
    """Yield the shell lines that make a job's environment; writes the program that it calls."""
    program = logs / "bin" / PROGRAM
    program.parent.mkdir(exist_ok=True)
    python = " ".join(_python(profile))
    program.write_text(f'#!/bin/bash\nexec {python} -m datatrove.tools.{PROGRAM} "$@"\n')
    program.chmod(0o755)
    yield from profile.setup
    if profile.modules:
        yield f"module load {shlex.join(profile.modules)}"
    if profile.scratch:
        yield f"export TMPDIR={shlex.quote(profile.scratch)}; mkdir -p \"$TMPDIR\""
    for name, value in profile.environment.items():
        yield f"export {name}={shlex.quote(value)}"
    code = Path(data_prep.__file__).parents[1]
    yield f"export PYTHONPATH={shlex.quote(str(code))} OMP_NUM_THREADS=1"


def _python(profile: ClusterProfile) -> Iterator[str]:
    refuse_enroot(profile)
    box, python = profile.container, profile.python_program
    if box.kind == "apptainer":
        yield from ("apptainer", "exec", *(f"--bind={shlex.quote(m)}" for m in box.mounts),
                    shlex.quote(box.image))
    yield from (shlex.quote(python), "-P")


def _srun_options(profile: ClusterProfile) -> dict[str, str]:
    box = profile.container
    if box.kind != "pyxis":
        return {}
    return {"container-image": shlex.quote(box.image),
            **({"container-mounts": shlex.quote(",".join(box.mounts))} if box.mounts else {})}


@contextlib.contextmanager
def outside_jobs() -> Iterator[None]:
    """Let what this process starts know of no job that it runs in itself."""
    kept, outside = dict(os.environ), environment_outside_jobs()
    os.environ.clear()
    os.environ.update(outside)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def _progress(plan: Plan, output: Path) -> Iterator[str]:
    for stage in stages(plan):
        total, left = len(tasks(plan, stage)), len(open_tasks(plan, stage, output))
        what = "tasks" if stage.index >= 0 else "shards"
        yield f"  {stage.name}: {total - left:,} of {total:,} {what} done"


def _tell_failures(names: Sequence[str], output: Path) -> None:
    """Print what has stopped the jobs of an earlier command.

    Args:
        names: of the arrays, in order.
        output: the run's folder.
    """
    for name in names:
        try:
            raise_failures(output / "logs" / name)
        except (UserError, TaskFailed) as e:
            print(f"the jobs before were stopped by: {str(e).strip()}")
            return
