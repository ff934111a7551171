"""`megatron-sov report RUN [RUN ...] [--output FILE]`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from megatron_sov.base.artifacts import write_output
from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import check_page
from megatron_sov.base.settings import Flag, add_options, read_options


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write a run's report, or that of several that follow on each other, as one HTML file."""

    runs: Annotated[tuple[Path, ...], Flag("RUN")]
    """Run folders in order, e.g. of pretrain, extend and sft."""
    out: Annotated[Path | None, Flag("--output", "FILE")] = None
    """The HTML file to write (default: report.html in the last RUN)."""


add_arguments = partial(add_options, cls=ReportOptions)


def run(typed: argparse.Namespace) -> int:
    """Write the report and print where it is.

    Raises:
        UserError: a RUN is no run folder, or --output cannot be written.
    """
    args = read_options(ReportOptions, typed)
    # by their real paths: a link and its target are one run
    found = [path.resolve() for path in args.runs]
    if twice := [path for path in args.runs if found.count(path.resolve()) > 1]:
        raise UserError(f"{twice[0]}: is named twice, and its tokens would count twice; name each run once")
    from megatron_sov.publish.report.page import render
    from megatron_sov.publish.report.run_data import read_run

    out: Path = args.out or args.runs[-1] / "report.html"
    check_page("--output", args.out)
    page = render([read_run(path) for path in args.runs])
    write_output(out, page)
    print(f"{out}: {len(page.encode()) / 1e6:.1f} MB, opens in any browser without a network")
    return 0
