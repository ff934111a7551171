"""Where unfinished work on an output lies: a hidden folder beside it."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_sov.base.artifacts import delete_folder


def work_folder(output: Path) -> Path:
    """Return the folder that keeps what is done of an output until that is there."""
    return output.with_name(f".{output.name}.work")


def slurm_folder(output: Path) -> Path:
    """Return the folder with the logs of Slurm's jobs on an output, which outlive the work."""
    return output.with_name(f".{output.name}.slurm")


def delete_work(output: Path) -> None:
    """Delete the work on an output that is there: first its name, so that a kill on the way leaves no torn
    part that a later command would trust."""
    # what `new_artifact` clears away after a kill
    delete_folder(work_folder(output), output.with_name(f".{output.name}.tmp-{os.getpid()}"))
