"""Post-training's prices beside published ones.

    python benchmarks/plan_post_training.py [--fit ROUNDS] > benchmarks/results/plan_post_training.txt

First the rounds of reinforcement learning that NeMo RL's pages publish (`benchmarks/data/rl_throughput.csv`)
where engines and trainer take turns on the same GPUs: seconds of a round, predicted and measured, and the
same for each model with the engine's costs fitted on the others alone.  Then the budgets that papers name.
With --fit the engine's costs are searched anew, in so many random steps, and printed;
`plan/post_training.py` has them.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from megatron_sov import recipes
from megatron_sov.model.config import apply_settings
from megatron_sov.plan.pages.quote import Quote, totals
from megatron_sov.plan.post_training import (
    DecodingRequest, DecodingRound, EngineCosts, Engines, quotes, round_of)
from megatron_sov.plan.pricing import Machines, Pricing, machines, pricing
from megatron_sov.plan.speed.parameters import default
from megatron_sov.plan.speed.workload import ModelShape, Workload, of_model
from megatron_sov.work.clusters.chips import chip, default_links

ROWS = Path(__file__).parent / "data" / "rl_throughput.csv"
SHAPES: dict[str, ModelShape] = {
    "LLAMA3.1_8B": of_model(recipes.get("llama-3.1-8b").model),
    "DeepSeek V3": of_model(recipes.get("deepseek-v3").model),
    "Qwen3-30B3A": of_model(recipes.get("qwen3-moe-30b").model),
    "Qwen3-32B": ModelShape(64, 5120, 64, 128, 8, 151_936, dense_ffn_dim=25_600),
    "Qwen3-235B": ModelShape(94, 4096, 64, 128, 4, 151_936, dense_ffn_dim=12_288, num_experts=128,
                             num_experts_per_token=8, expert_ffn_dim=1536)}
"""Model of a row -> its sizes."""
BUDGETS = (
    (("typhoon-s-8b", "typhoon-s-8b-opd"), "h100", 8, 8 * 48.0,
     "SFT and on-policy distillation: 8 H100, about 2 days (arXiv 2601.18129)"),
    (("typhoon-s-4b-legal",), "h100", 4, 4 * 24.0, "InK-GRPO: 4 H100, about 1 day (arXiv 2601.18129)"),
    (("typhoon-s-4b-legal-agent",), "h100", 4, 4 * 24.0,
     "agentic InK-GRPO: 4 H100, about 1 day (arXiv 2601.18129)"),
    (("vibethinker-1.5b", "vibethinker-1.5b-math-16k", "vibethinker-1.5b-math-32k", "vibethinker-1.5b-code"),
     "h800", 32, 3900.0,
     "all post-training: 3,900 H800 hours, 7,800 USD at 2 an hour (arXiv 2511.06221)"))
"""Recipes of a run, chip, GPUs (32 where the paper names no number), GPU-hours, and the paper's words."""
PROMPT_TOKENS, PER_PROMPT, FORWARD = 150, 32, 2
"""Of OpenMathInstruct-2's prompts with their template; responses to each; passes for the policy's and the
reference's log-probabilities (the recipes' defaults)."""
FITTED = {"step_s": 3e-2, "layer_s": 2e-4, "response_s": 2e-4, "message_s": 1e-4, "refit_bytes_per_s": 1e11,
          "round_s": 40.0}
"""Costs that are searched, with the largest value of each."""
VIBETHINKER = ("policy.mgpo_lambda=1.0", "policy.clip_low=0.2", "policy.clip_high=0.2")
"""Settings that its authors did not publish; no second depends on them."""
Row = dict[str, str]


def predicted(row: Row, costs: EngineCosts) -> DecodingRound:
    """Return the round of a row."""
    shape, on, gpus = SHAPES[row["model"]], chip(row["gpu"]), int(row["num_gpus"])
    fp8 = row["precision"] == "fp8"
    engines = Engines(shape, on, default_links(on), gpus, int(row["generation_tp"]), 1 if fp8 else 2, costs)
    longest = int(row["max_tokens"])
    asked = DecodingRequest(int(row["responses"]), PROMPT_TOKENS, float(row["mean_tokens"]) - PROMPT_TOKENS,
                            longest - PROMPT_TOKENS, PER_PROMPT)
    tp, imbalance = int(row["tp"]), default().real_imbalance if shape.num_experts else 1.0
    step = Workload(shape, on, default_links(on), gpus, longest, 1, int(row["train_batch"]), tp=tp, sp=tp > 1,
                    pp=int(row["pp"]), cp=int(row["cp"]), ep=int(row["ep"]), sharding="zero1",
                    recompute="full", imbalance=imbalance, precision="fp8" if fp8 else "bf16")
    return round_of(engines, asked, step, FORWARD, default())


def usable(row: Row) -> bool:
    """Return whether a row says all that is needed: episodes with tools wait for machines that nobody
    describes, DAPO's sampling throws away an unknown share, and engines with GPUs of their own are not
    priced."""
    return row["algorithm"] == "GRPO" and row["steps_behind"] == "0"


def error(row: Row, costs: EngineCosts) -> float:
    """Return the logarithm of predicted over published."""
    return math.log(predicted(row, costs).total_s / float(row["step_time_s"]))


def fitted(rows: Sequence[Row], num_steps: int, seed: int = 0) -> EngineCosts:
    """Return the costs of the smallest mean error that a random walk finds; large errors count as 0.7."""
    def cost(costs: EngineCosts) -> float:
        return statistics.mean(min(abs(error(row, costs)), 0.7) for row in rows)

    drawn, best = random.Random(seed), EngineCosts()
    least = cost(best)
    for _ in range(num_steps):
        moved = {name: min(largest, getattr(best, name) * math.exp(drawn.gauss(0, 0.3)))
                 for name, largest in FITTED.items() if drawn.random() < 0.4}
        tried = replace(best, **moved)
        if (found := cost(tried)) < least:
            least, best = found, tried
    return best


def share(errors: Sequence[float]) -> str:
    """Return median, 90th percentile and worst of errors."""
    sizes = sorted(abs(math.expm1(e)) for e in errors)
    return (f"median {statistics.median(sizes):.1%}, 90th percentile {sizes[int(0.9 * len(sizes))]:.1%}, "
            f"worst {sizes[-1]:.1%}")


def print_rounds(rows: Sequence[Row], num_steps: int) -> None:
    """Print rounds, and what each model's error is by costs fitted on the others."""
    print(f"{'source':<13} {'model':<12} {'GPU':<6} {'GPUs':>5} {'precision':>9} {'write':>8} "
          f"{'learn':>8} {'weights':>8} {'round':>8} {'published':>9}  error")
    for row in rows:
        took, published_s = predicted(row, EngineCosts()), float(row["step_time_s"])
        print(f"{row['source']:<13} {row['model']:<12} {row['gpu']:<6} {row['num_gpus']:>5} "
              f"{row['precision']:>9} {took.generate_s:>6.1f} s "
              f"{took.learn_s:>6.1f} s {took.refit_s:>6.1f} s {took.total_s:>6.1f} s {published_s:>7.1f} s "
              f"{took.total_s / published_s - 1:+7.1%}")
    print(f"\n{len(rows)} rounds, all costs: {share([error(row, EngineCosts()) for row in rows])}")
    if num_steps:
        held: list[float] = []
        for model in dict.fromkeys(row["model"] for row in rows):
            own = [row for row in rows if row["model"] == model]
            costs = fitted([row for row in rows if row["model"] != model], num_steps)
            held += (errors := [error(row, costs) for row in own])
            print(f"  {model:<12} by costs fitted on the others ({len(own)} rounds): {share(errors)}")
        print(f"each model left out in turn: {share(held)}")


def on(gpu: str, num_gpus: int) -> Pricing:
    """Return some GPUs: whole nodes of eight, or part of one."""
    profile = machines("h100", 1).profile
    nodes = max(1, num_gpus // 8)
    found = pricing(Machines("h100", replace(profile, gpu=gpu, gpus_per_node=num_gpus // nodes), nodes))
    assert found is not None
    return found


def print_budgets() -> None:
    """Print the jobs of recipes with a published budget."""
    for names, gpu, num_gpus, gpu_hours, told in BUDGETS:
        print(f"\n{told}")
        spent = [q for name in names for q in jobs(name, on(gpu, num_gpus))]
        print(f"  predicted {totals(spent).gpu_hours:,.0f} GPU-hours, published {gpu_hours:,.0f}")
        learned = [q for q in spent if q.kind.startswith("RL")]
        if learned:  # how many rounds there were nobody published; the recipes' numbers are ours
            rest = gpu_hours - sum(q.gpu_hours for q in spent if q not in learned)
            times = rest / sum(q.gpu_hours for q in learned)
            print(f"  what was published pays for {times:.1f} times the recipes' rounds, which are ours: "
                  f"{' + '.join(f'{times * q.steps:,.0f}' for q in learned if q.kind == 'RL: train')}")


def jobs(name: str, gpus: Pricing) -> list[Quote]:
    """Print the jobs of a recipe, and return them."""
    config = recipes.get(name)
    if config.objective.name == "policy" and name.startswith("vibethinker"):
        config = apply_settings(config, list(VIBETHINKER))
    if config.extend.stages:  # the fine-tuning alone
        config = replace(config, extend=type(config.extend)())
    found = quotes(config, gpus)
    for q in found:
        print(f"  {name:<26} {q.kind:<22} {q.steps:>6,} x {q.step_s:>8.2f} s = {q.hours:>7.2f} h on "
              f"{q.num_gpus} {q.gpu}")
    return found


def print_deepscaler() -> None:
    """Print DeepScaleR-1.5B, whose steps are published; responses of half the longest length are assumed."""
    print("\nDeepScaleR-1.5B: 1,040 steps of 128 x 8 at 8K on 8 A100, then 480 of 128 x 16 at 16K and about "
          "200 at 24K on 32: 3,800 A100 hours")
    hours = 0.0
    for longest, steps, gpus, samples in ((8192, 1040, 8, 8), (16384, 480, 32, 16), (24576, 200, 32, 16)):
        config = apply_settings(recipes.get("vibethinker-1.5b-math-32k"), [
            *VIBETHINKER, "policy.kl=k3", "policy.kl_coeff=0.001", f"rollout.rounds={steps}",
            "rollout.prompts_per_round=128", f"rollout.samples_per_prompt={samples}",
            f"rollout.max_new_tokens={longest}", f"train.steps={steps}",
            f'data.phases=[{{"name": "rounds", "seq_len": {longest + 1024}}}]'])
        found = quotes(config, on("a100", gpus))
        hours += (spent := totals(found).gpu_hours)
        print(f"  {longest:>6,} tokens: {found[0].step_s + found[2].step_s:>6.1f} s a step, {spent:,.0f} "
              "GPU-hours")
    print(f"  predicted {hours:,.0f} GPU-hours, published 3,800")


def main(argv: list[str] | None = None) -> int:
    """Print everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fit", type=int, default=0, metavar="ROUNDS")
    args = parser.parse_args(argv)
    with ROWS.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if usable(row)]
    if args.fit:
        found = fitted(rows, args.fit)
        print(f"fitted: {asdict(found)}\n{share([error(row, found) for row in rows])}\n")
    steps: list[Callable[[], None]] = [print_budgets, print_deepscaler]
    print_rounds(rows, args.fit)
    for step in steps:
        step()
    return 0


if __name__ == "__main__":
    sys.exit(main())
