"""The layouts that a search chooses for large models from 4K to 262,144 tokens, why, and what is published.

Usage: python benchmarks/plan_sweep.py [PART ...] > benchmarks/results/plan_sweep.txt

Parts are times, RECIPE@PROFILE (k-exaone-236b@h100) and lengths; without any it is all of them.

Each recipe is searched on its machines as it stands; then pretraining's model at one length after the
other, with as many tokens in a step.  Nothing runs on a GPU: figures are those of `megatron-sov plan`.
Seconds are those of whole processes on this machine, which may do other work: CPU seconds stand beside.
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence

from megatron_sov import recipes
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.plan.pages.quote import QuoteTable, component, text, totals
from megatron_sov.plan.pages.telling import PlanText, name, set_line, submit_line
from megatron_sov.plan.pricing import Machines, Pricing, machines, pricing, quote, run_stages
from megatron_sov.plan.search.recommended import settings_for
from megatron_sov.plan.search.space import own_choice
from megatron_sov.plan.search.sweep import SweepSearch, search
from megatron_sov.work.clusters.units import GIB

RUNS = (("solar-open-102b", "b200", 60), ("solar-open-102b-mid", "b200", 60),
        ("solar-open-102b-extend", "b200", 60), ("k-exaone-236b", "h100", 64),
        ("k-exaone-236b-extend", "h100", 64), ("k-exaone-236b", "b200", 64),
        ("k-exaone-236b-extend", "b200", 64))
LENGTHS = (4096, 32768, 262144)
LADDERS = (("solar-open-102b", "b200", 60, 15 << 21), ("k-exaone-236b", "h100", 64, 1 << 25),
           ("k-exaone-236b", "b200", 64, 1 << 25))
"""Recipe, profile, nodes, tokens of a step: 31.5 M divide among 480 GPUs, 33.6 M among 512."""
PUBLISHED = {
    "solar-open-102b": "published: 7,200 tokens/s/GPU on 480 B200 in FP8 at 4K, torchtitan with HSDP; the "
                       "rungs before it 4,000 (bf16; 3,200 on H200), 4,800 (expert exchange), 5,400 (HSDP), "
                       "6,167 (router's dtype), 6,200, 6,900 (compile + FP8) (arXiv 2601.07022)",
    "k-exaone-236b": "published: 11 T tokens, 1.52e24 FLOPs, FP8; no speed and no number of GPUs "
                     "(arXiv 2601.01739)"}


def searched(config: RunConfig, where: Machines, settings: Sequence[str] = ()) -> PlanText | SweepSearch:
    """Return the search of a run; without what is said of it where nothing fits."""
    of = pricing(where)
    assert of is not None
    found = search(config, of)
    if not found.best:
        return found
    chosen = found.best[0].choice.settings(config)
    open_layout = apply_settings(config, list(settings_for(config, where.num_ranks, where.profile.gpu)))
    return PlanText(found, where, own_choice(open_layout), chosen,
                    submit_line(config, where, [config.recipe], [*settings, *chosen]))


def of_recipe(recipe: str, cluster: str, nodes: int) -> None:
    """Print the search of a recipe as it stands, and what its winner takes."""
    where, config = machines(cluster, nodes), recipes.get(recipe)
    began_s = time.process_time()
    told = searched(config, where)
    assert isinstance(told, PlanText), recipe
    of = pricing(where)
    assert of is not None
    best = apply_settings(config, told.settings)
    quotes = [quote(stage, of) for stage in run_stages(best, of.num_ranks, micro_batch_set=True)]
    print(f"== {recipe} on {nodes} x {where.profile.gpus_per_node} {of.chip.name} "
          f"({time.process_time() - began_s:.1f} CPU s)\n")
    print(text(told.table()), *told.lines(), f"settings: {set_line(told.settings)}",
          f"submit: {told.submit}", sep="\n")
    if recipe in PUBLISHED:
        print(PUBLISHED[recipe])
    rows = [[q.name, f"{q.seq_len:,}", f"{q.tokens_per_s_per_gpu:,.0f}", f"{q.mfu:.1%}", f"{q.days:,.1f}",
             f"{q.effective_share:.1%}", f"${q.cost_usd / 1e6:,.2f} M"] for q in quotes]
    t = totals(quotes)
    rows.append(["total", "", "", "", f"{t.days:,.1f}", f"{t.effective_share:.1%}",
                 f"${t.cost_usd / 1e6:,.2f} M"])
    print()
    print(text(QuoteTable("The winner", ["stage", "context", "tokens/s/GPU", "MFU", "days",
                                         "effective training time", "cost"], rows)), "\n", flush=True)


def ladder(recipe: str, cluster: str, nodes: int, step_tokens: int) -> None:
    """Print the fastest layout at each length in bf16, and at the first one in FP8."""
    where, rows = machines(cluster, nodes), []
    eight_bits = "blockwise" if cluster == "h100" else "mxfp8"
    for fp8, seq_len in [*(("none", seq_len) for seq_len in LENGTHS), (eight_bits, LENGTHS[0])]:
        phase = f'[{{"name": "{seq_len}", "seq_len": {seq_len}, "tokens": {1000 * step_tokens}}}]'
        config = apply_settings(recipes.get(recipe), [
            f"data.phases={phase}", f"train.global_batch_size={step_tokens // seq_len}", f"train.fp8={fp8}",
            f"model.max_position_tokens={max(seq_len, recipes.get(recipe).model.max_position_tokens)}"])
        told = searched(config, where)
        row = [f"{seq_len:,}", "bf16" if fp8 == "none" else fp8]
        if isinstance(told, SweepSearch):
            rows.append([*row, "fits nowhere", "", "", "", ""])
            continue
        best, sweep = told.search.best[0], told.search.sweeps[0]
        of = pricing(where)
        assert of is not None
        step = of.step(sweep.stage.with_config(best.choice.of(sweep.stage.config)))
        part = max(best.by_component, key=lambda found: best.by_component[found])
        rows.append([*row, name(best.choice), f"{best.needs_bytes / GIB:.1f}",
                     f"{step.tokens_per_s_per_gpu:,.0f}", f"{step.mfu:.1%}",
                     f"{component(part)} {best.by_component[part] / best.seconds:.0%}"])
    of_chip = pricing(where)
    assert isinstance(of_chip, Pricing)
    print(text(QuoteTable(
        f"{recipe}'s model on {nodes} x {where.profile.gpus_per_node} {of_chip.chip.name}, "
        f"{step_tokens / 1e6:.1f} M tokens a step, fastest layout at each length",
        ["context", "products", "layout", "GiB", "tokens/s/GPU", "MFU", "largest part"], rows)), "\n",
        flush=True)


def whole_process(*words: str) -> None:
    """Print the seconds of a command as a process of its own."""
    before, began_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "megatron_sov", *words], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{time.perf_counter() - began_s:6.1f} s, {cpu_s:5.1f} CPU s: megatron-sov {' '.join(words)}",
          flush=True)


def main() -> None:
    """Print everything."""
    print(f"{platform.machine()}, {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f} at the start), "
          f"Python {platform.python_version()}\n")
    asked = sys.argv[1:]
    if not asked or "times" in asked:
        print("Whole processes:")
        for words in (("solar-open-102b", "--cluster", "b200", "--nodes", "60"),
                      ("solar-open-102b", "--cluster", "b200", "--nodes", "60", "--sweep"),
                      ("k-exaone-236b", "--cluster", "h100", "--nodes", "64", "--sweep"),
                      ("k-exaone-236b-extend", "--cluster", "b200", "--nodes", "64", "--sweep")):
            whole_process("plan", *words)
        print()
    for recipe, cluster, nodes in RUNS:
        if not asked or f"{recipe}@{cluster}" in asked:
            of_recipe(recipe, cluster, nodes)
    for rungs in LADDERS if not asked or "lengths" in asked else ():
        ladder(*rungs)


if __name__ == "__main__":
    main()
