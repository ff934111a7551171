"""`megatron-sov pretrain | extend | sft RECIPE [--from CHECKPOINT] --data DIR[:weight] ... --run DIR`."""

from __future__ import annotations

import argparse
import contextlib

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import build_command, read_options
from megatron_sov.commands.train.gate_options import (
    TunedOptions, gate_of, is_complete, refuse_unknown_benchmarks)
from megatron_sov.commands.train.setup.stage_options import (
    StageOptions, find_start, parse_stage, refuse_many_converters, stage_request)
from megatron_sov.model.objectives import get_factory
from megatron_sov.runs.folder import STAGES
from megatron_sov.runs.launch_environment import num_ranks
from megatron_sov.train.guards.fault_injection import parse_faults
from megatron_sov.train.stages.shared_copies import convert_start


def run_pretrain(typed: argparse.Namespace) -> int:
    """Train by language modelling, or an objective of your own; returns 0 when the run is complete."""
    args = read_options(StageOptions, typed)
    if is_complete(args, "lm"):
        return 0
    parsed = parse_stage(args, "lm")
    refuse_unknown_benchmarks(parsed.config)
    if not args.dry_run:
        parsed = parsed.with_checkpoint(args.run)

    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.objectives.data_objective import LanguageModelling
    from megatron_sov.train.stages.stage import Stage, run_stage

    objective = get_factory(parsed.config, LanguageModelling)
    stage = Stage(parsed.config, RunFolder(args.run), objective, parsed.start, args.resume,
                  faults=parsed.faults, until=args.until, dry_run=args.dry_run, notes=parsed.notes)
    run_stage(stage, args.nproc)
    return 0


PRETRAIN = build_command(StageOptions, run_pretrain)


def run_extend(typed: argparse.Namespace) -> int:
    """Train on at longer contexts, stage by stage; returns 0 when the last one is complete.

    Every stage's settings, data and folder are checked before a Hugging Face folder is converted and
    the first one starts.
    """
    args = read_options(TunedOptions, typed)
    if args.until is not None:
        raise UserError(f"--until {args.until}: each of the stages counts its own steps; leave it out, and "
                        "stop the command by Ctrl-C or SIGTERM")
    request = stage_request(args, "lm", lengthens=True)
    faults = parse_faults(args.inject, num_ranks(args.nproc))

    from megatron_sov.commands.train.setup.feasibility import refuse_unfit
    from megatron_sov.post.extend.stages import plan_stages
    from megatron_sov.train.objectives.data_objective import LanguageModelling
    from megatron_sov.train.objectives.objective import get_formats

    # all stages are planned before the first one starts
    stages = plan_stages(request, args.start_from, args.run, args.nproc,
                            lambda config: get_formats(get_factory(config, LanguageModelling)))
    refuse_unknown_benchmarks(stages[-1].config)
    for stage in stages:
        stage.config.check(num_ranks(args.nproc))
        refuse_unfit(request, stage.config, None, args.nproc, is_initial=False, dry_run=args.dry_run)
        stage.folder.enter(stage.config, args.resume)
    start = find_start(args.start_from)
    refuse_many_converters(start, args.run)
    if not args.dry_run:
        # only after every stage has been checked: a conversion takes long
        start = convert_start(start, args.run)
    gate = gate_of(args, stages[-1].config, start)
    from megatron_sov.post.extend.running import run_stages

    try:
        run_stages(stages, start, get_factory(stages[-1].config, LanguageModelling), args.nproc, args.resume,
                   faults, gate, dry_run=args.dry_run)
    finally:
        for folder in () if args.dry_run else (args.run / STAGES, args.run):
            with contextlib.suppress(OSError):  # not empty: a stage has begun
                folder.rmdir()
    return 0


EXTEND = build_command(TunedOptions, run_extend)


def run_sft(typed: argparse.Namespace) -> int:
    """Fine-tune on conversations; returns 0 when the run is complete."""
    args = read_options(TunedOptions, typed)
    if is_complete(args, "sft"):
        return 0
    parsed = parse_stage(args, "sft")
    refuse_unknown_benchmarks(parsed.config)
    if not args.dry_run:
        parsed = parsed.with_checkpoint(args.run)
    gate = gate_of(args, parsed.config, parsed.start)

    from megatron_sov.post.sft import SupervisedFineTuning
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.data.token_shards import open_sources
    from megatron_sov.train.objectives.objective import get_formats
    from megatron_sov.train.stages.stage import Stage, run_stage

    objective = get_factory(parsed.config, SupervisedFineTuning)
    sources = open_sources(parsed.config.data.paths, parsed.config.model.vocab_size, get_formats(objective))
    stage = Stage(parsed.config, RunFolder(args.run), objective, parsed.start, args.resume,
                  tuple(sources), end_gate=gate, faults=parsed.faults, until=args.until,
                  dry_run=args.dry_run, notes=parsed.notes)
    run_stage(stage, args.nproc)
    return 0


SFT = build_command(TunedOptions, run_sft)
