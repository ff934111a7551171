"""`megatron-sov plan RECIPE [--set key=value ...] [--nproc N] [--json] [--html FILE]`:
a run step by step, before it runs."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from megatron_sov.recipes.requested import add_recipe_arguments, requested


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megatron-sov plan`."""
    add_recipe_arguments(parser)
    parser.add_argument("--nproc", type=int, default=None, metavar="N",
                        help="check the settings for so many processes (default: as few as the layout needs)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--html", type=Path, metavar="FILE",
                        help="write the charts into this self-contained page as well")


def run(args: argparse.Namespace) -> int:
    """Print the schedule: learning rate, batch size, tokens and blend.

    Raises:
        UserError: an unknown recipe or setting, or settings that make no schedule.
    """
    from megatron_sov.artifacts import to_json, write_output
    from megatron_sov.outputs import check_output
    from megatron_sov.pages.content import Chapter, Section
    from megatron_sov.pages.page import render
    from megatron_sov.plan import timetable

    config = requested(args).config()
    config.check(args.nproc
                 or math.lcm(config.parallel.ranks_per_replica, config.parallel.ranks_per_expert_replica))
    if args.html is not None:
        check_output("--html", args.html)
        section = Section("Schedule", charts=timetable.charts(config), tables=[timetable.table(config)],
                          side_by_side=True)
        page = render("plan", config.recipe, "", [Chapter(config.recipe, "", [], [section])])
        write_output(args.html, page)
    print(to_json(timetable.as_json(config)) if args.json else timetable.as_text(config))
    if args.html is not None:
        print(f"wrote {args.html}", file=sys.stderr)
    return 0
