"""Runs `megatron-sov report`."""

from megatron_sov.base.artifacts import write_output
from megatron_sov.commands.operate.runs.report import ReportRequest
from megatron_sov.publish.report.page import render_report
from megatron_sov.publish.report.run_data import read_run


def write_report(request: ReportRequest) -> None:
    page = render_report([read_run(path) for path in request.runs])
    write_output(request.output, page)
    print(f"{request.output}: {len(page.encode()) / 1e3:,.0f} KB, opens in any browser without a network")
