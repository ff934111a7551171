"""`megatron-sov prefer RECIPE --from CHECKPOINT --data PAIRS[:weight] ... --run DIR --method dpo`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, get_args

from megatron_sov.config.preference import WITH_REFERENCE, PreferenceMethod
from megatron_sov.train.stage_config import add_stage_arguments, parse_stage

if TYPE_CHECKING:
    from megatron_sov.train.gate import GateView


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_stage_arguments(parser, needs_start=True)
    parser.add_argument("--method", choices=get_args(PreferenceMethod),
                        help="the loss (--set preference.method=...; default dpo)")


def run(args: argparse.Namespace) -> int:
    """Learn from preferences; returns 0 when the run is complete."""
    if args.method is not None:
        args.settings = [*args.settings, f"preference.method={args.method}"]
    parsed = parse_stage(args, "preference")
    assert parsed.start is not None, f"--from is required, it is {args.start_from}"

    from megatron_sov.data.token_shards import open_sources
    from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    from megatron_sov.post.preference import objective_of
    from megatron_sov.post.ranking import rank_heldout_pairs
    from megatron_sov.post.reference import Reference
    from megatron_sov.runs import checkpoints
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.stage import Stage, run_stage

    config, asked = parsed.config, parsed.config.preference
    objective = objective_of(config)
    sources = tuple(open_sources(config.data.paths, config.model.vocab_size, objective.formats))
    pairs = [s for s in sources if s.format == "preference"]
    reference = (Reference(args.run, parsed.start, sources, config.data.max_seq_len())
                 if asked.method in WITH_REFERENCE else None)
    if reference is not None and checkpoints.latest(RunFolder(args.run).checkpoints) is not None:
        reference.refuse_changed()

    def before(view: GateView) -> None:
        if reference is not None:
            reference.make(view)
        rank_heldout_pairs(view, pairs)

    def after(view: GateView) -> dict[str, Any]:
        return {"heldout_pairs": rank_heldout_pairs(view, pairs)}

    run_stage(Stage(config, RunFolder(args.run), objective, parsed.start, args.resume,
                    sources if reference is None else reference.sources, before=before, after=after,
                    faults=parsed.faults), args.nproc, args.began_s)
    return 0
