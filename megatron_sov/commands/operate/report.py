"""`megatron-sov report RUN [RUN ...] [--compare] [--output FILE]`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from megatron_sov.base.artifacts import write_output
from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import check_output
from megatron_sov.base.settings import Flag, add_options, read_options

if TYPE_CHECKING:
    from megatron_sov.publish.report.run_data import Run

MAX_COMPARED = 8
"""Runs, one for each colour."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write a run's report, or that of several that follow on each other, as one HTML file."""

    runs: Annotated[tuple[Path, ...], Flag("RUN")]
    """Run folders in order, e.g. of pretrain, extend and sft."""
    compare: bool = False
    """Put the runs side by side, each against the first, in the place of one model's story."""
    out: Annotated[Path | None, Flag("--output", "FILE")] = None
    """The HTML file to write (default: report.html, or compare.html, in the last RUN)."""


add_arguments = partial(add_options, cls=ReportOptions)


def run(typed: argparse.Namespace) -> int:
    """Write the report and print where it is.

    Raises:
        UserError: a RUN is no run folder, or --output cannot be written.
    """
    args = read_options(ReportOptions, typed)
    if args.compare and not 2 <= len(args.runs) <= MAX_COMPARED:
        raise UserError(f"--compare: needs 2 to {MAX_COMPARED} runs, and there are {len(args.runs)}; name "
                        "the one to compare with first")
    # by their real paths: a link and its target are one run
    found = [path.resolve() for path in args.runs]
    if twice := [path for path in args.runs if found.count(path.resolve()) > 1]:
        raise UserError(f"{twice[0]}: is named twice, and its tokens would count twice; name each run once")
    from megatron_sov.publish.report.run_data import read_run

    out: Path = args.out or args.runs[-1] / ("compare.html" if args.compare else "report.html")
    check_output("--output", args.out)
    runs = [read_run(path) for path in args.runs]
    if args.compare:
        from megatron_sov.publish.report import comparison
        from megatron_sov.publish.report.charts import named

        page = comparison.render(runs, score_differences(runs, [name for _, name in named(runs)]))
    else:
        from megatron_sov.publish.report.page import render

        page = render(runs)
    write_output(out, page)
    print(f"{out}: {len(page.encode()) / 1e6:.1f} MB, opens in any browser without a network")
    return 0


def score_differences(runs: list[Run], names: list[str]) -> list[dict[str, Any]]:
    """Return the paired differences of each run's scores from the first run's, task by task; what cannot be
    compared says why."""
    from megatron_sov.bench.score_differences import differences, read_scored

    # the first run's results are compared with each other run's: read once
    read, results = cache(read_scored), [_results(run) for run in runs]
    found: list[dict[str, Any]] = []
    for (name, of_run), task in product(zip(names[1:], results[1:], strict=True), results[0]):
        if task not in of_run:
            continue
        pair = {"first": names[0], "second": name}
        try:
            found += [{**pair, **d.fields()}
                      for d in differences(read(results[0][task]), read(of_run[task]), [task])]
        except UserError as e:  # results may have been moved since
            found.append({**pair, "task": task, "problem": " ".join(str(e).split())})
    return found


def _results(run: Run) -> dict[str, Path]:
    """Return where the newest results of each task lie."""
    return {str(event.get("task")): Path(str(event["output"])) for event in run.scores if event.get("output")}
