"""`megatron-sov sft RECIPE --from CHECKPOINT --data CHATS[:weight] [--data TEXT[:weight]] --run DIR`."""

from __future__ import annotations

import argparse

from megatron_sov.runs.launch_environment import num_ranks
from megatron_sov.train.guards.fault_injection import parse
from megatron_sov.train.stage_config import add_stage_arguments, resolve_start, stage_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_stage_arguments(parser, needs_start=True)


def run(args: argparse.Namespace) -> int:
    """Fine-tune on conversations; returns 0 when the run is complete."""
    stage_config(args, None, objective="sft")
    start = resolve_start(args.start_from, args.run)
    config = stage_config(args, start, objective="sft")
    config.check(num_ranks(args.nproc))
    faults = parse(args.inject, num_ranks(args.nproc))

    from megatron_sov.data.token_shards import open_sources
    from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    from megatron_sov.post.sft import SupervisedFineTuning, check_sources
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.stage import Stage, run_stage

    sources = open_sources(config.data.paths, config.model.vocab_size)
    check_sources(config, sources)
    stage = Stage(config, RunFolder(args.run), SupervisedFineTuning, start, args.resume, tuple(sources), faults=faults)
    run_stage(stage, args.nproc, args.began_s)
    return 0
