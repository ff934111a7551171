"""`megatron-sov report RUN [RUN ...] [--out FILE]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_sov.artifacts import write_output
from megatron_sov.outputs import check_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megatron-sov report`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="run folders in order, e.g. of pretrain, extend and sft")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="the HTML file to write (default: report.html in the last RUN)")


def run(args: argparse.Namespace) -> int:
    """Write the report and print where it is.

    Raises:
        UserError: a RUN is no run folder, or --out cannot be written.
    """
    from megatron_sov.report.page import render
    from megatron_sov.report.run_data import read_run

    out: Path = args.out or args.runs[-1] / "report.html"
    check_output("--out", args.out)
    page = render([read_run(path) for path in args.runs])
    write_output(out, page)
    print(f"{out}: {len(page.encode()) / 1e6:.1f} MB, opens in any browser without a network")
    return 0
