"""Compute the tokens that recipes process on a cluster within a number of days or a budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.base.figures import format_count, format_days, format_money, format_value
from megatron_sov.model import recipes
from megatron_sov.model.families.count import count_params
from megatron_sov.model.recipes.requested import RecipeRequest
from megatron_sov.plan.cluster_plan import (
    ROUNDS_OBJECTIVE, ClusterPlan, explain_missing_price, format_gpus, plan_on_cluster)
from megatron_sov.plan.pages.layout_report import format_layout
from megatron_sov.plan.pages.quotes import QuoteTable, format_gib, format_table, sum_quotes
from megatron_sov.plan.pricing import Machines
from megatron_sov.plan.search.space import choice_to_dict, get_current_choice
from megatron_sov.work.clusters.units import SECONDS_PER_DAY
from megatron_sov.work.progress.progress_bar import create_bar


@dataclass(frozen=True)
class BudgetRow:
    """A recipe on a cluster, within --days and --budget."""

    recipe: str
    num_params: int
    num_active_params: int
    plan: ClusterPlan | None
    """The run in the best layout; None: no layout fits."""
    problem: str = ""
    """Reason why no layout fits."""
    tokens: int = 0
    days: float = 0.0
    cost_usd: float = 0.0

    def to_json(self) -> dict[str, Any]:
        values = {"recipe": self.recipe, "parameters": self.num_params,
                  "active_parameters": self.num_active_params, "fits": self.plan is not None}
        if self.plan is None:
            return values | {"problem": self.problem}
        return values | {
            "tokens": self.tokens, "tokens_per_parameter": self.tokens / self.num_params, "days": self.days,
            "cost_usd": self.cost_usd, "memory_bytes": sum_quotes(self.plan.quotes).peak_memory_bytes,
            "layout": choice_to_dict(get_current_choice(self.plan.config))}


def list_pretraining_requests(settings: Sequence[str]) -> dict[str, RecipeRequest]:
    """Return recipe name -> request with the user's settings, for each pretraining recipe without `tiny-`."""
    configs = {name: recipes.get(name) for name in recipes.names() if not name.startswith("tiny-")}
    return {name: RecipeRequest(config, tuple(settings), False) for name, config in configs.items()
            if config.objective.name == "lm" and not config.extend.stages}


def compute_budget_rows(requests: Mapping[str, RecipeRequest], machines: Machines, days: float | None,
                        usd: float | None) -> list[BudgetRow]:
    """Compute a row per recipe: fitting recipes first, small models before large models. `requests`: by
    recipe name; `days` and `usd`: limits of a run, None: no limit. Raises `UserError`: a profile without
    GPUs, or a recipe with rounds of reinforcement learning."""
    if machines.chip is None:
        raise UserError(f"--cluster {machines.cluster}: {explain_missing_price(machines)}")
    rows = []
    with create_bar("recipes", len(requests), "recipe") as bar:
        for name, request in requests.items():
            bar.set_postfix_str(name)  # shows the bar at once: a layout search takes seconds
            rows.append(_compute_budget_row(name, request, machines, days, usd))
            bar.update()
    return sorted(rows, key=lambda row: (row.plan is None, row.num_params, row.recipe))


def _compute_budget_row(name: str, request: RecipeRequest, machines: Machines, days: float | None,
                        usd: float | None) -> BudgetRow:
    if request.base.objective.name == ROUNDS_OBJECTIVE:
        raise UserError(f"{name}: is trained by rounds, not tokens; leave out --days and --budget, and set "
                        "rollout.rounds")
    try:
        plan = plan_on_cluster(request, machines)
    except UserError as e:
        count = count_params(request.base.model)
        return BudgetRow(name, count.total, count.active, None, str(e))
    count = count_params(plan.config.model)
    total = sum_quotes(plan.quotes)
    share = min(limit / whole for limit, whole in ((days, total.days), (usd, total.cost_usd))
                if limit is not None)
    return BudgetRow(name, count.total, count.active, plan, "", round(plan.count_tokens() * share),
                     total.days * share, total.cost_usd * share)


def format_budget(rows: Sequence[BudgetRow], machines: Machines) -> str:
    """Format the table of tokens within the budget, and a line per recipe that fits nowhere."""
    head = ["recipe", "parameters", "active", "tokens", "tokens/parameter", "time", "cost", "GiB per GPU"]
    cells, layouts = [], ["layout"]
    for row in rows:
        if row.plan is None:
            continue
        cells.append([row.recipe, format_count(row.num_params), format_count(row.num_active_params),
                      format_count(row.tokens), format_value(row.tokens / row.num_params, 3),
                      format_days(row.days * SECONDS_PER_DAY), format_money(row.cost_usd),
                      format_gib(sum_quotes(row.plan.quotes).peak_memory_bytes)])
        layouts.append(format_layout(get_current_choice(row.plan.config)))
    title, *table = format_table(QuoteTable(
        f"Tokens within the budget on {format_gpus(machines)} ({format_gib(machines.limit_bytes)} GiB "
        "usable per GPU)", head, cells)).split("\n")
    width = max(map(len, table))
    lines = [title, *(f"{line.ljust(width)}  {layout}" for line, layout in zip(table, layouts, strict=True))]
    lines += [f"  {row.recipe} ({format_count(row.num_params)}): no layout; {row.problem}"
              for row in rows if row.plan is None]
    return "\n".join(lines)
