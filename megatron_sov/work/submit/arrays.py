"""Arrays of a cluster's jobs that call work of ours: what they are, how they are submitted to Slurm or to
Kubernetes, and what is kept of those that fail.

Work is an object that is called with the number of a task.  It is pickled beside the logs of its array, and
read by `array_job` in each of its jobs; nobody else should be able to write into the output folder.

Slurm itself has a job wait for the one before.  Kubernetes knows no such thing: there all Jobs are made at
once, and a pod that finds the array before unfinished gives its place back (exit code 75) until it is not.
"""

from __future__ import annotations

import contextlib
import json
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
from typing import Any, Self

from megatron_sov.base.artifacts import disk_errors
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.base.sealed import read_json, try_read_json, write_json
from megatron_sov.work.clusters import client, cluster, kubernetes
from megatron_sov.work.clusters.cluster import ClusterProfile
from megatron_sov.work.clusters.kubernetes import KubernetesProfile, literal, pod_of, variables_of
from megatron_sov.work.progress.journal import slurm_folder
from megatron_sov.work.progress.locks import holding
from megatron_sov.work.submit.cluster_options import ClusterOptions

JOBS = "slurm/jobs.json"
WORK, FAILED, DONE, SCRIPT, MANIFEST = "work.pickle", "failed", "done", "job.sbatch", "job.json"
CONTAINER = "task"
MANAGED = {"app.kubernetes.io/managed-by": "megatron-sov"}
"""Label of all Jobs."""
MAX_PODS = 10_000
"""Of a Job; Kubernetes keeps a record of each in one object."""
MAX_KILLS = 3
"""How often a pod that was killed without a word is started again."""
FINISH = "finish"
"""The last job of a command."""
FINISH_CPUS = 16
"""Cores of a last job, which finishes what an array has done."""
MAX_RESTARTS = 20
"""How often Slurm may requeue a job of an array before its time limit counts as too short."""
DEFAULT_MAX_ARRAY = 1001
_NOT_IN_SCRIPTS = re.compile(r"""[\s%\\"'$`;&|<>()*?\[\]{}!#~]""")
"""What Slurm's names of logs, or the lines of a script for it, take for something else."""


def profile_of(options: ClusterOptions) -> ClusterProfile | KubernetesProfile:
    """Return the profile that a command submits to.

    Raises:
        UserError: it cannot be read or breaks a rule, arrays cannot start its container, or an option beside
            it is Slurm's and it is not.
    """
    name = options.cluster
    if kubernetes.is_kubernetes(name):
        for option, value in (("--account", options.account), ("--partition", options.partition)):
            if value is not None:
                raise UserError(f"{option} {value}: belongs to Slurm; leave it out where --cluster names a "
                                "profile of kind k8s")
        return kubernetes.load(name)
    profile = cluster.load(name, account=options.account, partition=options.partition)
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
    """Stage -> number of its array; on Kubernetes its name."""
    namespace: str = ""
    """Of Kubernetes; empty: they are Slurm's."""

    @staticmethod
    def read(output: Path) -> Jobs:
        return Jobs(**(try_read_json(output / JOBS) or {"address": "", "numbers": {}}))

    def write(self, output: Path) -> None:
        (output / JOBS).parent.mkdir(parents=True, exist_ok=True)
        write_json(output / JOBS, asdict(self))

    def living(self) -> list[str]:
        numbers = list(self.numbers.values())
        return sorted(kubernetes.living_jobs(self.namespace, numbers) if self.namespace
                      else client.states(numbers))

    def describe(self, living: Sequence[str]) -> str:
        return ("Kubernetes' jobs " if self.namespace else "Slurm's jobs ") + ", ".join(living)

    @property
    def way_to_end(self) -> str:
        return f"`kubectl delete jobs --namespace {self.namespace}`" if self.namespace else "`scancel`"


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
                        f"far they are, or {jobs.way_to_end} them")


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

    def __init__(self, folder: Path, address: str, profile: ClusterProfile | KubernetesProfile) -> None:
        """Submit nothing yet.

        Args:
            folder: of the run; logs lie in `logs/NAME`.
            address: of what the jobs work on, see `Jobs`.
            profile: of the cluster.
        """
        self._folder, self._profile = folder, profile
        self.jobs = Jobs(address, {}, profile.namespace if isinstance(profile, KubernetesProfile) else "")
        self._before: _Array | None = None

    def __enter__(self) -> Self:
        """Look whether the cluster would take jobs; Jobs that an earlier command has left behind go.

        Raises:
            UserError: it would not.
        """
        if isinstance(self._profile, KubernetesProfile):
            self._profile.refuse_elsewhere(self._folder, written=True)
            self._profile.refuse_elsewhere(Path.cwd())
            before = Jobs.read(self._folder)
            if before.namespace:
                kubernetes.delete_jobs(before.namespace, list(before.numbers.values()))
        else:
            client.check_partition(self._profile.partition)
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        numbers = list(self.jobs.numbers.values())
        if failure is not None and self.jobs.namespace:
            kubernetes.delete_jobs(self.jobs.namespace, numbers)
        elif failure is not None:
            client.cancel(numbers)

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
        on_slurm = isinstance(profile, ClusterProfile)
        # more tasks than the cluster takes jobs: each job does several, one after the other
        tasks_per_job = math.ceil(num_tasks / (_max_array_size() if on_slurm else MAX_PODS))
        array = _Array(logs, math.ceil(num_tasks / tasks_per_job), tasks_per_job, cpus, gpus, self._before)
        # failures of an earlier array would stop this one
        shutil.rmtree(logs, ignore_errors=True)
        with disk_errors(logs):
            (logs / "slurm_logs" if on_slurm else logs).mkdir(parents=True)
            (logs / WORK).write_bytes(pickle.dumps((work, num_tasks)))
        if isinstance(profile, ClusterProfile):
            array.number = array.submit_to_slurm(profile)
        else:
            array.number = array.submit_to_kubernetes(profile)
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

    def submit_to_slurm(self, profile: ClusterProfile) -> str:
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

    def submit_to_kubernetes(self, profile: KubernetesProfile) -> str:
        text = json.dumps(self.manifest(profile), indent=1)
        with disk_errors(self.logs):
            (self.logs / MANIFEST).write_text(text)
        made = kubernetes.kubectl("create", "-f", "-", "--output", "name", text=text)
        return made.rpartition("/")[2]

    def manifest(self, profile: KubernetesProfile) -> dict[str, Any]:
        """Return an Indexed Job (batch/v1).  What says why it fails is not tried again, as on Slurm; what is
        killed is, and what wants to go on is without an end."""
        after = [str(self.before.logs), str(self.before.num_jobs)] if self.before else []
        words = [profile.python, "-P", "-m", "megatron_sov.work.submit.array_job", str(self.logs),
                 str(self.tasks_per_job), *after]
        memory = int(profile.amount("memory") / profile.cpus_per_node * self.cpus)
        asked = {"cpu": str(self.cpus)} | ({"memory": str(memory)} if memory else {}) | (
            {profile.gpu_resource: str(self.gpus)} if self.gpus else {})
        pod = pod_of(profile, {
            "name": CONTAINER, "image": profile.image, "command": [literal(word) for word in words],
            "workingDir": str(Path.cwd()), "resources": {"requests": asked, "limits": dict(asked)},
            "env": variables_of(profile, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")})
        codes = {"containerName": CONTAINER, "operator": "In"}
        # in this order: the first rule that matches decides
        rules = [{"action": "Ignore", "onExitCodes": codes | {"values": [int(ExitCode.STOPPED)]}},
                 {"action": "FailIndex", "onExitCodes": codes | {"values": [1, 2]}},
                 {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]
        name = re.sub(r"[^a-z0-9]+", "-", self.logs.name.lower()).strip("-")[:40]
        return {"apiVersion": "batch/v1", "kind": "Job",
                "metadata": {"generateName": f"{name}-", "namespace": profile.namespace,
                             "labels": MANAGED | profile.labels},
                "spec": {"completionMode": "Indexed", "completions": self.num_jobs,
                         "parallelism": self.num_jobs, "backoffLimitPerIndex": MAX_KILLS,
                         "podFailurePolicy": {"rules": rules},
                         "template": {"spec": {"restartPolicy": "Never"} | pod}}}


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
    beside: Callable[[Arrays, str], object] = lambda arrays, number: None
    """Submits and notes jobs that live beside the array of this number."""


def submit_shares(output: Path, shared: SharedWork, profile: ClusterProfile | KubernetesProfile,
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
                shared.beside(arrays, arrays.submit(shared.name, shared.share(num_tasks), num_tasks,
                                                    cpus=shared.cpus, gpus=shared.gpus))
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
