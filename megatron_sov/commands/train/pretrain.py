"""`megatron-sov pretrain RECIPE --data DIR[:weight] ... --run DIR`."""

from __future__ import annotations

import argparse
from functools import partial
from types import SimpleNamespace

from megatron_sov.base.settings import add_options, read_options
from megatron_sov.commands.evaluate.benchmarks_beside import refuse_unknown_benchmarks
from megatron_sov.model.objectives import factory
from megatron_sov.train.stages.stage_config import StageOptions, parse_stage


def run_pretrain(typed: argparse.Namespace) -> int:
    """Train by language modelling, or an objective of your own; returns 0 when the run is complete."""
    args = read_options(StageOptions, typed)
    parsed = parse_stage(args, "lm")
    refuse_unknown_benchmarks(parsed.config)
    if not args.dry_run:
        parsed = parsed.with_checkpoint(args.run)

    from megatron_sov.engine.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.objectives.lm import LanguageModelling
    from megatron_sov.train.stages.stage import Stage, run_stage

    objective = factory(parsed.config, LanguageModelling)
    stage = Stage(parsed.config, RunFolder(args.run), objective, parsed.start, args.resume,
                  faults=parsed.faults, dry_run=args.dry_run)
    run_stage(stage, args.nproc, typed.began_s)
    return 0


PRETRAIN = SimpleNamespace(add_arguments=partial(add_options, cls=StageOptions), run=run_pretrain)
