"""`megatron-sov eval difference A.json B.json`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import refuse_input_as_output
from megatron_sov.base.settings import DeclaredCommand, Flag
from megatron_sov.commands.shared_options import parse_task_names


@dataclass(frozen=True, kw_only=True)
class EvalDifferenceOptions:
    """Compare two models item by item, with confidence intervals."""

    first: Annotated[Path, Flag("A.json")]
    """Results from `megatron-sov eval lm`."""
    second: Annotated[Path, Flag("B.json")]
    """The second model's results."""
    tasks: Annotated[str | None, Flag(value="A,B")] = None
    """Compare only these tasks (default: tasks in both files)."""
    json: bool = False
    """Print JSON."""
    out: Annotated[Path | None, Flag("--output", "FILE")] = None
    """Also write the figures to a JSON file."""


def check_difference(options: EvalDifferenceOptions) -> EvalDifferenceOptions:
    if options.out is not None:
        refuse_input_as_output("--output", options.out, options.first, options.second)
    if options.tasks is not None and not parse_task_names(options.tasks):
        raise UserError(f"--tasks {options.tasks!r}: names no task; pass task names, separated by commas")
    return options


DIFFERENCE = DeclaredCommand(EvalDifferenceOptions, check_difference,
                             "megatron_sov.commands.evaluate.scores.scores_run:compare_scores")
