"""Job scripts: templates filled with a stage and a cluster's profile.  Everything from outside is quoted for the shell."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from megatron_sov.errors import UserError
from megatron_sov.slurm.cluster import ClusterProfile
from megatron_sov.slurm.stages import Work

PLAIN = re.compile(r"[A-Za-z0-9_./:,=@+%-]+")
PORTS = 20000, 10000
"""First rendezvous port, and how many there are: below those that a system hands out by itself."""


@dataclass(frozen=True)
class Job:
    """A job to be written as a script."""

    work: Work
    """What it has to do."""
    profile: ClusterProfile
    """Where."""
    cwd: Path
    """Folder that relative paths start from."""
    code: Path
    """Copy of the code that it runs."""
    script: Path
    """Where the script will lie."""
    layouts: dict[int, tuple[str, ...]]
    """Number of nodes -> settings; the largest is what is asked for, the smallest what it goes on with."""
    array: int = 0
    """Tasks that share the inputs; 0: no array."""
    array_inputs: tuple[str, ...] = ()
    """What the tasks share."""
    time_limit: str = ""
    """As sbatch takes it; at the end of it the job is asked to save, `signal_lead_s` before."""
    needs: tuple[Path, ...] = ()
    """Completion manifests of earlier stages of its chain."""


def render(job: Job) -> str:
    """Return the script.

    Raises:
        UserError: a path holds what Slurm would take for something else.
    """
    loader = jinja2.FunctionLoader(_source)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                                     keep_trailing_newline=True, autoescape=False)
    environment.filters |= {"sh": _quoted, "directive": _directive, "lines": _lines}
    for path in (job.work.records, job.cwd):
        if "%" in str(path) or "\\" in str(path) or "\n" in str(path):
            raise UserError(f"{path}: holds a character that Slurm reads as a placeholder (%, \\ or a line end); choose another")
    work, profile = job.work, job.profile
    limits = {**dataclasses.asdict(profile.preflight), "num_gpus": profile.gpus_per_node,
              "ranks_per_node": profile.tasks_per_node}
    return environment.get_template(f"{'array' if job.array else work.stage}.sbatch.j2").render(
        work=work, kind=work.kind, profile=profile, job=job, name=_job_name(work), nodes=max(job.layouts), least=min(job.layouts),
        limits=json.dumps(limits), first_port=PORTS[0], num_ports=PORTS[1], command=["-m", *work.kind.program, *work.arguments])


def _source(name: str) -> str:
    return importlib.resources.files("megatron_sov.slurm").joinpath("templates", name).read_text(encoding="utf-8")


def _job_name(work: Work) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{work.stage}-{work.target.name}")


def _quoted(value: Any) -> str:
    return shlex.quote(str(value))


def _directive(value: Any) -> str:
    """Quote a value for a line that begins with #SBATCH, which Slurm reads by rules of its own."""
    text = str(value)
    if "\n" in text:
        raise UserError(f"{text!r}: holds a line end, which a job script's header cannot")
    return text if PLAIN.fullmatch(text) else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _lines(argv: list[str] | tuple[str, ...], indent: int = 2) -> str:
    """Return quoted words, a new line before each option."""
    lines: list[list[str]] = [[]]
    for word in argv:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(shlex.quote(word))
    return f"\n{' ' * indent}".join(" ".join(line) for line in lines if line)
