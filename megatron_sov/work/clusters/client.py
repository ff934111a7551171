"""Calls of Slurm's command-line programs from a login node."""

import os
import re
import subprocess
from pathlib import Path

from megatron_sov.base.errors import UserError, stop_check, suggest_name

TIMEOUT_S = 60
READING_PROGRAMS = ("sinfo", "squeue", "scontrol")
"""Programs that change nothing on the cluster with the arguments used here."""
ACTIVE_STATES = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "RESIZING",
                 "STOPPED"}
JOB_VARIABLE_PREFIXES = ("SLURM_", "SBATCH_")
THIS_JOB = '"${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"'
"""Shell word for the running job or array task. In a task SLURM_JOB_ID may equal the array's number, and
`scontrol` and `squeue` would act on the whole array."""
CLIENT_VARIABLES = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SBATCH_CLUSTERS", "SLURM_JWT")


def environment_outside_jobs() -> dict[str, str]:
    """Return the environment without Slurm job variables (`SLURM_*`, `SBATCH_*`), which override scripts.

    sbatch prefers SBATCH_ACCOUNT to the script's account; inside an allocation variables such as
    SLURM_MEM_PER_CPU are inherited and conflict with the job's own options.
    """
    return {k: v for k, v in os.environ.items() if k in CLIENT_VARIABLES
            or not k.startswith(JOB_VARIABLE_PREFIXES)}


def run_slurm_program(program: str, *arguments: str,
                      script: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a Slurm program such as `sinfo` or `sbatch`. Raises `UserError`: the program is not installed, or
    the controller does not answer."""
    if program not in READING_PROGRAMS:
        stop_check()
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
    """Check a partition name with `sinfo`; "" means the default. Raises `UserError`."""
    result = run_slurm_program("sinfo", "--noheader", "--format=%R")
    if result.returncode:
        raise UserError(f"sinfo: {format_error(result.stderr)}; make sure that Slurm's controller can be "
                        "reached")
    partitions = sorted(set(result.stdout.split()))
    if partition and partition not in partitions:
        raise UserError(f"partition {partition!r}: does not exist here{suggest_name(partition, partitions)} "
                        f"(partitions: {', '.join(partitions)}); pass --partition, "
                        "or put it into a profile of your own")


def check_script(text: str) -> None:
    """Check a script with `sbatch --test-only`. Raises `UserError`."""
    result = run_slurm_program("sbatch", "--test-only", script=text)
    if result.returncode:
        raise UserError(f"Slurm refuses the job: {format_error(result.stderr)}; "
                        "change the profile or the arguments of submit")


def submit_script(script: Path, *, after: list[str]) -> str:
    """Submit a script with `sbatch`; return the job's number. `after`: jobs that must succeed first; if a
    dependency fails, Slurm cancels this job. Raises `UserError`: Slurm refuses the script."""
    depends = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    result = run_slurm_program("sbatch", "--parsable", *depends, str(script))
    if result.returncode:
        raise UserError(f"Slurm refuses {script}: {format_error(result.stderr)}")
    return result.stdout.strip().split(";")[0]


def read_active_states(jobs: list[str]) -> dict[str, str]:
    """Return job number -> state of waiting and running jobs by `squeue`; of an array, a task's state."""
    if not jobs:
        return {}
    # squeue fails if a job is long gone
    result = run_slurm_program("squeue", "--noheader", "--format=%F %T", f"--jobs={','.join(jobs)}")
    # %F is the array's number in each task's line: the last listed task counts
    rows = [line.split() for line in result.stdout.splitlines()]
    job_states = {row[0]: row[1] for row in rows if len(row) == 2}
    return {number: state for number, state in job_states.items() if state in ACTIVE_STATES}


def cancel_jobs(jobs: list[str]) -> None:
    if jobs:
        run_slurm_program("scancel", *jobs)


def format_error(text: str) -> str:
    """Return a Slurm program's error text on one line without prefixes."""
    lines = [re.sub(r"^\w+: (error: )?", "", line).strip() for line in text.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines)) or "it gives no reason"
