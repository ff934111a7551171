"""Tests every node before a training start: `python -m megatron_sov.operate.slurm.preflight FOLDER`, one
process per rank.

Each rank writes FOLDER/rank-N.json twice: after the tests of its own node, and after the tests with all
ranks. Missing fields reveal a rank that died or hung. `attempts.find_sick_nodes` judges the reports.
"""

import argparse
import os
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from megatron_sov.base.artifacts import format_json, write_atomically
from megatron_sov.base.errors import format_error
from megatron_sov.base.settings import AboveZero, AtLeastOne, Flag, add_options, read_options
from megatron_sov.operate.slurm.node_report import NodeReport


@dataclass(frozen=True, kw_only=True)
class PreflightOptions:
    """Test this rank's node before a training start."""

    folder: Annotated[Path, Flag("FOLDER")]
    """Folder for the reports."""
    scratch: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))
    """Folder on the node for a test file."""
    timeout_s: AboveZero = 120.0
    """Timeout for collectives."""
    group_size: AtLeastOne = 1
    """Consecutive ranks that exchange the tokens of experts."""
    transformer_engine: bool = False
    """Import Transformer Engine too."""


def main(argv: list[str] | None = None) -> int:
    """Test this rank's node and write its report; return 0 even if the node is sick."""
    parser = argparse.ArgumentParser(prog="python -m megatron_sov.operate.slurm.preflight")
    add_options(parser, PreflightOptions)
    args = read_options(PreflightOptions, parser.parse_args(argv))
    report = NodeReport(os.environ.get("SLURMD_NODENAME", platform.node()), int(os.environ["RANK"]))
    file = args.folder / f"rank-{report.rank}.json"
    for inspect in (lambda: preflight_run.inspect_node(report, args.scratch, args.transformer_engine),
                    lambda: preflight_run.inspect_communication(report, args.timeout_s,
                                                                args.group_size)):
        try:
            # inside: the report carries the error of an installation without torch
            from megatron_sov.operate.slurm import preflight_run

            inspect()
        except Exception as e:  # a sick node can raise any type; the report carries the error
            report.error = report.error or format_error(e)
        # after each inspection: a hang in the second keeps the results of the first
        write_atomically(file, format_json(asdict(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
