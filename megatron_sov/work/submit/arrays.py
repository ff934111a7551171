"""Arrays of Slurm jobs that call work of ours: how they are submitted, and the records of those that fail.

Work is an object that is called with the number of a task.  It is pickled beside the logs of its array, and
read by `array_job` in each of its jobs; nobody else should be able to write into the output folder.
"""

from __future__ import annotations

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

from megatron_sov.base.artifacts import disk_errors
from megatron_sov.base.errors import UserError
from megatron_sov.base.sealed import read_json, try_read_json, write_json
from megatron_sov.work.clusters import client, cluster
from megatron_sov.work.clusters.cluster import ClusterProfile
from megatron_sov.work.progress.journal import slurm_folder
from megatron_sov.work.progress.locks import holding
from megatron_sov.work.submit.cluster_options import ClusterOptions

JOBS = "slurm/jobs.json"
WORK, FAILED, SCRIPT = "work.pickle", "failed", "job.sbatch"
FINISH = "finish"
"""The last job of a command."""
FINISH_CPUS = 16
"""Cores of a last job, which finishes what an array has done."""
MAX_RESTARTS = 20
"""How often Slurm may requeue a job of an array before its time limit counts as too short."""
DEFAULT_MAX_ARRAY = 1001
_NOT_IN_SCRIPTS = re.compile(r"""[\s%\\"'$`;&|<>()*?\[\]{}!#~]""")
"""What Slurm's names of logs, or the lines of a script for it, take for something else."""


def profile_of(options: ClusterOptions) -> ClusterProfile:
    """Return the profile that a command submits to.

    Raises:
        UserError: it cannot be read or breaks a rule, or arrays cannot start its container.
    """
    profile = cluster.load(options.cluster, account=options.account, partition=options.partition)
    if profile.container.kind == "enroot":
        raise UserError("container.kind = enroot: is not known to arrays of jobs; take pyxis, apptainer or "
                        "none")
    return profile


@dataclass(frozen=True)
class Jobs:
    """The jobs that the last command has submitted for a run's folder."""

    address: str
    """Address of the plan that they work on."""
    numbers: dict[str, str]
    """Stage -> number of its array."""

    @staticmethod
    def read(output: Path) -> Jobs:
        found = try_read_json(output / JOBS) or {}
        return Jobs(found.get("address", ""), found.get("numbers", {}))

    def write(self, output: Path) -> None:
        (output / JOBS).parent.mkdir(parents=True, exist_ok=True)
        write_json(output / JOBS, asdict(self))

    def living(self) -> list[str]:
        return sorted(client.states(list(self.numbers.values())))

    def describe(self, living: Sequence[str]) -> str:
        return "Slurm's jobs " + ", ".join(living)


def refuse_living(output: Path) -> None:
    """Raise `UserError` where jobs work in a run's folder, as far as can be known here."""
    jobs = Jobs.read(output)
    try:
        # on a machine without the cluster's programs nothing can be known, and nothing is refused
        living = jobs.living()
    except UserError:  # no such cluster here
        return
    if living:
        raise UserError(f"{output}: {jobs.describe(living)} work in this folder; pass --cluster to see how "
                        f"far they are, or `scancel` them")


Work = Callable[[int], object]
"""What the tasks of an array do: is called with the number of each."""


class TaskFailed(Exception):
    """A defect in a task; what is told has its trace."""


def refuse_unquotable(output: Path) -> None:
    """Raise `UserError` where a run's folder cannot stand in the scripts of jobs."""
    if found := _NOT_IN_SCRIPTS.search(str(output)):
        raise UserError(f"--output {output}: {found[0]!r} cannot stand in the scripts of a cluster's jobs; "
                        "choose a folder without blanks and signs of the shell")


def refuse_many_restarts(what: str, way: str) -> None:
    """Raise `UserError` where Slurm has put a job back so often that it will never be done."""
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) > MAX_RESTARTS:
        raise UserError(f"{what}: this job has been requeued {MAX_RESTARTS} times and is not done; give it a "
                        f"longer time limit, or {way}")


@contextlib.contextmanager
def keeping_failure(logs: Path, task: int) -> Iterator[None]:
    """Keep beside the logs what a task fails of, for the command that asks later; a disk that takes no note
    is no reason to fail of anything else."""
    try:
        yield
    except Exception as e:
        failed = logs / FAILED / f"{task:05d}.json"
        with contextlib.suppress(OSError, UserError):
            failed.parent.mkdir(exist_ok=True)
            write_json(failed, {"is_user_error": isinstance(e, UserError), "sentence": str(e),
                                "trace": "".join(traceback.format_exception(e))})
        raise


def tell_failures(folder: Path, names: Sequence[str]) -> None:
    """Print what has stopped the jobs of an earlier command.

    Args:
        folder: of the run.
        names: of its arrays, in order; the first that has failed is told.
    """
    for logs in (folder / "logs" / name for name in names):
        found = [read_json(file) for file in sorted((logs / FAILED).glob("*.json"))]
        if found:
            first = next((one for one in found if not one["is_user_error"]), found[0])
            more = f" (and {len(found) - 1} other tasks: {logs / FAILED})" if len(found) > 1 else ""
            said = first["sentence"] if first["is_user_error"] else first["trace"]
            print(f"the jobs before were stopped by: {said.strip()}{more}")
            return


class Arrays:
    """The jobs of one command, submitted in a `with` block: each array waits for the one before to end well,
    all are on record, and what has been submitted is cancelled where the rest cannot be."""

    def __init__(self, folder: Path, address: str, profile: ClusterProfile) -> None:
        """Submit nothing yet.

        Args:
            folder: of the run; logs lie in `logs/NAME`.
            address: of what the jobs work on, see `Jobs`.
            profile: of the cluster.
        """
        self._folder, self._profile = folder, profile
        self.jobs = Jobs(address, {})
        self._before: _Array | None = None

    def __enter__(self) -> Self:
        """Look whether the cluster would take jobs.

        Raises:
            UserError: it would not.
        """
        client.check_partition(self._profile.partition)
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure is not None:
            client.cancel(list(self.jobs.numbers.values()))

    def note(self, name: str, number: str) -> None:
        """Put a job on record that no array waits for."""
        # on record at once: a kill after this leaves jobs that the next command knows of
        self.jobs.numbers[name] = number
        self.jobs.write(self._folder)

    def submit(self, name: str, work: Work, num_tasks: int = 1, *, cpus: int = 1, gpus: int = 0) -> str:
        """Submit one array; returns its number.  What an earlier one has left in its logs goes.

        Args:
            name: of the array, and of the folder of its logs.
            work: what its tasks do.
            num_tasks: of the array.
            cpus: cores of a job.
            gpus: of a job.

        Raises:
            UserError: the cluster refuses it.
        """
        profile, logs = self._profile, self._folder / "logs" / name
        # more tasks than the cluster takes jobs: each job does several, one after the other
        tasks_per_job = math.ceil(num_tasks / _max_array_size())
        array = _Array(logs, math.ceil(num_tasks / tasks_per_job), tasks_per_job, cpus, gpus, self._before)
        # failures of an earlier array would stop this one
        shutil.rmtree(logs, ignore_errors=True)
        with disk_errors(logs):
            (logs / "slurm_logs").mkdir(parents=True)
            (logs / WORK).write_bytes(pickle.dumps((work, num_tasks)))
        array.number = array.submit(profile)
        self.note(name, array.number)
        self._before = array
        return array.number

    def describe(self) -> str:
        return ", ".join(f"{name} {number}" for name, number in self.jobs.numbers.items())


@dataclass
class _Array:
    """An array that is to be submitted."""

    logs: Path
    num_jobs: int
    tasks_per_job: int
    cpus: int
    gpus: int
    before: _Array | None
    """What it waits for."""
    number: str = ""

    def submit(self, profile: ClusterProfile) -> str:
        # a job's share of a node by its cores, in MiB
        memory = profile.memory_bytes // profile.cpus_per_node >> 20
        options = {
            "job-name": self.logs.name, "array": f"0-{self.num_jobs - 1}", "nodes": "1",
            "cpus-per-task": str(self.cpus), "mem-per-cpu": f"{memory}M" if memory else "",
            "gres": f"gpu:{self.gpus}" if self.gpus else "", "partition": profile.partition,
            "time": profile.time_limit, "account": profile.account, "qos": profile.qos,
            "constraint": profile.constraint, "output": f"{self.logs}/slurm_logs/%A_%a.out",
            "signal": f"B:USR1@{profile.signal_lead_s}"}
        script = self.logs / SCRIPT
        with disk_errors(self.logs):
            script.write_text("\n".join([
                "#!/bin/bash", *(f"#SBATCH --{name}={value}" for name, value in options.items() if value),
                "#SBATCH --requeue", *_environment(profile),
                *_call(profile, self.logs, self.cpus, self.tasks_per_job)]))
        client.check_script(script.read_text())
        return client.submit(script, after=[self.before.number] if self.before else [])


@dataclass(frozen=True)
class SharedWork:
    """What an array does in shares, and a last job finishes."""

    name: str
    address: str
    """Of what the jobs work on, see `Jobs`."""
    num_items: int
    """That are shared out."""
    unit: str
    """What an item is, in the plural."""
    num_done: Callable[[], int]
    begin: Callable[[], object]
    """Makes the folder of the work."""
    share: Callable[[int], Work]
    """Returns the work of an array of so many tasks."""
    finish: Work
    cpus: int = 1
    """Of a job of the array."""
    gpus: int = 0
    finish_cpus: int = 1
    """Of the last job."""


def submit_shares(output: Path, shared: SharedWork, profile: ClusterProfile,
                  most_tasks: int) -> None:
    """Submit what is not done, or tell how far jobs are that work on it.

    Raises:
        UserError: the output, the work or the cluster are in the way.
    """
    refuse_unquotable(output)
    slurm = slurm_folder(output)
    with holding(slurm, output), disk_errors(slurm):
        jobs = Jobs.read(slurm)
        if living := jobs.living():
            print(f"{output}: {jobs.describe(living)} are at work; {shared.num_done():,} of "
                  f"{shared.num_items:,} {shared.unit} are done")
            return
        shared.begin()
        tell_failures(slurm, (shared.name, FINISH))
        # no task without an item
        num_tasks = min(most_tasks, shared.num_items - shared.num_done())
        with Arrays(slurm, shared.address, profile) as arrays:
            if num_tasks:
                arrays.submit(shared.name, shared.share(num_tasks), num_tasks, cpus=shared.cpus,
                              gpus=shared.gpus)
            arrays.submit(FINISH, shared.finish, cpus=shared.finish_cpus)
    print(f"{output}: submitted {arrays.describe()}; the same command tells how far they are")


def _max_array_size() -> int:
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", client.ask("scontrol", "show", "config").stdout)
    return max(1, int(found[1]) - 1 if found else DEFAULT_MAX_ARRAY - 1)


def _environment(profile: ClusterProfile) -> Iterator[str]:
    yield from profile.setup
    if profile.modules:
        yield f"module load {shlex.join(profile.modules)}"
    if profile.scratch:
        yield f"export TMPDIR={shlex.quote(profile.scratch)}; mkdir -p \"$TMPDIR\""
    for name, value in profile.environment.items():
        yield f"export {name}={shlex.quote(value)}"
    code = Path(__file__).parents[3]
    yield f"export PYTHONPATH={shlex.quote(str(code))} OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1"


def _call(profile: ClusterProfile, logs: Path, cpus: int, tasks_per_job: int) -> Iterator[str]:
    """Yield the shell lines that start a job's step and wait for its end; the job goes back to the queue
    before its time limit, by the shell, for a container may lack `scontrol`."""
    box = profile.container
    # srun does not inherit the cores of its job
    words = ["srun", "--ntasks=1", f"--cpus-per-task={cpus}", "--label"]
    if box.kind == "pyxis":
        words.append(f"--container-image={box.image}")
        if box.mounts:
            words.append(f"--container-mounts={','.join(box.mounts)}")
    if box.kind == "apptainer":
        words += ["apptainer", "exec", *(f"--bind={mount}" for mount in box.mounts), box.image]
    words += [profile.python_program, "-P", "-m", "megatron_sov.work.submit.array_job", str(logs),
              str(tasks_per_job)]
    yield f"trap 'scontrol requeue {client.THIS_JOB}' USR1"
    yield f"{shlex.join(words)} &"
    yield "until wait $!; code=$?; ! kill -0 $! 2>/dev/null; do :; done  # a signal ends `wait`, not the step"
    yield "exit $code\n"
