"""`megatron-sov pretrain RECIPE --data DIR[:weight] ... --run DIR`."""

from __future__ import annotations

import argparse

from megatron_sov.runs.launch_environment import num_ranks
from megatron_sov.train.guards.fault_injection import parse
from megatron_sov.train.stage_config import add_stage_arguments, resolve_start, stage_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_stage_arguments(parser, needs_start=False)


def run(args: argparse.Namespace) -> int:
    """Train by language modelling; returns 0 when the run is complete."""
    stage_config(args, None)
    start = resolve_start(args.start_from, args.run)
    config = stage_config(args, start)
    config.check(num_ranks(args.nproc))
    faults = parse(args.inject, num_ranks(args.nproc))

    from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.lm import LanguageModelling
    from megatron_sov.train.stage import Stage, run_stage

    stage = Stage(config, RunFolder(args.run), LanguageModelling, start, args.resume, faults=faults)
    run_stage(stage, args.nproc, args.began_s)
    return 0
