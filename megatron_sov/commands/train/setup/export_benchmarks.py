"""Checks of the benchmarks that a training command runs on its exports.

The optional part `bench` is imported only if the settings name a benchmark.
"""

from __future__ import annotations

from pathlib import Path

from megatron_sov.base.errors import UserError
from megatron_sov.model.config import RunConfig


def check_benchmarks(config: RunConfig) -> None:
    """Check that the benchmarks for exports (`evaluate.background.tasks`) can be measured. Raises
    `UserError`: lm-eval is not installed, a folder is missing, or no folder has a task."""
    if "lm" not in config.evaluate.background.tasks:
        return
    from megatron_sov.bench.lm.harness import require_harness  # optional: `bench` and lm-eval
    from megatron_sov.bench.lm.settings import TaskSources
    from megatron_sov.bench.lm.task_files import check_task_names

    require_harness()
    lm = config.evaluate.lm
    for name, folders in (("task_dirs", lm.task_dirs), ("data_dir", (lm.data_dir,) if lm.data_dir else ())):
        if missing := [folder for folder in folders if not Path(folder).is_dir()]:
            raise UserError(f"evaluate.lm.{name} = {missing[0]}: is not a folder; it must exist before the "
                            "run starts")
    try:
        check_task_names(lm.tasks, TaskSources(folders=tuple(map(Path, lm.task_dirs)),
                                             allow_code=lm.allow_task_code, allow_download=lm.allow_download))
    except UserError as e:
        raise UserError(f"evaluate.lm.tasks = {list(lm.tasks)}: {e}") from None
