"""What a job of an array calls: does the tasks that are its own.

    python -m megatron_sov.work.submit.array_job LOGS TASKS_PER_JOB [LOGS_BEFORE JOBS_BEFORE]

The work is unpickled from LOGS, where the command that submitted the array has written it.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from pathlib import Path

from megatron_sov.base.artifacts import disk_errors
from megatron_sov.base.errors import ExitCode
from megatron_sov.work.submit.arrays import DONE, FAILED, WORK, keeping_failure

WAIT_S, LOOK_S = 30.0, 1.0
"""How long a pod waits for the array before, and how often it looks."""


def main() -> None:
    """Call the work with the number of each of this job's tasks."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # is for Slurm's shell, which sends it back
    logs, tasks_per_job = Path(sys.argv[1]), int(sys.argv[2])
    index = os.environ.get("JOB_COMPLETION_INDEX")
    if index is not None:  # the pod is to go: all that is done is kept, and it is started again elsewhere
        signal.signal(signal.SIGTERM, lambda *_: os._exit(ExitCode.STOPPED))
        if sys.argv[3:]:
            _wait(Path(sys.argv[3]), int(sys.argv[4]))
    work, num_tasks = pickle.loads((logs / WORK).read_bytes())  # noqa: S301
    first = int(os.environ["SLURM_ARRAY_TASK_ID"] if index is None else index) * tasks_per_job
    for task in range(first, min(first + tasks_per_job, num_tasks)):
        with keeping_failure(logs, task), disk_errors(logs):
            work(task)
    if index is not None:
        (logs / DONE).mkdir(exist_ok=True)
        (logs / DONE / index).touch()


def _wait(before: Path, num_jobs: int) -> None:
    """Wait until each pod of the array before has said that it is done; after a while give the place back,
    which those may need."""
    end_s = time.monotonic() + WAIT_S
    while sum(1 for _ in (before / DONE).glob("*")) < num_jobs:
        if any((before / FAILED).glob("*.json")):
            sys.exit(f"{before.name}: has failed, and this waits for it")  # code 1
        if time.monotonic() > end_s:
            sys.exit(ExitCode.STOPPED)
        time.sleep(LOOK_S)


if __name__ == "__main__":
    main()
