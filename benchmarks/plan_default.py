"""The layout that `megatron-sov plan` chooses by default, against a full sweep that leaves as much memory.

Usage: python benchmarks/plan_default.py [RECIPE ...] > benchmarks/results/plan_default.txt

For each recipe on 64 and 512 H100: the predicted days with the layout of the local search, with the fastest
layout of the sweep (same kernels) that leaves 10 % of the memory that a run may take, and with the recipe's
own layout, and the processor seconds of both searches.  Nothing runs on a GPU.  Ends with 1 if a choice is
more than 5 % slower than the sweep's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from megatron_sov import recipes
from megatron_sov.base.figures import format_days, format_share
from megatron_sov.plan.pages.quote import QuoteTable, text
from megatron_sov.plan.pricing import machines, pricing
from megatron_sov.plan.search.default import SPARE_SHARE, LocalSearch, find_layout
from megatron_sov.plan.search.sweep import search

RECIPES = ("solar-open-102b", "solar-open-102b-extend", "solar-open2-250b", "k-exaone-236b",
           "k-exaone-236b-extend", "hyperclova-omni-8b", "qwen3-8b", "qwen3-moe-30b", "llama-3.1-8b",
           "deepseek-v3")
NODES = (8, 64)
LARGEST_GAP = 0.05


def compare(recipe: str, nodes: int) -> tuple[list[str], float]:
    """Return the table row of a recipe, and by which share the default is slower than the sweep's best."""
    config, where = recipes.get(recipe), machines("h100", nodes)
    prices = pricing(where)
    assert prices is not None
    began_s = time.process_time()
    default = find_layout(config, where)
    default_s = time.process_time() - began_s
    began_s = time.process_time()
    swept = search(LocalSearch(config, prices, ()).config, prices)
    sweep_s = time.process_time() - began_s
    limit_bytes = (1 - SPARE_SHARE) * prices.limit_bytes
    roomy = [found for found in swept.best if found.needs_bytes <= limit_bytes] or swept.best
    row = [recipe, str(where.num_ranks)]
    if default is None or not roomy:
        same = default is None and not roomy
        gap = 0.0 if same else 1.0
        return [*row, "fits nowhere", "fits nowhere" if same else "differs", "", "", "", ""], gap
    gap = default.seconds / roomy[0].seconds - 1
    return [*row, format_days(default.seconds), format_days(roomy[0].seconds), f"{gap:+.1%}",
            format_share(default.spare_share), format_days(default.own_seconds) if default.own_seconds < 1e18
            else "does not fit", f"{default_s:.1f} s, {sweep_s:.1f} s"], gap


def main(names: Sequence[str]) -> int:
    rows, gaps = [], []
    for recipe in names or RECIPES:
        for nodes in NODES:
            row, gap = compare(recipe, nodes)
            rows.append(row)
            gaps.append(gap)
            print(*row, sep="  ", file=sys.stderr, flush=True)
    print(text(QuoteTable("Default layout and full sweep", [
        "recipe", "H100", "default", "sweep", "slower", "memory left", "recipe's own",
        "search, sweep (CPU)"], rows)))
    print(f"\nlargest gap: {max(gaps):+.1%}, at most {LARGEST_GAP:.0%} wanted")
    return int(max(gaps) > LARGEST_GAP)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
