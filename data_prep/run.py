"""`sov-data run`: a pipeline file from raw documents to the sources of a curriculum."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from data_prep.libraries import require
from data_prep.pipeline.known_steps import STEPS
from data_prep.pipelines import READY
from megatron_sov.errors import UserError

DESCRIPTION = """Run a pipeline file: parse raw documents, filter, deduplicate, score and sort them. A killed
command continues at the first unfinished shard when it is run again; a changed setting redoes what depends on
it, and nothing else."""
EPILOG = f"""Ready pipelines to copy: {READY}/*.yaml. Steps that a file may name: {", ".join(STEPS)}. What
stands in a file: docs/data_pipeline.md."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.add_argument("pipeline", type=Path, metavar="PIPELINE.yaml", help="the pipeline file")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the run")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
                        help="processes; the output does not depend on it (default: this machine's cores)")
    parser.add_argument("--cluster", default="", metavar="PROFILE",
                        help="submit the run to Slurm: a cluster profile that comes with the package, or a "
                             "YAML file of your own")
    parser.add_argument("--account", metavar="NAME", help="Slurm account, where the profile names none")
    parser.add_argument("--partition", metavar="NAME", help="Slurm partition, in place of the profile's")
    parser.add_argument("--dry-run", action="store_true",
                        help="print what would be done, and what is done already; nothing is written")


def run(args: argparse.Namespace) -> int:
    """Run `sov-data run`; returns 0."""
    from data_prep.pipeline.dry_run import describe
    from data_prep.pipeline.inputs import is_much, told, unknown_inputs
    from data_prep.pipeline.pipeline_file import load_pipeline
    from data_prep.pipeline.plan import make_plan
    from data_prep.pipeline.running import check_folder, refuse_inside_sources, run_pipeline

    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")
    if not args.cluster and (args.account or args.partition):
        raise UserError("--account, --partition: belong to --cluster; pass it too, or leave them out")
    pipeline = load_pipeline(args.pipeline)
    check_folder(args.output)
    refuse_inside_sources(pipeline, args.output)
    if args.dry_run:
        if is_much(unknown := unknown_inputs(pipeline, args.output)):
            print(f"{pipeline.name}: the contents of {told(unknown)} are not known yet; the run reads them "
                  "first (with --cluster by jobs), and this tells the steps when it has")
            return 0
        print(describe(make_plan(pipeline, args.output, keep=False), args.output))
        return 0
    if problems := require("sov-data run", "datatrove"):
        raise UserError(problems[0])
    if args.cluster:
        from data_prep.pipeline.slurm_engine import submit_pipeline

        submit_pipeline(pipeline, args.output, args.cluster, account=args.account, partition=args.partition)
        return 0
    (args.output / "inputs").mkdir(parents=True, exist_ok=True)
    plan = make_plan(pipeline, args.output)
    for sentence in plan.told():
        print(sentence)
    run_pipeline(plan, args.output, args.workers)
    return 0
