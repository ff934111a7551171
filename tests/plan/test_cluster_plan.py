"""Plans of runs on a cluster: the headline (parameters, tokens, GPUs, time, cost), and tokens of a budget."""

import re

import pytest

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.base.figures import format_days, format_money
from megatron_sov.model.recipes.requested import RecipeRequest
from megatron_sov.plan.budget import compute_budget_rows, format_budget, list_pretraining_requests
from megatron_sov.plan.cluster_plan import plan_on_cluster
from megatron_sov.plan.pages.quotes import sum_quotes
from megatron_sov.plan.pricing import load_machines

LAYOUT = "parallel.zero1=true"
"""A setting of the layout, with which no layout is searched."""


def request(recipe: str, *settings: str) -> RecipeRequest:
    """Return the request of a recipe by name with these settings."""
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
def test_the_headline_names_tokens_their_source_gpus_time_and_cost(recipe: str, nodes: int,
                                                                   settings: tuple[str, ...],
                                                                   words: str) -> None:
    plan = plan_on_cluster(request(recipe, LAYOUT, *settings), load_machines("h100", nodes))
    line, total = plan.format_headline(), sum_quotes(plan.quotes)
    assert line.startswith(f"{recipe}: ") and words in line
    first, *more = line.split("; 1 T tokens: ")
    assert first.endswith(f": {format_days(total.days * 86400)}, {format_money(total.cost_usd)}")
    # pretraining on less than half of 1 T tokens is also priced at 1 T
    is_pretraining = recipe.count("-") < 3 and "-sft" not in recipe and "rounds" not in words
    assert bool(more) == (is_pretraining and "20 T" not in words)
    assert plan.format_text().startswith(line) and plan.to_json()["headline"] == line
    assert "on each of stage" not in plan.format_text() and "processes" not in plan.format_text()


@pytest.mark.parametrize("recipe", ["qwen3-8b", "qwen3-moe-30b"])
def test_a_budget_plan_equals_the_plan_of_its_tokens(recipe: str) -> None:
    where, size = load_machines("h100", 8), ("parallel.ep=8",) if "8b" not in recipe else ()
    tokens = f"data.phases.0.tokens={10**12}"
    line = plan_on_cluster(request(recipe, LAYOUT, *size), where).format_headline()
    total = sum_quotes(plan_on_cluster(request(recipe, LAYOUT, *size, tokens), where).quotes)
    price = re.fullmatch(r".*; 1 T tokens: ([\d.]+) days, \$([\d,]+)", line)
    assert price and float(price[1]) == pytest.approx(total.days, rel=0.01)
    assert float(price[2].replace(",", "")) == pytest.approx(total.cost_usd, rel=0.01)


@pytest.mark.parametrize(("recipe", "days", "usd", "nodes"), [
    ("qwen3-8b", 14, None, 8), ("qwen3-8b", 0.25, None, 1), ("qwen3-8b", None, 5000, 2),
    ("qwen3-8b", 14, 5000, 8), ("qwen3-8b", 1, 1e6, 8), ("gemma-3-1b", 3, None, 1),
    ("llama-3.1-8b", None, 1e6, 8), ("qwen3-4b", 30, 1e4, 4)])
def test_a_budget_buys_the_tokens_whose_plan_costs_the_budget(recipe: str, days: float | None,
                                                              usd: float | None, nodes: int) -> None:
    where = load_machines("h100", nodes)
    [row] = compute_budget_rows({recipe: request(recipe, LAYOUT)}, where, days, usd)
    assert row.tokens > 0 and row.days <= (days or 1e9) * 1.0001 and row.cost_usd <= (usd or 1e9) * 1.0001
    tokens = f"data.phases.0.tokens={row.tokens}"
    total = sum_quotes(plan_on_cluster(request(recipe, LAYOUT, tokens), where).quotes)
    assert (total.days, total.cost_usd) == pytest.approx((row.days, row.cost_usd), rel=0.02)
    uses_all_days = days is not None and row.days == pytest.approx(days)
    uses_all_money = usd is not None and row.cost_usd == pytest.approx(usd)
    assert uses_all_days or uses_all_money
    assert row.to_json()["tokens_per_parameter"] == row.tokens / row.num_params


@pytest.mark.deep
def test_table_lists_fitting_rows_first_and_nodes_needed_by_others() -> None:
    where = load_machines("h100", 1)
    requests = {"deepseek-v3": request("deepseek-v3"), "qwen3-8b": request("qwen3-8b", LAYOUT),
                "gemma-3-1b": request("gemma-3-1b", LAYOUT)}
    rows = compute_budget_rows(requests, where, 14, None)
    assert [row.recipe for row in rows] == ["gemma-3-1b", "qwen3-8b", "deepseek-v3"]
    title, head, first, _, last = format_budget(rows, where).splitlines()
    assert title == "Tokens within the budget on 8 H100-80GB (75.0 GiB usable per GPU):"
    assert head.split()[:4] == ["recipe", "parameters", "active", "tokens"] and head.endswith("  layout")
    assert first.split()[:3] == ["gemma-3-1b", "999.9", "M"] and "14 days" in first
    assert last.endswith("deepseek-v3 on 8 H100-80GB: fits nowhere; the fewest nodes that it fits are 32: "
                         "--nodes 32")
    assert not rows[-1].to_json()["fits"]


def test_the_table_is_of_recipes_that_pretrain_large_models() -> None:
    result = list_pretraining_requests(["train.global_batch_size=1024"])
    assert {"qwen3-moe-30b", "deepseek-v3", "solar-open-102b", "gemma-3-1b"} <= set(result)
    others = ("-rl", "-sft", "-extend")
    assert not [name for name in result if name.startswith("tiny-") or name.endswith(others)]
    assert all(asked.config().train.global_batch_size == 1024 for asked in result.values())


def test_rounds_have_no_tokens_and_unknown_gpus_no_price() -> None:
    with pytest.raises(UserError, match="solar-open-102b-rl: is trained by rounds, not tokens"):
        compute_budget_rows({"solar-open-102b-rl": request("solar-open-102b-rl")},
                            load_machines("h100", 16), 14, None)
    with pytest.raises(UserError, match="--cluster one-node: gpu is empty in the profile"):
        compute_budget_rows({"qwen3-8b": request("qwen3-8b")}, load_machines("one-node", 1), 14, None)
