"""`megatron-sov eval difference A.json B.json`."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_sov.base.errors import Fix, UserError, choose_free_path
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
    if folders := [path for path in (options.first, options.second) if path.is_dir()]:
        scores = {str(path): choose_free_path(f"{path.name}-scores.json") for path in folders}
        lines = [["megatron-sov", "eval", "lm", path, "--tasks", options.tasks or "TASKS", "--output", file]
                 for path, file in scores.items()]
        raise UserError(f"{folders[0]}: is a folder; pass the --output of `megatron-sov eval lm`",
                        Fix(words=scores, before=tuple(map(shlex.join, lines))))
    if options.tasks is not None and not parse_task_names(options.tasks):
        raise UserError(f"--tasks {options.tasks!r}: names no task; pass task names, separated by commas")
    return options


DIFFERENCE = DeclaredCommand(EvalDifferenceOptions, check_difference,
                             "megatron_sov.commands.evaluate.scores.scores_run:compare_scores")
