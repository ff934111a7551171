"""The first line of a plan: parameters, tokens, GPUs, time and cost."""

from __future__ import annotations

import pytest

from megatron_sov import recipes
from megatron_sov.base.figures import format_days, format_money
from megatron_sov.model.recipes.requested import RecipeRequest
from megatron_sov.plan.cluster_plan import plan_on_cluster
from megatron_sov.plan.pages.quotes import sum_quotes
from megatron_sov.plan.pricing import load_machines

LAYOUT = "parallel.zero1=true"
"""A layout of the user's own, which no search replaces."""


def request(recipe: str, *settings: str) -> RecipeRequest:
    return RecipeRequest(recipes.get(recipe), settings, from_file=False)


@pytest.mark.each(("recipe", "nodes", "settings", "words"), [
    ("qwen3-moe-30b", 8, (), "30.5 B parameters (3.35 B active) on 999.8 M tokens (the recipe's), 8 x 8"),
    ("qwen3-8b", 1, (), "8.19 B parameters (8.19 B active) on 999.8 M tokens (the recipe's), 8 H100"),
    ("qwen3-8b", 2, ("data.phases.0.tokens=200000000000",), "on 200 B tokens (data.phases.0.tokens), 2"),
    ("qwen3-4b", 1, ("data.phases.0.tokens=0", "train.steps=1000"), "on 524.3 M tokens (train.steps), 8"),
    ("gemma-3-1b", 1, ("train.tokens=2e9",), "on 2 B tokens (train.tokens), 8 H100"),
    ("solar-open-102b", 64, ("parallel.pp=4", "parallel.ep=8"), "on 20 T tokens (the recipe's), 64 x 8 H100"),
    ("solar-open-102b-sft", 60, ("parallel.pp=4",), "on 20 B tokens (the recipe's), 60 x 8 H100"),
    ("k-exaone-236b-extend", 64, ("parallel.pp=8", "parallel.cp=8"), "on 134.2 B tokens (the recipe's), 64"),
])
def test_the_headline_names_tokens_their_source_gpus_time_and_cost(
        recipe: str, nodes: int, settings: tuple[str, ...], words: str) -> None:
    plan = plan_on_cluster(request(recipe, LAYOUT, *settings), load_machines("h100", nodes))
    line, total = plan.format_headline(), sum_quotes(plan.quotes)
    assert line.startswith(f"{recipe}: ") and words in line
    first, *more = line.split("; 1 T tokens: ")
    assert first.endswith(f": {format_days(total.days * 86400)}, {format_money(total.cost_usd)}")
    # pretraining below half of 1 T tokens is also priced at 1 T
    assert bool(more) == (recipe.count("-") < 3 and "20 T" not in words and "rounds" not in words
                          and "-sft" not in recipe)
    assert plan.format_text().startswith(line) and plan.to_json()["headline"] == line
    assert "on each of stage" not in plan.format_text() and "processes" not in plan.format_text()


@pytest.mark.parametrize("recipe", ["qwen3-8b", "qwen3-moe-30b"])
def test_a_trillion_tokens_cost_what_a_plan_of_a_trillion_tokens_says(recipe: str) -> None:
    where, size = load_machines("h100", 8), ("parallel.ep=8",) if "8b" not in recipe else ()
    short = sum_quotes(plan_on_cluster(request(recipe, LAYOUT, *size), where).quotes).scale_to_tokens(10**12)
    whole = sum_quotes(plan_on_cluster(request(recipe, LAYOUT, *size,
                       "data.phases.0.tokens=1000000000000"), where).quotes)
    assert (short.days, short.cost_usd) == pytest.approx((whole.days, whole.cost_usd), rel=0.01)
