"""What is asked of `evaluate.lm` before a run begins, and would else fail on every export."""

from __future__ import annotations

from pathlib import Path

from megatron_sov.base.errors import UserError
from megatron_sov.model.config import RunConfig


def refuse_unknown_benchmarks(config: RunConfig) -> None:
    """Look for the benchmarks that exports are to be measured on.

    Raises:
        UserError: lm-eval is not installed, a folder is not there, or no folder has a task.
    """
    if "lm" not in config.evaluate.background.tasks:
        return
    from megatron_sov.bench.lm.tasks import TaskSources, refuse_unknown, require_harness

    require_harness()
    lm = config.evaluate.lm
    for name, folders in (("task_dirs", lm.task_dirs), ("data_dir", (lm.data_dir,) if lm.data_dir else ())):
        if missing := [folder for folder in folders if not Path(folder).is_dir()]:
            raise UserError(f"evaluate.lm.{name} = {missing[0]}: is no folder; name one that is there before "
                            "the run begins")
    try:
        refuse_unknown(lm.tasks, TaskSources(folders=tuple(map(Path, lm.task_dirs)),
                                             allow_code=lm.allow_task_code,
                                             allow_download=lm.allow_download))
    except UserError as e:
        raise UserError(f"evaluate.lm.tasks = {list(lm.tasks)}: {e}") from None
