"""`megatron-sov report RUN [RUN ...] [--output FILE]`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_sov.base.errors import Fix, UserError
from megatron_sov.base.outputs import check_page
from megatron_sov.base.settings import DeclaredCommand, Flag
from megatron_sov.runs.checkpoints import find_runs
from megatron_sov.runs.obs.events import EVENTS


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write one HTML report for a run, or for several consecutive runs."""

    runs: Annotated[tuple[Path, ...], Flag("RUN")]
    """Run folders in order, e.g. from pretrain, extend and sft."""
    out: Annotated[Path | None, Flag("--output", "FILE")] = None
    """HTML file to write (default: report.html in the last RUN)."""


@dataclass(frozen=True)
class ReportRequest:
    """Checked input for `report_run.write_report`."""

    runs: tuple[Path, ...]
    output: Path


def check_report(options: ReportOptions) -> ReportRequest:
    # resolved: a link and its target are one run
    resolved = [path.resolve() for path in options.runs]
    if repeated := [path for path in options.runs if resolved.count(path.resolve()) > 1]:
        raise UserError(f"{repeated[0]}: is passed twice, so its tokens would count twice; pass every run "
                        "once")
    for path in options.runs:
        if not (path / EVENTS).exists() and (runs := find_runs(path)):
            names = tuple(map(str, runs))
            raise UserError(f"{path}: is not a run; it holds the runs {', '.join(names)}: pass them in order",
                            Fix(arguments=names, left_out=(str(path), f"{path}/")))
    check_page("--output", options.out)
    return ReportRequest(options.runs, options.out or options.runs[-1] / "report.html")


REPORT = DeclaredCommand(ReportOptions, check_report,
                         "megatron_sov.commands.operate.runs.report_run:write_report", runs_in_checks=True)
