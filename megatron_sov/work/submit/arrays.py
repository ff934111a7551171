"""Slurm arrays: submit work, chain arrays, and report failed tasks.

Work is a picklable callable that takes a task number. It is pickled next to the array's logs and loaded by
`array_job`: only trusted users should have write access to the output folder.
"""

import contextlib
import math
import os
import pickle
import re
import shlex
import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from megatron_sov.base.artifacts import translate_disk_errors
from megatron_sov.base.errors import UserError
from megatron_sov.base.sealed import read_sealed_json, try_read_sealed_json, write_sealed_json
from megatron_sov.work.clusters import client, cluster
from megatron_sov.work.clusters.cluster import ClusterProfile
from megatron_sov.work.progress.journal import slurm_folder
from megatron_sov.work.progress.locks import lock_folder
from megatron_sov.work.submit.cluster_options import ClusterOptions

JOBS_FILE = "slurm/jobs.json"
WORK_FILE, FAILED_FOLDER, SCRIPT_FILE = "work.pickle", "failed", "job.sbatch"
FINISH = "finish"
"""Name of a command's last array."""
FINISH_CPUS = 16
"""Cores of the final job, which builds the output."""
MAX_RESTARTS = 20
"""Maximum requeues; beyond, the job's time limit counts as too short."""
DEFAULT_MAX_ARRAY = 1001
_NOT_IN_SCRIPTS = re.compile(r"""[\s%\\"'$`;&|<>()*?\[\]{}!#~]""")
"""Characters with special meaning in Slurm's log names or in scripts."""
Work = Callable[[int], object]
"""Work of an array: called with each task number."""


def load_array_profile(options: ClusterOptions) -> ClusterProfile:
    """Load the `ClusterProfile` for a command's jobs. Raises `UserError`: the profile is invalid, or arrays
    do not support its container."""
    profile = cluster.load_profile(options.cluster, account=options.account, partition=options.partition)
    if profile.container.kind == "enroot":
        raise UserError("container.kind = enroot: is not supported for job arrays; use pyxis, apptainer or "
                        "none")
    return profile


@dataclass(frozen=True)
class Jobs:
    """Jobs of the last submission for a run folder, stored in `slurm/jobs.json`."""

    address: str
    """Identifier of the plan that the jobs work on."""
    numbers: dict[str, str]
    """Stage -> Slurm array number."""

    @staticmethod
    def read(output: Path) -> "Jobs":
        content = try_read_sealed_json(output / JOBS_FILE) or {}
        return Jobs(content.get("address", ""), content.get("numbers", {}))

    def write(self, output: Path) -> None:
        (output / JOBS_FILE).parent.mkdir(parents=True, exist_ok=True)
        write_sealed_json(output / JOBS_FILE, asdict(self))

    def list_active(self) -> list[str]:
        return sorted(client.read_active_states(list(self.numbers.values())))

    def describe(self, living: Sequence[str]) -> str:
        return "Slurm's jobs " + ", ".join(living)


def check_no_active_jobs(output: Path) -> None:
    """Check a run folder for running Slurm jobs (`slurm/jobs.json`, `squeue`); raises `UserError`."""
    jobs = Jobs.read(output)
    try:
        # without Slurm's programs on this machine, allow the command
        living = jobs.list_active()
    except UserError:  # no Slurm here
        return
    if living:
        raise UserError(f"{output}: {jobs.describe(living)} work in this folder; pass --cluster to see how "
                        f"far they are, or `scancel` them")


class TaskFailed(Exception):
    """A programming error in a task; the message contains its traceback."""


def check_quotable(output: Path) -> None:
    """Check a run folder's path for characters outside shell and Slurm syntax; raises `UserError`."""
    if match := _NOT_IN_SCRIPTS.search(str(output)):
        raise UserError(f"--output {output}: {match[0]!r} cannot appear in the scripts of Slurm jobs; "
                        "choose a folder without blanks and shell characters")


def check_restarts(subject: str, hint: str) -> None:
    """Check SLURM_RESTART_COUNT against `MAX_RESTARTS`; raises `UserError`."""
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) > MAX_RESTARTS:
        raise UserError(f"{subject}: this job has been requeued {MAX_RESTARTS} times and is not done; "
                        f"give it a longer time limit, or {hint}")


@contextlib.contextmanager
def record_failure(logs: Path, task: int) -> Iterator[None]:
    """Write a task's exception to `LOGS/failed` for a later command; ignore disk errors while doing so."""
    try:
        yield
    except Exception as e:
        failed = logs / FAILED_FOLDER / f"{task:05d}.json"
        with contextlib.suppress(OSError, UserError):
            failed.parent.mkdir(exist_ok=True)
            write_sealed_json(failed, {"is_user_error": isinstance(e, UserError), "sentence": str(e),
                                "trace": "".join(traceback.format_exception(e))})
        raise


def print_failures(folder: Path, names: Sequence[str]) -> None:
    """Print the failure that stopped the jobs of an earlier command.

    Args:
        folder: the run folder.
        names: array names in order; report the first failed array.
    """
    for logs in (folder / "logs" / name for name in names):
        failures = [read_sealed_json(file) for file in sorted((logs / FAILED_FOLDER).glob("*.json"))]
        if failures:
            defects = [failure for failure in failures if not failure["is_user_error"]]
            failure = (defects or failures)[0]
            more = ""
            if len(failures) > 1:
                more = f" (and {len(failures) - 1} other tasks: {logs / FAILED_FOLDER})"
            text = failure["sentence"] if failure["is_user_error"] else failure["trace"]
            print(f"the jobs before were stopped by: {text.strip()}{more}")
            return


class Arrays:
    """Submits a command's arrays in a `with` block, each array waiting for success of the previous.

    All are recorded in `slurm/jobs.json`; if a submission fails, earlier arrays are cancelled.
    """

    def __init__(self, folder: Path, address: str, profile: ClusterProfile) -> None:
        """Args:
            folder: the run folder; logs go to `logs/NAME`.
            address: identifier of the plan, see `Jobs`.
            profile: the cluster's profile.
        """
        self._folder, self._profile = folder, profile
        self.jobs = Jobs(address, {})
        self._before: _Array | None = None

    def __enter__(self) -> Self:
        """Check that the cluster accepts jobs. Raises `UserError`: the partition does not exist."""
        client.check_partition(self._profile.partition)
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure is not None:
            client.cancel_jobs(list(self.jobs.numbers.values()))

    def note(self, name: str, number: str) -> None:
        """Record a job that no later array waits for."""
        # immediately: if the command is killed, the next command knows the job
        self.jobs.numbers[name] = number
        self.jobs.write(self._folder)

    def submit(self, name: str, work: Work, num_tasks: int = 1, *, cpus: int = 1, gpus: int = 0) -> str:
        """Submit an array and return its number; old logs of the same name are deleted.

        Args:
            name: name of the array and its log folder.
            work: function for the tasks.
            num_tasks: number of tasks.
            cpus: cores per job.
            gpus: GPUs per job.

        Raises:
            UserError: Slurm refuses the script.
        """
        profile, logs = self._profile, self._folder / "logs" / name
        # beyond MaxArraySize, jobs run several tasks
        tasks_per_job = math.ceil(num_tasks / _max_array_size())
        array = _Array(logs, math.ceil(num_tasks / tasks_per_job), tasks_per_job, cpus, gpus, self._before)
        # old failure files would be reported as this array's
        shutil.rmtree(logs, ignore_errors=True)
        with translate_disk_errors(logs):
            (logs / "slurm_logs").mkdir(parents=True)
            (logs / WORK_FILE).write_bytes(pickle.dumps((work, num_tasks)))
        array.number = array.submit(profile)
        self.note(name, array.number)
        self._before = array
        return array.number

    def describe(self) -> str:
        return ", ".join(f"{name} {number}" for name, number in self.jobs.numbers.items())


@dataclass
class _Array:
    logs: Path
    num_jobs: int
    tasks_per_job: int
    cpus: int
    gpus: int
    before: "_Array | None"
    number: str = ""

    def submit(self, profile: ClusterProfile) -> str:
        """Write the job script of the array, submit it to Slurm, and return the job number."""
        # a job's share of a node's memory by cores, in MiB
        memory = profile.memory_bytes // profile.cpus_per_node >> 20
        options = {
            "job-name": self.logs.name, "array": f"0-{self.num_jobs - 1}", "nodes": "1",
            "cpus-per-task": str(self.cpus), "mem-per-cpu": f"{memory}M" if memory else "",
            "gres": f"gpu:{self.gpus}" if self.gpus else "", "partition": profile.partition,
            "time": profile.time_limit, "account": profile.account, "qos": profile.qos,
            "constraint": profile.constraint, "output": f"{self.logs}/slurm_logs/%A_%a.out",
            "signal": f"B:USR1@{profile.signal_lead_s}"}
        script = self.logs / SCRIPT_FILE
        with translate_disk_errors(self.logs):
            script.write_text("\n".join([
                "#!/bin/bash", *(f"#SBATCH --{name}={value}" for name, value in options.items() if value),
                "#SBATCH --requeue", *_environment_lines(profile),
                *_step_lines(profile, self.logs, self.cpus, self.tasks_per_job)]))
        client.check_script(script.read_text())
        return client.submit_script(script, after=[self.before.number] if self.before else [])


@dataclass(frozen=True)
class SharedWork:
    """Work for an array of jobs, with a final job."""

    name: str
    address: str
    """Identifier of the plan, see `Jobs`."""
    num_items: int
    """Number of items to distribute."""
    unit: str
    """Noun for items, plural."""
    num_done: Callable[[], int]
    begin: Callable[[], object]
    """Creates the work folder."""
    share: Callable[[int], Work]
    """Returns the work for an array with N tasks."""
    finish: Work
    cpus: int = 1
    """Cores per job of the array."""
    gpus: int = 0
    finish_cpus: int = 1


def submit_shares(output: Path, shared: SharedWork, profile: ClusterProfile, most_tasks: int) -> None:
    """Submit unfinished items as an array, or report the progress of running jobs. Raises `UserError`:
    problems with the output, the work or the cluster."""
    check_quotable(output)
    slurm = slurm_folder(output)
    with lock_folder(slurm, output), translate_disk_errors(slurm):
        jobs = Jobs.read(slurm)
        if living := jobs.list_active():
            print(f"{output}: {jobs.describe(living)} are at work; {shared.num_done():,} of "
                  f"{shared.num_items:,} {shared.unit} are done")
            return
        shared.begin()
        print_failures(slurm, (shared.name, FINISH))
        # at most one task per item
        num_tasks = min(most_tasks, shared.num_items - shared.num_done())
        with Arrays(slurm, shared.address, profile) as arrays:
            if num_tasks:
                arrays.submit(shared.name, shared.share(num_tasks), num_tasks, cpus=shared.cpus,
                              gpus=shared.gpus)
            arrays.submit(FINISH, shared.finish, cpus=shared.finish_cpus)
    print(f"{output}: submitted {arrays.describe()}; the same command tells how far they are")


def _max_array_size() -> int:
    output = client.run_slurm_program("scontrol", "show", "config").stdout
    match = re.search(r"MaxArraySize\s*=\s*(\d+)", output)
    return max(1, int(match[1]) - 1 if match else DEFAULT_MAX_ARRAY - 1)


def _environment_lines(profile: ClusterProfile) -> Iterator[str]:
    yield from profile.setup
    if profile.modules:
        yield f"module load {shlex.join(profile.modules)}"
    if profile.scratch:
        yield f"export TMPDIR={shlex.quote(profile.scratch)}; mkdir -p \"$TMPDIR\""
    for name, value in profile.environment.items():
        yield f"export {name}={shlex.quote(value)}"
    code = Path(__file__).parents[3]
    yield f"export PYTHONPATH={shlex.quote(str(code))} OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1"


def _step_lines(profile: ClusterProfile, logs: Path, cpus: int, tasks_per_job: int) -> Iterator[str]:
    """Yield shell lines: start the step with `srun`, and requeue the job before the time limit.

    The shell requeues, because a container may lack `scontrol`.
    """
    container = profile.container
    # srun does not inherit the job's core count
    words = ["srun", "--ntasks=1", f"--cpus-per-task={cpus}", "--label"]
    if container.kind == "pyxis":
        words.append(f"--container-image={container.image}")
        if container.mounts:
            words.append(f"--container-mounts={','.join(container.mounts)}")
    if container.kind == "apptainer":
        words += ["apptainer", "exec", *(f"--bind={mount}" for mount in container.mounts), container.image]
    words += [profile.python_program, "-P", "-m", "megatron_sov.work.submit.array_job", str(logs),
              str(tasks_per_job)]
    yield f"trap 'scontrol requeue {client.THIS_JOB}' USR1"
    yield f"{shlex.join(words)} &"
    yield "until wait $!; code=$?; ! kill -0 $! 2>/dev/null; do :; done  # a signal ends `wait`, not the step"
    yield "exit $code\n"
