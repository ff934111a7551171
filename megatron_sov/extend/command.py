"""`megatron-sov extend RECIPE --from CHECKPOINT --data DIR[:weight] ... --run DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sov import recipes
from megatron_sov.mcore.ranks import num_ranks
from megatron_sov.recipes.extension import length_settings, phase_setting
from megatron_sov.train.arguments import add_stage_arguments, resolve_start, stage_config

if TYPE_CHECKING:
    from megatron_sov.config import RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_stage_arguments(parser, needs_start=True)


def run(args: argparse.Namespace) -> int:
    """Train on at a longer context and score needle retrieval before and after; returns 0 when the run is complete."""
    stage_config(args, None)
    start = resolve_start(args.start_from, args.run)
    assert start is not None, f"--from is required, it is {args.start_from}"
    config = extension_config(args, start)
    config.check(num_ranks(args.nproc))

    from megatron_sov.extend.needles import make_needles, with_needles_in_blends
    from megatron_sov.train.lm import LanguageModelling
    from megatron_sov.train.run_folder import RunFolder
    from megatron_sov.train.stage import Stage, run_stage

    needles = make_needles(config, start)
    run_stage(Stage(with_needles_in_blends(config), RunFolder(args.run), LanguageModelling, start, args.resume,
                    extra_sources=needles.sources, before=needles.before, after=needles.after), args.nproc)
    return 0


def extension_config(args: argparse.Namespace, start: Path) -> RunConfig:
    """Return the resolved settings: recipe, checkpoint's architecture, what a longer context needs, then --set.

    The context is twice the longest that the checkpoint was trained on, unless --set gives other phases.
    """
    from megatron_sov.generate.target import Target

    made = Target(start, False)
    trained_tokens = made.trained_tokens if made.config is not None else made.model.max_position_tokens
    phase = phase_setting(trained_tokens)
    first = stage_config(args, start, defaults=(phase,))
    new_tokens = max(p.seq_len for p in first.data.phases)
    replicas = num_ranks(args.nproc) // max(1, first.parallel.ranks_per_replica)
    per_rank = first.train.global_batch_size // max(1, replicas)
    longer = length_settings(recipes.get(args.recipe), made.model, trained_tokens, new_tokens, max(1, per_rank))
    return stage_config(args, start, defaults=(phase, *longer))
