"""`sov-data report`: the page of a pipeline's output."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from data_prep.tags import SYNTHESIS
from megatron_sov.base.artifacts import MANIFEST, read_manifest
from megatron_sov.base.settings import Flag, add_options, read_options


@dataclass(frozen=True, kw_only=True)
class DataReportOptions:
    """Write what a run of the pipeline or of synthesis did as one page."""

    data: Annotated[Path, Flag("DIR")]
    """Folder that `sov-data run` or `sov-data synth` wrote."""
    out: Annotated[Path | None, Flag("--output", "FILE")] = None
    """The page (default: DIR-report.html beside DIR, which stays as its manifest has it)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = ("Write one HTML file that loads nothing: what was read, what each step dropped and "
                          "changed and why, with examples, and what the output holds. `sov-data run` leaves "
                          "one at its end. Of a folder of `sov-data synth`: what was kept and rejected and "
                          "why, what it has cost, and samples.")
    add_options(parser, DataReportOptions)


def run(typed: argparse.Namespace) -> int:
    args = read_options(DataReportOptions, typed)
    from megatron_sov.base.outputs import check_output

    folder = args.data.resolve()
    # Beside the folder and not in it, where a file that the manifest does not know would be damage.
    file = args.out or folder.parent / f"{folder.name}-report.html"
    check_output("--output", file)
    print(f"wrote {_writer(args.data)(args.data, file)}")
    return 0


def _writer(folder: Path) -> Callable[[Path, Path], Path]:
    """Return what writes the page of a folder."""
    if (folder / "answers.sqlite").is_file() or (
            (folder / MANIFEST).is_file() and read_manifest(folder).kind == SYNTHESIS):
        from data_prep.synth.page import write_page

        return write_page
    from data_prep.curate.journey.page import write_report

    return write_report
