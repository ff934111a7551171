"""`megatron-sov sft RECIPE --from CHECKPOINT --data CHATS[:weight] [--data TEXT[:weight]] --run DIR`."""

from __future__ import annotations

import argparse
from functools import partial
from types import SimpleNamespace

from megatron_sov.base.settings import add_options, read_options
from megatron_sov.commands.evaluate.benchmarks_beside import refuse_unknown_benchmarks
from megatron_sov.commands.train.forgetting_gate import TunedOptions, gate_of
from megatron_sov.train.stages.stage_config import parse_stage


def run_sft(typed: argparse.Namespace) -> int:
    """Fine-tune on conversations; returns 0 when the run is complete."""
    args = read_options(TunedOptions, typed)
    parsed = parse_stage(args, "sft")
    refuse_unknown_benchmarks(parsed.config)
    if not args.dry_run:
        parsed = parsed.with_checkpoint(args.run)
    gate = gate_of(args, parsed.config, parsed.start)

    from megatron_sov.engine.data.token_shards import open_sources
    from megatron_sov.engine.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    from megatron_sov.post.sft import SupervisedFineTuning, check_sources
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.stages.stage import Stage, run_stage

    sources = open_sources(parsed.config.data.paths, parsed.config.model.vocab_size)
    check_sources(parsed.config, sources)
    stage = Stage(parsed.config, RunFolder(args.run), SupervisedFineTuning, parsed.start, args.resume,
                  tuple(sources), end_gate=gate, faults=parsed.faults, dry_run=args.dry_run)
    run_stage(stage, args.nproc, typed.began_s)
    return 0


SFT = SimpleNamespace(add_arguments=partial(add_options, cls=TunedOptions), run=run_sft)
