"""Slurm's client programs, asked from the login node."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from megatron_sov.base.errors import UserError, nearest

TIMEOUT_S = 60
LIVING = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "RESIZING", "STOPPED"}
OF_A_JOB = ("SLURM_", "SBATCH_")
THIS_JOB = '"${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"'
"""Shell word that names the running job, or the one task of its array. The SLURM_JOB_ID of one task is also
the number of the whole array, and `scontrol` and `squeue` then act on all tasks."""
WHERE_SLURM_IS = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SBATCH_CLUSTERS", "SLURM_JWT")


def environment_outside_jobs() -> dict[str, str]:
    """Return this process's environment without its place in a job, and without what would overrule a script.

    sbatch takes SBATCH_ACCOUNT before the script's account; a shell inside an allocation has
    SLURM_MEM_PER_CPU and the like, which a job inherits and its srun refuses beside the job's own.
    """
    return {k: v for k, v in os.environ.items() if k in WHERE_SLURM_IS or not k.startswith(OF_A_JOB)}


def ask(program: str, *arguments: str, script: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's programs.

    Raises:
        UserError: it is not installed, or the controller does not answer.
    """
    try:
        return subprocess.run([program, *arguments], input=script, capture_output=True, text=True,
                              timeout=TIMEOUT_S, check=False, env=environment_outside_jobs())
    except FileNotFoundError:
        raise UserError(f"{program}: is not on PATH, so Slurm is not installed here; "
                        "submit from a login node, load the cluster's Slurm module, or look at the script "
                        "with --dry-run") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{program}: Slurm's controller has not answered for {TIMEOUT_S} s; "
                        "try again later") from None


def check_partition(partition: str) -> None:
    """Raise `UserError` where Slurm has no such partition; an empty name is the default one."""
    done = ask("sinfo", "--noheader", "--format=%R")
    if done.returncode:
        raise UserError(f"sinfo: {reason(done.stderr)}; see to it that Slurm's controller can be reached")
    known = sorted(set(done.stdout.split()))
    if partition and partition not in known:
        raise UserError(f"partition {partition!r}: does not exist here{nearest(partition, known)} "
                        f"(partitions: {', '.join(known)}); pass --partition, "
                        "or put it into a profile of your own")


def check_script(text: str) -> None:
    """Raise `UserError` where Slurm would refuse a script; nothing is submitted."""
    done = ask("sbatch", "--test-only", script=text)
    if done.returncode:
        raise UserError(f"Slurm refuses the job: {reason(done.stderr)}; "
                        "change the profile or the arguments of submit")


def submit(script: Path, *, after: list[str]) -> str:
    """Submit a script; returns the job's number.

    Args:
        script: the file.
        after: jobs that have to end well before; where one does not, Slurm takes this one away.

    Raises:
        UserError: Slurm refuses it.
    """
    depends = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    done = ask("sbatch", "--parsable", *depends, str(script))
    if done.returncode:
        raise UserError(f"Slurm refuses {script}: {reason(done.stderr)}")
    return done.stdout.strip().split(";")[0]


def states(jobs: list[str]) -> dict[str, str]:
    """Return number -> state of those jobs that wait or run; of an array, any of its tasks."""
    if not jobs:
        return {}
    # fails for one job that is long gone
    done = ask("squeue", "--noheader", "--format=%F %T", f"--jobs={','.join(jobs)}")
    # %F is the array's number for each of its tasks: the last task that is listed counts
    found = dict(line.split()[:2] for line in done.stdout.splitlines() if len(line.split()) == 2)
    return {number: state for number, state in found.items() if state in LIVING}


def cancel(jobs: list[str]) -> None:
    if jobs:
        ask("scancel", *jobs)


def reason(text: str) -> str:
    """Return what a program of Slurm says, on one line and without its own prefixes."""
    lines = [re.sub(r"^\w+: (error: )?", "", line).strip() for line in text.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines)) or "it gives no reason"
