"""Options of `sov-data run`."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from data_prep.curate.pipeline.step import READY, STEPS
from megatron_sov.base.settings import AtLeastOne, DeclaredCommand, Flag, count_cores
from megatron_sov.work.submit.cluster_options import ClusterOptions


@dataclass(frozen=True, kw_only=True)
class DataRunOptions(ClusterOptions):
    """Run a pipeline file: parse raw documents, filter, deduplicate, score and sort them.

    A killed command continues at the first unfinished shard if you run it again. A changed setting repeats
    the steps that depend on it, and nothing else."""

    pipeline: Annotated[Path, Flag("PIPELINE.yaml")]
    """The pipeline file."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder of the run."""
    workers: AtLeastOne = field(default_factory=count_cores)
    """Processes; the output does not depend on it (default: this machine's cores)."""
    dry_run: bool = False
    """Print finished and open work; write nothing."""


class _RunCommand(DeclaredCommand):
    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.epilog = (f"Ready pipelines to copy: {READY}/*.yaml. Steps that a file may name: "
                         f"{', '.join(STEPS)}. docs/data_pipeline.md describes the file.")


RUN = _RunCommand(DataRunOptions, run_function="data_prep.curate.pipeline.running:run_from_options",
                  runs_in_checks=True)
