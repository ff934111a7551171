"""A run on a cluster: its layout, what it needs, what it takes; or why it cannot be there."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.base.figures import format_count, format_days, format_money, format_value
from megatron_sov.model import recipes
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.model.families.count import count_params
from megatron_sov.model.recipes.requested import RecipeRequest
from megatron_sov.plan.calibration.fitting import (
    fullest, nearest, refuse_on_nodes, refuse_too_large, usable_bytes)
from megatron_sov.plan.footprint.memory import Account
from megatron_sov.plan.pages import quote as quote_tables
from megatron_sov.plan.pages.quote import Quote, QuoteTable, QuoteTotals, as_json, gib, totals
from megatron_sov.plan.pages.telling import PlanText, name, set_line, size_line, sizes, submit_line
from megatron_sov.plan.pricing import Machines, Pricing, pricing, quote, refuse_precision, run_stages
from megatron_sov.plan.search.default import DefaultLayout, choose_layout, leaves_layout_open
from megatron_sov.plan.search.space import as_dict, own_choice
from megatron_sov.plan.search.sweep import (
    SweepSearch, fewest_nodes, fits_somehow, num_layouts, search, told_nodes)
from megatron_sov.plan.speed.parameters import Parameters
from megatron_sov.schedules import Schedule
from megatron_sov.work.clusters.chips import Chip
from megatron_sov.work.clusters.units import GIB, SECONDS_PER_DAY
from megatron_sov.work.progress.progress_bar import create_bar

LEAST_SHOWN_SHARE = 0.0005
"""Items of memory that one line has no place for are smaller."""
UNSEEN_ERROR = 0.25
"""Nine tenths of the speeds of sources that the fit never saw lie within it
(benchmarks/results/plan_calibration.txt)."""
REFERENCE_TOKENS = 1_000_000_000_000
"""The headline of a shorter pretraining run also says what so many tokens would take."""
ROUNDS_OBJECTIVE = "policy"
ROUNDS = "rounds of reinforcement learning are not priced; multiply the seconds of one round of `rl run`"
LENGTH_SETTINGS = ("train.tokens", "train.steps", "train.epochs", "rollout.rounds", "data.phases")
"""Settings that decide how many tokens a run reads, as `tokens` of a phase does."""


@dataclass(frozen=True)
class PlacedPlan:
    config: RunConfig
    machines: Machines
    length_source: str
    """Setting that decides how many tokens the run reads, or "the recipe" if the user set none."""
    quotes: list[Quote]
    """Its stages; none where the profile does not say what GPUs it has."""
    told: PlanText | None = None
    """The sweep that chose the layout."""
    default: DefaultLayout | None = None
    """The search that chose the layout if the user set none and asked for no sweep."""

    @cached_property
    def _fullest(self) -> tuple[int, Account]:
        """The pipeline stage whose processes need most, and what one of them needs."""
        return fullest(self.config, self.machines.num_ranks)

    def as_json(self) -> dict[str, Any]:
        (stage, needs), chip = self._fullest, self.machines.chip
        found: dict[str, Any] = {
            "headline": self.headline(), "length_source": self.length_source,
            "processes": self.machines.num_ranks, "layout": dataclasses.asdict(self.config.parallel),
            "gpu": chip.name if chip else None, "fullest_stage": stage + 1,
            "memory_bytes": needs.components() | {"total": needs.total}}
        if self.quotes:
            found |= {"stages": [as_json(q) for q in self.quotes],
                      "totals": quote_tables.totals_json(totals(self.quotes))}
        found |= {"layout_search": dataclasses.asdict(self.default)} if self.default else {}
        return found | ({"sweep": self.told.as_json()} if self.told else {})

    def headline(self) -> str:
        """Return one line: parameters, tokens and who set them, GPUs, time and cost."""
        line = f"{size_line(self.config)} on {self._length()}, {_gpus(self.machines)}"
        if not self.quotes:
            return line
        total = totals(self.quotes)
        line = f"{line}: {_time_and_cost(total)}"
        if self._is_pretraining() and 0 < total.tokens < REFERENCE_TOKENS / 2:
            more = total.at_tokens(REFERENCE_TOKENS)
            line += f"; {format_count(REFERENCE_TOKENS)} tokens: {_time_and_cost(more)}"
        return line

    def as_text(self) -> str:
        """Return the headline, layout, memory, and the tables of time, memory and messages."""
        parts = ["\n".join([self.headline(), *self._search_lines(),
                            memory_lines(self.config, self.machines.num_ranks, self.machines.chip)])]
        if self.told:
            parts += [quote_tables.text(self.told.table()), "\n".join(self.told.lines())]
        if self.quotes:
            parts += [quote_tables.text(table) for table in quote_tables.tables(self.quotes)]
            parts.append("\n".join([self._uncertainty(), *quote_tables.notes(self.quotes)]))
        else:
            parts.append(f"no price: {ROUNDS if self._learns_by_rounds() else _unknown(self.machines)}")
        if self.told:
            parts.append(f"settings: {set_line(self.told.settings) or 'as the recipe has them'}\n"
                         f"submit:   {self.told.submit}")
        return "\n\n".join(parts)

    def _learns_by_rounds(self) -> bool:
        return self.config.objective.name == ROUNDS_OBJECTIVE

    def _is_pretraining(self) -> bool:
        return self.config.objective.name == "lm" and not self.config.extend.stages

    def num_tokens(self) -> int:
        """Return the tokens that the run trains on, padding included."""
        if self.config.extend.stages and self.quotes:
            return totals(self.quotes).tokens
        schedule = Schedule(self.config)
        return schedule.count_tokens(schedule.num_steps - 1)

    def _length(self) -> str:
        """Return the length of the run and the setting that decides it."""
        if self._learns_by_rounds():
            return f"{self.config.rollout.rounds:,} rounds ({self.length_source})"
        return f"{format_count(self.num_tokens())} tokens ({self.length_source})"

    def _search_lines(self) -> list[str]:
        return [self.default.line()] if self.default else []

    def _uncertainty(self) -> str:
        """Return the sentence on how wrong the time may be."""
        seconds = totals(self.quotes).days * SECONDS_PER_DAY
        low, high = seconds / (1 + UNSEEN_ERROR), seconds * (1 + UNSEEN_ERROR)
        return (f"In nine of ten cases the time is {format_days(low)} to {format_days(high)} "
                "(docs/plan_speed.md).")


def _time_and_cost(total: QuoteTotals) -> str:
    return f"{format_days(total.days * SECONDS_PER_DAY)}, {format_money(total.cost_usd)}"


def _gpus(machines: Machines) -> str:
    """Return the number of nodes and GPUs, as 8 x 8 H100-80GB."""
    nodes = f"{machines.nodes:,} x " if machines.nodes > 1 else ""
    kind = machines.chip.name if machines.chip else "processes"
    return f"{nodes}{machines.profile.tasks_per_node} {kind}"


def memory_lines(config: RunConfig, num_ranks: int, chip: Chip | None = None) -> str:
    """Return two lines: the layout of a run, and the memory of the process that needs most."""
    stage, needs = fullest(config, num_ranks)
    shown = needs.components() | ({"on_host": needs.on_host} if needs.on_host else {})
    items = ", ".join(f"{item.replace('_', ' ')} {_gib(n)}" for item, n in shown.items()
                      if n >= max(LEAST_SHOWN_SHARE * needs.total, 1)
                      or item in ("weights", "gradients", "optimizer"))
    if chip:
        count, limit = f"{num_ranks:,} GPUs", f" of {_gib(usable_bytes(chip))} GiB per GPU"
    else:
        count, limit = f"{num_ranks:,} process{'es' if num_ranks > 1 else ''}", " GiB per process"
    at = f" (pipeline stage {stage + 1} of {config.parallel.pp})" if config.parallel.pp > 1 else ""
    return (f"{count}: {sizes(config.parallel)}{_kernels(config)}\n"
            f"memory: {_gib(needs.total)}{limit}{at}: {items}")


def _kernels(config: RunConfig) -> str:
    """Return what has to be installed for the messages of a run's experts; "": nothing."""
    dispatcher = config.parallel.expert_dispatcher
    return f", experts by {dispatcher}" if dispatcher in ("deepep", "hybridep") else ""


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f}" if num_bytes >= GIB / 10 else f"{num_bytes / GIB:.2g}"


def length_source(request: RecipeRequest) -> str:
    """Return the setting by which the user decides how many tokens a run reads; else the recipe, or the
    epochs of --data that a stage takes by default."""
    for setting in reversed([*sorted(request.layered), *request.settings]):
        key = setting.partition("=")[0]
        if key in LENGTH_SETTINGS or (key.startswith("data.phases.") and key.endswith(".tokens")):
            return key
    epochs = request.base.train.epochs
    if request.is_model_only and epochs:
        return f"{epochs:g} epoch{'' if epochs == 1 else 's'} of --data"
    return "the recipe's"


def placed(request: RecipeRequest, machines: Machines, learned: Parameters | None = None) -> PlacedPlan:
    """Return a run with its own layout, or with the one that a search finds if the user sets none.

    Raises:
        UserError: it breaks a rule, does not fit, or its profile does not say what `plan` has to know.
    """
    config, settings = request.config(), list(request.settings)
    prices, default = pricing(machines, learned), None
    if leaves_layout_open(request):
        chosen, default = choose_layout(config, machines, settings, learned)
        if prices and default is None:
            _refuse_few_nodes(config, apply_settings(config, list(chosen)), prices, settings)
        config, settings = apply_settings(config, list(chosen)), [*settings, *chosen]
    config.check(machines.num_ranks)
    if prices:
        refuse_precision(config, prices.chip)
        _refuse_too_large(config, prices)
    _refuse_on_host(config, machines)
    return PlacedPlan(config, machines, length_source(request),
                      quote_run(config, prices, settings) if prices else [], default=default)


def searched(request: RecipeRequest, machines: Machines, recipe: Sequence[str],
             learned: Parameters | None = None) -> PlacedPlan:
    """Return a run with the fastest layout that fits; what --set says of a layout stays.

    Raises:
        UserError: no layout fits, or the profile does not say what GPUs it has.
    """
    prices = pricing(machines, learned)
    if prices is None:
        raise UserError(f"--sweep with --cluster {machines.cluster}: {_unknown(machines)}")
    config = request.config()
    fixed = {setting.partition("=")[0] for setting in request.settings}
    prices.links  # noqa: B018  # told before the search, not in its middle
    with create_bar("layouts", num_layouts(config, prices, fixed), "layout") as bar:
        found = search(config, prices, fixed, bar.update)
    if not found.best:
        raise UserError(_fits_nowhere(config, prices, found, fixed))
    choice = found.best[0].choice
    settings = choice.settings(config)
    best = apply_settings(config, settings)
    told = PlanText(found, machines, settings,
                    submit_line(config, machines, recipe, [*request.settings, *settings]))
    _refuse_on_host(best, machines)
    return PlacedPlan(best, machines, length_source(request),
                      quote_run(best, prices, [*request.settings, *settings]), told)


def _refuse_few_nodes(config: RunConfig, placed_config: RunConfig, prices: Pricing,
                      said: Sequence[str]) -> None:
    """Refuse a run without a layout for so many GPUs, if there is one for more of them; the rule that the
    recipe's own layout breaks would mislead."""
    refuse_precision(config, prices.chip)
    if not placed_config.problems(prices.num_ranks):
        return
    nodes = fewest_nodes(config, prices, {setting.partition("=")[0] for setting in said})
    if nodes is not None:
        raise UserError(f"{config.recipe} on {_gpus(prices.machines)}: fits nowhere; {told_nodes(nodes)}")


def _refuse_too_large(config: RunConfig, prices: Pricing) -> None:
    """Refuse a run that does not fit, with what does: a layout near its own, a search, or more nodes."""
    try:
        refuse_too_large(config, prices.num_ranks, prices.chip)
    except UserError as e:
        if nearest(config, prices.num_ranks, prices.chip) is not None:
            raise
        way_out = ("--sweep finds one that fits" if fits_somehow(config, prices)
                   else told_nodes(fewest_nodes(config, prices)))
        raise UserError(f"{e}; {way_out}") from None


def quote_run(config: RunConfig, prices: Pricing, settings: Sequence[str]) -> list[Quote]:
    """Return the quotes of a run's phases or stages; none of rounds, in which engines write.
    `settings` are those that the user passed."""
    if config.objective.name == ROUNDS_OBJECTIVE:
        return []
    micro_batch_set = any(s.startswith("train.micro_batch_size=") for s in settings)
    return [quote(stage, prices)
            for stage in run_stages(config, prices.num_ranks, micro_batch_set=micro_batch_set)]


def _refuse_on_host(config: RunConfig, machines: Machines) -> None:
    profile = machines.profile
    if profile.memory_bytes:
        refuse_on_nodes(config, machines.num_ranks, profile.tasks_per_node, profile.memory_bytes,
                        machines.chip)


def _unknown(machines: Machines) -> str:
    try:
        machines.profile.chip  # noqa: B018  # raises what is to be told
    except UserError as e:
        return str(e)
    return ""


def _fits_nowhere(config: RunConfig, prices: Pricing, found: SweepSearch, fixed: Collection[str]) -> str:
    """Return the sentence on a run that has no layout on so many nodes."""
    machines = prices.machines
    nodes = f"{machines.nodes:,} node{'s' if machines.nodes > 1 else ''}"
    of = f"{config.recipe} on {nodes} of {machines.profile.gpus_per_node} {prices.chip.name}"
    lacks = [s.nearest for s in found.sweeps if not s.ranked and s.nearest is not None]
    if lacks:
        short, choice = max(lacks, key=lambda lack: lack[0])
        why = f"the nearest layout lacks {gib(short)} GiB on each GPU ({name(choice)})"
    elif all(s.ranked for s in found.sweeps):
        why = "each of its stages has layouts, and none is common to all"
    else:
        rules = next(s for s in found.sweeps if not s.ranked)
        why = f"every layout breaks a rule, most of them: {rules.examples[rules.broken.most_common()[0][0]]}"
    return f"{of}: fits nowhere; {why}; {told_nodes(fewest_nodes(config, prices, fixed))}"


# What recipes reach on a cluster within days or money.


@dataclass(frozen=True)
class BudgetRow:
    """A recipe on a cluster within a budget."""

    recipe: str
    num_params: int
    num_active_params: int
    plan: PlacedPlan | None
    """The run in the best layout; None: none fits."""
    problem: str = ""
    """Why no layout fits."""
    tokens: int = 0
    days: float = 0.0
    cost_usd: float = 0.0

    def as_json(self) -> dict[str, Any]:
        found = {"recipe": self.recipe, "parameters": self.num_params,
                 "active_parameters": self.num_active_params, "fits": self.plan is not None}
        if self.plan is None:
            return found | {"problem": self.problem}
        return found | {
            "tokens": self.tokens, "tokens_per_parameter": self.tokens / self.num_params, "days": self.days,
            "cost_usd": self.cost_usd, "memory_bytes": totals(self.plan.quotes).peak_memory_bytes,
            "layout": as_dict(own_choice(self.plan.config))}


def pretraining_requests(settings: Sequence[str]) -> dict[str, RecipeRequest]:
    """Return name -> request of each recipe that pretrains a model larger than a rehearsal's, with the user's
    settings."""
    named = {name: recipes.get(name) for name in recipes.names() if not name.startswith("tiny-")}
    return {name: RecipeRequest(config, tuple(settings), False) for name, config in named.items()
            if config.objective.name == "lm" and not config.extend.stages}


def budget_rows(requests: Mapping[str, RecipeRequest], machines: Machines, days: float | None,
                usd: float | None, learned: Parameters | None = None) -> list[BudgetRow]:
    """Return a row for each recipe, those that fit first, smaller models before larger ones.

    Args:
        requests: name of a recipe -> its settings.
        machines: the cluster.
        days: most days of a run; None: any.
        usd: most US dollars that a run may cost; None: any.
        learned: parameters of speed; None: those of the package.

    Raises:
        UserError: the profile does not describe its GPUs, or rounds of reinforcement learning, which have no
            number of tokens, are asked for.
    """
    if machines.chip is None:
        raise UserError(f"--cluster {machines.cluster}: {_unknown(machines)}")
    rows = []
    with create_bar("recipes", len(requests), "recipe") as bar:
        for name, request in requests.items():
            rows.append(_budget_row(name, request, machines, days, usd, learned))
            bar.update()
    return sorted(rows, key=lambda row: (row.plan is None, row.num_params, row.recipe))


def _budget_row(name: str, request: RecipeRequest, machines: Machines, days: float | None,
                usd: float | None, learned: Parameters | None) -> BudgetRow:
    if request.base.objective.name == "policy":
        raise UserError(f"{name}: is trained by rounds, not tokens; leave out --days and --budget, and set "
                        "rollout.rounds")
    try:
        plan = placed(request, machines, learned)
    except UserError as e:
        count = count_params(request.base.model)
        return BudgetRow(name, count.total, count.active, None, str(e))
    count = count_params(plan.config.model)
    total = totals(plan.quotes)
    share = min(limit / whole for limit, whole in ((days, total.days), (usd, total.cost_usd))
                if limit is not None)
    return BudgetRow(name, count.total, count.active, plan, "", round(plan.num_tokens() * share),
                     total.days * share, total.cost_usd * share)


def budget_text(rows: Sequence[BudgetRow], machines: Machines) -> str:
    """Return the table of what recipes reach within a budget, and a line for each that fits nowhere."""
    head = ["recipe", "parameters", "active", "tokens", "tokens/parameter", "time", "cost", "GiB per GPU"]
    cells, layouts = [], []
    for row in rows:
        if row.plan is None:
            continue
        cells.append([row.recipe, format_count(row.num_params), format_count(row.num_active_params),
                      format_count(row.tokens), format_value(row.tokens / row.num_params, 3),
                      format_days(row.days * SECONDS_PER_DAY), format_money(row.cost_usd),
                      gib(totals(row.plan.quotes).peak_memory_bytes)])
        layouts.append(name(own_choice(row.plan.config)))
    title = f"Tokens within the budget on {_gpus(machines)} ({gib(machines.limit_bytes)} GiB usable per GPU)"
    table = quote_tables.text(QuoteTable(title, head, cells)).split("\n")
    width = max(map(len, table[1:]))
    lines = [table[0], f"{table[1].ljust(width)}  layout",
             *(f"{line.ljust(width)}  {layout}" for line, layout in zip(table[2:], layouts, strict=True))]
    lines += [f"  {row.recipe} ({format_count(row.num_params)}): no layout; {row.problem}"
              for row in rows if row.plan is None]
    return "\n".join(lines)
