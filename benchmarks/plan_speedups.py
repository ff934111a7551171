"""What each offered speed-up is worth by account, on the machines of two reports, and what is published.

Usage: python benchmarks/plan_speedups.py [RECIPE ...] > benchmarks/results/plan_speedups.txt

Settings are added one after the other, and the fastest layout that fits is looked for each time; in front
stands what a run gets that says nothing, or that HybridEP is not there, and the load.  Nothing ran
on a GPU: figures are those of `megatron-sov plan`, whose parameters were fitted to published runs and not to
these models.  What overlap is worth in the account stands beside a published pair of runs with and without.
"""

from __future__ import annotations

import csv
import os
import sys
import time
from pathlib import Path

from megatron_sov import recipes
from megatron_sov.model.config import apply_settings
from megatron_sov.plan.pages.quote import QuoteTable, text
from megatron_sov.plan.pages.telling import name
from megatron_sov.plan.pricing import machines, pricing, run_stages
from megatron_sov.plan.search.recommended import settings_for
from megatron_sov.plan.search.space import own_choice
from megatron_sov.plan.search.sweep import search
from megatron_sov.plan.speed.step import StepTime, step_time
from megatron_sov.plan.tables.predicted import workload_of
from megatron_sov.work.clusters.units import GIB

OVERLAP = "parallel.expert_overlap=micro_batches"
SPEEDUPS: tuple[tuple[str, list[str]], ...] = (
    ("8 bits", ["train.fp8={fp8}"]),
    ("weights in 8 bits", ["train.fp8_weights=true"]),
    ("bf16 gradients", ["gpu.grad_dtype=bf16"]),
    ("experts' messages hidden", [OVERLAP]),
    ("HybridEP in a node", ["parallel.expert_dispatcher=hybridep", "parallel.ep=8"]),
    ("HybridEP at any size", []),
)
"""What is added, in this order, to the fastest layout in bf16 with alltoall and float32 gradients."""
RUNS = (("solar-open-102b", "b200", 60, "mxfp8"), ("k-exaone-236b", "h100", 64, "blockwise"))
"""Recipe, profile, nodes, 8-bit products; the recipes' own are blockwise."""
PUBLISHED = (
    "published, forced balance: DeepSeek-V3 on 256 B200, pp 8, vpp 2, ep 32, DeepEP, overlap, delayed weight "
    "gradients, TE graphs, MXFP8: 864 TFLOP/s, 38 % of bf16's peak; without them 732 (Megatron-Bridge "
    "26.04.01 and 26.04); Qwen3-235B on 256 GB200, MXFP8: 1,077 TFLOP/s, 43 % (26.08); Qwen3-235B on H100, "
    "FP8: 253 TFLOP/s, 26 %")
ROWS = Path(__file__).parent / "data/throughput.csv"
PAIR = "nemo-mbridge-perf-expert-parallel-overlap"
"""In the sources of the published pair's rows."""


def row(what: str, layout: str, needs_bytes: float, step: StepTime) -> list[str]:
    """Return a line of a table."""
    return [what, layout, f"{needs_bytes / GIB:.1f}", f"{step.total_s:.2f} s",
            f"{step.tokens_per_s_per_gpu:,.0f}", f"{step.tflops_per_gpu:,.0f}", f"{step.mfu:.1%}",
            f"{step.ep_s / step.total_s:.0%}", f"{step.bubble_s / step.total_s:.0%}"]


def run(recipe: str, cluster: str, nodes: int, fp8: str) -> None:
    """Print a recipe's table."""
    where = machines(cluster, nodes)
    of = pricing(where)
    assert of is not None
    told = recipes.get(recipe)
    base = apply_settings(told, ["train.fp8=none"])

    def as_recommended(what: str, settings: list[str]) -> list[str]:
        said = apply_settings(told, settings)
        layout = settings_for(said, where.num_ranks, where.profile.gpu, settings)
        config = apply_settings(said, list(layout))
        if config.problems(of.num_ranks):
            return [what, f"{name(own_choice(config))}: breaks a rule", *[""] * 7]
        stage = run_stages(config, of.num_ranks, micro_batch_set=True)[0]
        return row(what, name(own_choice(stage.config)), of.needs(stage), of.step(stage))

    rows = [as_recommended("recommended", []),
            as_recommended("recommended, alltoall", ["parallel.expert_dispatcher=alltoall"])]
    settings: list[str] = []
    took_s: list[float] = []
    for what, added in (("bf16, fastest layout", []), *SPEEDUPS):
        settings += [setting.format(fp8=fp8) for setting in added]
        fixed = ["parallel.expert_overlap", *(["parallel.ep"] if what.endswith("in a node") else [])]
        began = time.perf_counter()
        found = search(apply_settings(base, settings), of, fixed)
        took_s.append(time.perf_counter() - began)
        said = f"+ {what}" if settings else what
        if not found.best:
            rows.append([said, "fits nowhere", *[""] * 7])
            continue
        best = found.best[0]
        stage = found.sweeps[0].stage.with_config(best.choice.of(found.sweeps[0].stage.config))
        rows.append(row(said, name(best.choice), best.needs_bytes, of.step(stage)))
    rows.append(as_recommended("recommended, with all of these",
                               [s for s in settings if not s.startswith("parallel.")]))
    print(text(QuoteTable(
        f"{recipe} on {nodes} x {where.profile.gpus_per_node} {of.chip.name}, phase 1, routers as they are",
        ["setting", "layout", "GiB", "step", "tokens/s/GPU", "TFLOP/s", "MFU", "exchange", "bubble"], rows)))
    print(f"a search took {min(took_s):.0f} to {max(took_s):.0f} s\n", flush=True)


def pair() -> None:
    """Print what the account says of the published runs with and without overlap."""
    with ROWS.open(encoding="utf-8") as f:
        found = [r for r in csv.DictReader(f) if PAIR in r["source_ref"] and "search run" not in r["other"]]
    (before, after) = ((float(r["step_time_s"]), step_time(workload_of(r)).total_s) for r in found)
    print("Qwen3-30B-A3B on 16 H100, ep 16, HybridEP, without and with expert messages behind computation "
          "(Megatron-Bridge, skills):")
    print(f"  measured {before[0]:.2f} -> {after[0]:.2f} s, {after[0] / before[0] - 1:+.1%}; by account "
          f"{before[1]:.2f} -> {after[1]:.2f} s, {after[1] / before[1] - 1:+.1%}")


def main() -> None:
    """Print everything."""
    print(f"load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores\n", flush=True)
    for one in RUNS:
        if not sys.argv[1:] or one[0] in sys.argv[1:]:
            run(*one)
    print(PUBLISHED, "\n")
    pair()


if __name__ == "__main__":
    main()
