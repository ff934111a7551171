"""One submission to Kubernetes: everything is checked, the manifest is made, and `kubectl` is asked only
where the user says so."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megatron_sov.artifacts import write_output
from megatron_sov.clusters.cluster import time_limit_s
from megatron_sov.clusters.kubernetes import KubernetesProfile
from megatron_sov.errors import UserError
from megatron_sov.kubernetes.manifest import Order, render
from megatron_sov.outputs import check_output
from megatron_sov.slurm.stages import Commands, Work, fitting_nodes, work_of

NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
"""What a TrainJob may be called (RFC 1035)."""
LONGEST_POD = 63
"""Characters of a pod's host name."""
TIMEOUT_S = 60


@dataclass(frozen=True)
class Request:
    """One stage as it was asked for."""

    stage: str
    arguments: tuple[str, ...]
    profile: KubernetesProfile
    nodes: int = 1
    name: str | None = None
    """Name of the job; None: the stage's and its target's."""
    time_limit: str | None = None
    """As sbatch takes it; None: no limit."""


def prepare(request: Request, commands: Commands) -> str:
    """Return a stage's manifest; nothing is written and nobody is asked.

    Raises:
        UserError: the stage, its arguments, the nodes, the name or a path do not fit.
    """
    profile = request.profile
    work = work_of(request.stage, list(request.arguments), commands)
    if not work.kind.ranks and request.nodes > 1:
        raise UserError(f"--nodes {request.nodes}: {request.stage} works on one node; leave it out")
    settings: tuple[str, ...] = ()
    if work.kind.ranks:
        settings = fitting_nodes(work, profile.tasks_per_node, request.nodes, request.nodes, {},
                                 profile.gpu if profile.gpus_per_node else "")[request.nodes]
    _check_side_jobs(work)
    _check_paths(work, profile)
    folder = Path.cwd() if profile.holds(Path.cwd()) else Path("/")
    return render(Order(_job_name(request, work), work, profile, request.nodes, settings, folder,
                        _seconds(request.time_limit)))


def _job_name(request: Request, work: Work) -> str:
    """Return what the job is called.

    Raises:
        UserError: that is no DNS label, or leaves no room for what its pods' names add.
    """
    name = request.name
    if name is None:
        name = re.sub(r"[._]+", "-", f"{request.stage}-{work.target.name}".lower())
    longest = LONGEST_POD - len(f"-node-0-{request.nodes - 1}-xxxxx")
    if not NAME.fullmatch(name) or len(name) > longest:
        raise UserError(f"--job-name {name}: must be a DNS label of at most {longest} of a-z, 0-9 and -, "
                        "that begins with a letter and does not end with -; pass another --job-name")
    return name


def _check_paths(work: Work, profile: KubernetesProfile) -> None:
    mounts = ", ".join(v.mount for v in profile.volumes) or "none"
    places = [(work.target, work.stage != "eval"), *((path, False) for path in work.inputs)]
    for path, written in places:
        if not profile.holds(_plain(path), written=written):
            raise UserError(f"{path}: lies on no volume of the profile{' that may be written to' * written} "
                            f"(mounts: {mounts}); name it as the pods see it, or add its claim to volumes")


def _plain(path: Path) -> Path:
    """Return a path without `..`, as a pod would walk it where nothing is a link."""
    parts: list[str] = []
    for part in path.parts:
        parts = parts[:-1] if part == ".." and len(parts) > 1 else [*parts, part]
    return Path(*parts)


def _check_side_jobs(work: Work) -> None:
    if (work.config is not None and work.config.evaluate.background.tasks
            and work.config.evaluate.background.where == "slurm"):
        raise UserError("evaluate.background.where = slurm: there is no Slurm in a pod; set it to another "
                        "place, or leave evaluate.background.tasks empty")


def _seconds(limit: str | None) -> int | None:
    if limit is None:
        return None
    seconds = time_limit_s(limit)
    return None if seconds == float("inf") else int(seconds)


def check_manifest_path(path: Path | None) -> None:
    """Raise `UserError` where no manifest could be written."""
    check_output("--manifest", path)


def write(path: Path, text: str) -> None:
    """Write a manifest, whole or not at all."""
    write_output(path, text)


def create(text: str) -> str:
    """Have `kubectl` make the job; returns what it says.

    Raises:
        UserError: it is not installed, does not answer, or refuses.
    """
    try:
        done = subprocess.run(["kubectl", "create", "-f", "-"], input=text, capture_output=True, text=True,
                              timeout=TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise UserError("kubectl: is not on PATH; install it, or write the manifest with --manifest FILE and "
                        "create it elsewhere") from None
    except OSError as e:
        raise UserError(f"kubectl: cannot be run ({e.strerror}); write the manifest with --manifest FILE and "
                        "create it elsewhere") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"kubectl: has not answered for {TIMEOUT_S} s; whether the job was made tells "
                        "`kubectl get trainjobs`") from None
    if done.returncode:
        raise UserError(f"kubectl refuses the job: {' '.join(done.stderr.split()) or 'it gives no reason'}")
    return done.stdout.strip()
