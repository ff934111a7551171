"""`megatron-sov eval difference A.json B.json`: what two models' scores on the same items tell."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

from megatron_sov.base.artifacts import to_json, write_output
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.base.outputs import check_output, refuse_input
from megatron_sov.base.settings import Flag, add_options, read_options


@dataclass(frozen=True, kw_only=True)
class EvalDifferenceOptions:
    """Compare two models item by item, with confidence intervals."""

    first: Annotated[Path, Flag("A.json")]
    """Results of `megatron-sov eval lm`."""
    second: Annotated[Path, Flag("B.json")]
    """Those of the model to compare with it."""
    tasks: Annotated[str | None, Flag(value="A,B")] = None
    """These alone (default: all that both have)."""
    json: bool = False
    """Print the figures as JSON."""
    out: Annotated[Path | None, Flag(value="FILE")] = None
    """Also write the figures into a JSON file, which appears whole."""

def run_difference(typed: argparse.Namespace) -> int:
    """Print the difference of each figure with its interval.

    Raises:
        UserError: a file is damaged, or the two were not measured in the same way.
    """
    args = read_options(EvalDifferenceOptions, typed)
    from megatron_sov.bench.score_differences import differences, read_scored, table

    if args.out is not None:
        check_output("--out", args.out)
        refuse_input("--out", args.out, args.first, args.second)
    tasks = named_tasks(args.tasks)
    if args.tasks is not None and not tasks:
        raise UserError(f"--tasks {args.tasks!r}: names no task; name some, separated by commas")
    found = differences(read_scored(args.first), read_scored(args.second), tasks)
    values = {"first": str(args.first), "second": str(args.second),
              "differences": [d.fields() for d in found]}
    if args.out is not None:
        write_output(args.out, to_json(values))
    print(json.dumps(values, indent=1, ensure_ascii=False) if args.json else table(found))
    return ExitCode.OK


def named_tasks(names: str | None) -> list[str]:
    """Return the tasks of an option, separated by commas."""
    return [name for name in (part.strip() for part in (names or "").split(",")) if name]


DIFFERENCE = SimpleNamespace(add_arguments=partial(add_options, cls=EvalDifferenceOptions),
                             run=run_difference)
