"""`sov-data run`: a pipeline file from raw documents to the sources of a curriculum."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from data_prep.curate.pipeline.step import STEPS
from data_prep.curate.pipelines import READY
from megatron_sov.base.settings import AtLeastOne, Flag, add_options, count_cores, read_options
from megatron_sov.work.submit.cluster_options import ClusterOptions

DESCRIPTION = """Run a pipeline file: parse raw documents, filter, deduplicate, score and sort them. A killed
command continues at the first unfinished shard when it is run again; a changed setting redoes what depends on
it, and nothing else."""
EPILOG = f"""Ready pipelines to copy: {READY}/*.yaml. Steps that a file may name: {", ".join(STEPS)}. What
stands in a file: docs/data_pipeline.md."""


@dataclass(frozen=True, kw_only=True)
class DataRunOptions(ClusterOptions):
    """Run a pipeline file over documents."""

    pipeline: Annotated[Path, Flag("PIPELINE.yaml")]
    """The pipeline file."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder of the run."""
    workers: AtLeastOne = field(default_factory=count_cores)
    """Processes; the output does not depend on it (default: this machine's cores)."""
    dry_run: bool = False
    """Print what would be done, and what is done already; nothing is written."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    add_options(parser, DataRunOptions)


def run(typed: argparse.Namespace) -> int:
    args = read_options(DataRunOptions, typed)
    from data_prep.curate.pipeline.pipeline_file import load_pipeline
    from data_prep.curate.pipeline.plan import make_plan
    from data_prep.curate.pipeline.running import (
        check_outside_sources, check_run_folder, describe_plan, run_pipeline, submit_pipeline)

    pipeline = load_pipeline(args.pipeline)
    check_run_folder(args.output)
    check_outside_sources(pipeline, args.output)
    if args.dry_run:
        print(describe_plan(make_plan(pipeline, args.output, keep=False), args.output))
        return 0
    if args.cluster:
        submit_pipeline(pipeline, args.output, args)
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    plan = make_plan(pipeline, args.output)
    for sentence in plan.list_passed_over():
        print(sentence)
    run_pipeline(plan, args.output, args.workers)
    return 0
