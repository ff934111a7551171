"""`megatron-sov eval lm`: score a model on lm-eval's tasks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_sov.base.artifacts import format_json
from megatron_sov.base.errors import ExitCode
from megatron_sov.base.settings import Flag, build_command, read_options
from megatron_sov.bench.lm.settings import Settings
from megatron_sov.commands.shared_options import TARGET_HELP
from megatron_sov.runs.checkpoints import check_model_path


@dataclass(frozen=True, kw_only=True)
class EvalLmOptions:
    """Score a model on tasks of lm-eval's form, by its own prompts and metrics, offline."""

    target: Annotated[str, Flag("TARGET", help=TARGET_HELP)]
    tasks: Annotated[str, Flag(value="A,B")]
    """Names of tasks and groups."""
    settings: Settings
    json: bool = False
    """Print the figures as JSON."""


def run_lm(args: EvalLmOptions) -> int:
    """Measure, write, and print the table.

    Raises:
        UserError: the model, a task or a setting cannot be used.
        StopRequested: a signal asked for it.
    """
    from megatron_sov.bench.lm.results import table
    from megatron_sov.bench.lm.run import evaluate

    found = evaluate(args.target, [name for name in args.tasks.split(",") if name], args.settings)
    if found is not None:
        print(format_json(found).rstrip() if args.json else table(found))
    return ExitCode.OK


def check_lm(args: EvalLmOptions) -> None:
    """Check the model's path and the names of tasks, for proposed lines."""
    from megatron_sov.bench.lm.tasks import check_names

    check_model_path(Path(args.target))
    check_names([name for name in args.tasks.split(",") if name], args.settings.sources)


LM = build_command(EvalLmOptions, lambda typed: run_lm(read_options(EvalLmOptions, typed)))
LM.check_proposal = check_lm
