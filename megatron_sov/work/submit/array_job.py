"""Entry point of a job in a Slurm array: executes the job's tasks.

    python -m megatron_sov.work.submit.array_job LOGS TASKS_PER_JOB

The work is unpickled from LOGS, written there by the submitting command.
"""

import os
import pickle
import signal
import sys
from pathlib import Path

from megatron_sov.base.artifacts import translate_disk_errors
from megatron_sov.work.submit.arrays import WORK_FILE, record_failure


def main() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # for the job's shell, which requeues the job
    logs, tasks_per_job = Path(sys.argv[1]), int(sys.argv[2])
    work, num_tasks = pickle.loads((logs / WORK_FILE).read_bytes())  # noqa: S301
    first = int(os.environ["SLURM_ARRAY_TASK_ID"]) * tasks_per_job
    for task in range(first, min(first + tasks_per_job, num_tasks)):
        with record_failure(logs, task), translate_disk_errors(logs):
            work(task)


if __name__ == "__main__":
    main()
