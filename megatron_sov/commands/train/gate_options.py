"""What training commands refuse or ask for of evaluations: benchmarks that nothing can measure, and `--gate`.

The measuring is the part `bench`; a run that asks for none of it does without.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import Flag, NotNegative
from megatron_sov.commands.shared_options import parse_task_names
from megatron_sov.commands.train.setup.stage_options import StageOptions, TunedStageOptions
from megatron_sov.model.config import RunConfig, apply_settings, layout_settings
from megatron_sov.model.recipes.requested import BuiltIn
from megatron_sov.runs.folder import CONFIG, RunFolder, read_command
from megatron_sov.runs.launch_environment import typed_command

if TYPE_CHECKING:
    from megatron_sov.train.guards.gate import EndGate

DEFAULT_TOLERANCE = 0.03


@dataclass(frozen=True, kw_only=True)
class GateOptions(StageOptions):
    """What a stage takes that is held to what its start could do."""

    gate: Annotated[str | None, Flag(value="TASKS")] = None
    """Forgetting gate: evaluate what the stage starts from and what it makes on these tasks of `megatron-sov
    eval lm`; exit code 3 where it has got worse for sure."""
    tolerance: Annotated[NotNegative | None, Flag(value="T")] = None
    """--gate: how much worse each task's first figure may be, in its own unit (default 0.03: 3 of 100 for a
    share of right answers)."""
    gate_with: Annotated[str | None, Flag(value="ARGUMENTS")] = None
    """--gate: further arguments of `eval lm`, in one word, e.g. --gate-with='--task-dir tasks
    --limit 500'."""


@dataclass(frozen=True, kw_only=True)
class TunedOptions(TunedStageOptions, GateOptions):
    """What commands take that go on from a model, and may be held to what it could do."""


def gate_of(args: GateOptions, config: RunConfig, start: Path | None) -> EndGate | None:
    """Return the gate that the arguments ask for, or None.

    Args:
        args: what was typed.
        config: the stage's settings, whose layout evaluates both models.
        start: the checkpoint that it starts from, or, in a dry run, its Hugging Face folder.

    Raises:
        UserError: a mistake in them.
    """
    if args.gate is None:
        for option, value in (("--tolerance", args.tolerance), ("--gate-with", args.gate_with)):
            if value is not None:
                raise UserError(f"{option} {value}: is for --gate TASKS; add it, or leave this out")
        return None
    tasks = parse_task_names(args.gate)
    if not tasks:
        raise UserError(f"--gate {args.gate!r}: names no task; name some, separated by commas")
    # a run from scratch has nothing to forget
    if start is None:
        raise UserError(f"--gate {args.gate}: compares with what the stage starts from; name it by --from")
    try:
        more = shlex.split(args.gate_with or "")
    except ValueError as e:
        raise UserError(f"--gate-with {args.gate_with}: is not a command line ({e}); close every "
                        "quote") from None
    from megatron_sov.commands.train.forgetting_gate import OWN, ForgettingGate

    if own := [word for word in more if word.partition("=")[0] in OWN]:
        raise UserError(f"--gate-with {args.gate_with}: {own[0]} is the gate's own; leave it out")
    tolerance = DEFAULT_TOLERANCE if args.tolerance is None else args.tolerance
    layout = [word for setting in layout_settings(config) for word in ("--set", setting)]
    ranks = [] if args.nproc is None else ["--nproc", str(args.nproc)]
    gate = ForgettingGate(args.run, start, tuple(tasks), tolerance, (*layout, *ranks, *more))
    # parsed now: the gate's own command begins only when the run has ended
    gate.refuse_wrong_arguments()
    return gate


def is_complete(args: StageOptions, objective: BuiltIn) -> bool:
    """Say of a run that it is complete, before the inputs are looked for that it does not need any more;
    returns whether it was said.

    It is of the command that began the run and of `megatron-sov resume`, without changes and without code of
    the user's own: any other may ask for more, and is checked as if the run were to go on.
    """
    folder = RunFolder(args.run)
    completion = folder.completion() if args.resume else None
    config = folder.config() if completion is not None else None
    if completion is None or config is None or config.code or args.plugins:
        return False
    try:
        is_same = not args.configs and _without_resume(typed_command() or ()) == _without_resume(
            read_command(args.run).words)
        is_own = args.recipe is None and {file.absolute() for file in args.configs} == {
            (args.run / CONFIG).absolute()}
        if config.objective.name != objective or not (is_same or is_own) or (
                apply_settings(config, args.settings) != config):
            return False
    except UserError:
        return False
    from megatron_sov.train.stages.stage import tell_complete

    gate: str | None = None
    if isinstance(args, GateOptions) and args.gate is not None:
        from megatron_sov.commands.train.forgetting_gate import EVENT

        gate = EVENT
    tell_complete(folder, config, completion, gate, dry_run=args.dry_run)
    return True


def _without_resume(words: Sequence[str]) -> list[str]:
    return [word for word in words if word != "--resume"]


def refuse_unknown_benchmarks(config: RunConfig) -> None:
    """Look for the benchmarks that exports are to be measured on.

    Raises:
        UserError: lm-eval is not installed, a folder is not there, or no folder has a task.
    """
    # the bench package and lm-eval are optional; who measures nothing needs neither
    if "lm" not in config.evaluate.background.tasks:
        return
    from megatron_sov.bench.lm.harness import require_harness
    from megatron_sov.bench.lm.settings import TaskSources
    from megatron_sov.bench.lm.tasks import refuse_unknown

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
