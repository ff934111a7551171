"""Evaluations in a training command: the forgetting gate, and benchmarks for exports.

The evaluations are the optional part `bench`, which is imported only if a command asks for one.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sov.base.errors import UserError
from megatron_sov.commands.shared_options import parse_task_names
from megatron_sov.commands.train.setup.stage_options import GateOptions
from megatron_sov.model.config import RunConfig, layout_settings

if TYPE_CHECKING:
    from megatron_sov.commands.train.forgetting_gate import ForgettingGate

DEFAULT_TOLERANCE = 0.03


def build_gate(options: GateOptions, config: RunConfig, start: Path | None) -> ForgettingGate | None:
    """Return the gate from --gate, or None.

    Args:
        options: parsed options.
        config: resolved settings, whose layout evaluates both models.
        start: checkpoint or Hugging Face folder of the start.

    Raises:
        UserError: a mistake in the options of the gate.
    """
    if options.gate is None:
        for option, value in (("--tolerance", options.tolerance), ("--gate-with", options.gate_with)):
            if value is not None:
                raise UserError(f"{option} {value}: needs --gate TASKS; add it, or leave {option} out")
        return None
    tasks = parse_task_names(options.gate)
    if not tasks:
        raise UserError(f"--gate {options.gate!r}: names no task; pass task names, separated by commas")
    # a run from scratch cannot forget
    if start is None:
        raise UserError(f"--gate {options.gate}: compares with the start of the stage; add --from")
    try:
        arguments = shlex.split(options.gate_with or "")
    except ValueError as e:
        raise UserError(f"--gate-with {options.gate_with}: is not a command line ({e}); close every "
                        "quote") from None
    from megatron_sov.commands.train.forgetting_gate import GATE_OPTIONS, ForgettingGate  # optional: `bench`

    if reserved := [word for word in arguments if word.partition("=")[0] in GATE_OPTIONS]:
        raise UserError(f"--gate-with {options.gate_with}: the gate sets {reserved[0]}; leave it out")
    tolerance = DEFAULT_TOLERANCE if options.tolerance is None else options.tolerance
    layout = [word for setting in layout_settings(config) for word in ("--set", setting)]
    ranks = [] if options.nproc is None else ["--nproc", str(options.nproc)]
    gate = ForgettingGate(options.run, start, tuple(tasks), tolerance, (*layout, *ranks, *arguments))
    # checked now: the gate's own command begins only when the run has ended
    gate.check_arguments()
    return gate


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
        check_task_names(lm.tasks, TaskSources(tuple(map(Path, lm.task_dirs)),
                                               Path(lm.data_dir) if lm.data_dir else None,
                                               lm.allow_task_code, lm.allow_download))
    except UserError as e:
        raise UserError(f"evaluate.lm.tasks = {list(lm.tasks)}: {e}") from None
