"""Plan a run on a cluster: layout, memory, time and cost."""

import dataclasses
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.base.figures import format_count, format_days, format_money
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.model.recipes.requested import RecipeRequest
from megatron_sov.plan.footprint.gpu_capacity import (
    find_fullest_stage, find_imbalance_limit, find_nearest_layout, format_imbalance_limit, get_usable_bytes,
    refuse_on_nodes, refuse_too_large)
from megatron_sov.plan.footprint.memory import MemoryAccount
from megatron_sov.plan.pages.layout_report import (
    SweepReport, format_layout, format_model_size, format_set_options, format_submit_command)
from megatron_sov.plan.pages.quotes import (
    Quote, build_tables, format_gib, format_table, list_notes, quote_to_json, sum_quotes)
from megatron_sov.plan.pricing import (
    Machines, Pricing, build_pricing, list_run_stages, quote_stage, refuse_precision)
from megatron_sov.plan.search.local_search import DefaultLayout, choose_layout, leaves_layout_open
from megatron_sov.plan.search.sweep import (
    SweepSearch, count_layouts, find_fewest_nodes, format_node_advice, has_fitting_layout, search_layouts)
from megatron_sov.schedules import Schedule
from megatron_sov.work.clusters.chips import Chip
from megatron_sov.work.clusters.units import SECONDS_PER_DAY
from megatron_sov.work.progress.progress_bar import create_bar

MIN_ITEM_SHARE = 0.0005
"""The memory line leaves out items with a smaller share of the total."""
UNSEEN_ERROR = 0.25
"""Relative error that covers nine tenths of the runs outside the fit (`plan_calibration.txt` in
benchmarks/results)."""
REFERENCE_TOKENS = 1_000_000_000_000
"""Token count for the headline's second price, for pretraining runs with less than half as many tokens."""
ROUNDS_OBJECTIVE = "policy"
ROUNDS = "rounds of reinforcement learning are not priced; multiply the seconds of one round of `rl run`"
LENGTH_SETTINGS = ("train.tokens", "train.steps", "train.epochs", "rollout.rounds", "data.phases")
"""Settings that change a run's token count, in addition to `data.phases.N.tokens`."""


@dataclass(frozen=True)
class ClusterPlan:
    """A run's layout, memory and price on a cluster."""

    config: RunConfig
    machines: Machines
    length_source: str
    """Setting that decides the token count, or "the recipe's"."""
    quotes: list[Quote]
    """One quote per stage; empty if the profile does not name its GPUs."""
    sweep: SweepReport | None = None
    """Result from --sweep."""
    default: DefaultLayout | None = None
    """Result from `choose_layout`, which runs if the user sets no layout."""

    @cached_property
    def _fullest(self) -> tuple[int, MemoryAccount]:
        return find_fullest_stage(self.config, self.machines.num_ranks)

    def to_json(self) -> dict[str, Any]:
        (stage, account), chip = self._fullest, self.machines.chip
        values: dict[str, Any] = {
            "headline": self.format_headline(), "length_source": self.length_source,
            "processes": self.machines.num_ranks, "layout": dataclasses.asdict(self.config.parallel),
            "gpu": chip.name if chip else None, "fullest_stage": stage + 1,
            "memory_bytes": account.components() | {"total": account.total}}
        if chip and self.config.parallel.ep > 1:  # null: all tokens on one process fit
            limit = find_imbalance_limit(self.config, self.machines.num_ranks, chip)
            values["imbalance_limit"] = limit if limit < math.inf else None
        if self.quotes:
            values["stages"] = [quote_to_json(q) for q in self.quotes]
            values["totals"] = dataclasses.asdict(sum_quotes(self.quotes))
        if self.default:
            values["layout_search"] = dataclasses.asdict(self.default)
        if self.sweep:
            values["sweep"] = self.sweep.to_json()
        return values

    def format_headline(self) -> str:
        """Format one line: parameters, tokens and their source, GPUs, time and cost."""
        line = f"{format_model_size(self.config)} on {self._format_length()}, {format_gpus(self.machines)}"
        if not self.quotes:
            return line
        total = sum_quotes(self.quotes)
        line = f"{line}: {_format_time_and_cost(total.days, total.cost_usd)}"
        is_pretraining = self.config.objective.name == "lm" and not self.config.extend.stages
        if is_pretraining and 0 < total.tokens < REFERENCE_TOKENS / 2:
            share = REFERENCE_TOKENS / total.tokens
            price = _format_time_and_cost(total.days * share, total.cost_usd * share)
            line += f"; {format_count(REFERENCE_TOKENS)} tokens: {price}"
        return line

    def format_text(self) -> str:
        """Format the headline, layout and memory, then the tables for `quotes`."""
        lines = [self.format_headline(), *([self.default.format_line()] if self.default else []),
                 format_memory_lines(self.config, self.machines.num_ranks, self.machines.chip)]
        parts = ["\n".join(lines)]
        if self.sweep:
            parts += [format_table(self.sweep.build_table()), "\n".join(self.sweep.list_lines())]
        if self.quotes:
            parts += [format_table(table) for table in build_tables(self.quotes)]
            parts.append("\n".join([self._format_uncertainty(), *list_notes(self.quotes)]))
        else:
            reason = ROUNDS if self._has_rounds() else explain_missing_price(self.machines)
            parts.append(f"no price: {reason}")
        if self.sweep:
            parts.append(f"settings: {format_set_options(self.sweep.settings) or 'as the recipe has them'}\n"
                         f"submit:   {self.sweep.submit}")
        return "\n\n".join(parts)

    def _has_rounds(self) -> bool:
        return self.config.objective.name == ROUNDS_OBJECTIVE

    def count_tokens(self) -> int:
        """Count the run's training tokens, padding included."""
        if self.config.extend.stages and self.quotes:
            return sum_quotes(self.quotes).tokens
        schedule = Schedule(self.config)
        return schedule.count_tokens(schedule.num_steps - 1)

    def _format_length(self) -> str:
        if self._has_rounds():
            return f"{self.config.rollout.rounds:,} rounds ({self.length_source})"
        return f"{format_count(self.count_tokens())} tokens ({self.length_source})"

    def _format_uncertainty(self) -> str:
        seconds = sum_quotes(self.quotes).days * SECONDS_PER_DAY
        low, high = seconds / (1 + UNSEEN_ERROR), seconds * (1 + UNSEEN_ERROR)
        return (f"In nine of ten cases the time is {format_days(low)} to {format_days(high)} "
                "(docs/plan.md).")


def _format_time_and_cost(days: float, usd: float) -> str:
    return f"{format_days(days * SECONDS_PER_DAY)}, {format_money(usd)}"


def format_gpus(machines: Machines) -> str:
    """Format node and GPU counts: `8 x 8 H100-80GB`."""
    nodes = f"{machines.nodes:,} x " if machines.nodes > 1 else ""
    kind = machines.chip.name if machines.chip else "processes"
    return f"{nodes}{machines.profile.tasks_per_node} {kind}"


def format_memory_lines(config: RunConfig, num_ranks: int, chip: Chip | None = None) -> str:
    """Format the layout, the fullest process's `MemoryAccount` in GiB, and the largest load of experts, in a
    line each."""
    stage, account = find_fullest_stage(config, num_ranks)
    components = account.components() | ({"on_host": account.on_host} if account.on_host else {})
    least = max(MIN_ITEM_SHARE * account.total, 1)
    items = ", ".join(f"{item.replace('_', ' ')} {format_gib(n)}" for item, n in components.items()
                      if n >= least or item in ("weights", "gradients", "optimizer"))
    if chip:
        count, limit = f"{num_ranks:,} GPUs", f" of {format_gib(get_usable_bytes(chip))} GiB per GPU"
    else:
        count, limit = f"{num_ranks:,} process{'es' if num_ranks > 1 else ''}", " GiB per process"
    room = ""
    if chip and config.parallel.ep > 1:
        room = "\nexperts: " + format_imbalance_limit(config, find_imbalance_limit(config, num_ranks, chip))
    pp, dispatcher = config.parallel.pp, config.parallel.expert_dispatcher
    position = f" (pipeline stage {stage + 1} of {pp})" if pp > 1 else ""
    kernels = f", experts by {dispatcher}" if dispatcher in ("deepep", "hybridep") else ""
    return (f"{count}: {config.parallel.format_sizes()}{kernels}\n"
            f"memory: {format_gib(account.total)}{limit}{position}: {items}{room}")


def find_length_source(request: RecipeRequest) -> str:
    """Return the user's setting that decides a run's token count; without such a setting, the recipe or the
    default `train.epochs` over --data."""
    for setting in reversed([*sorted(request.layered), *request.settings]):
        key = setting.partition("=")[0]
        if key in LENGTH_SETTINGS or (key.startswith("data.phases.") and key.endswith(".tokens")):
            return key
    epochs = request.base.train.epochs
    if request.is_model_only and epochs:
        return f"{epochs:g} epoch{'' if epochs == 1 else 's'} of --data"
    return "the recipe's"


def plan_on_cluster(request: RecipeRequest, machines: Machines) -> ClusterPlan:
    """Plan a run in its `config.parallel`; if the user sets no layout, `choose_layout` chooses. Raises
    `UserError`: invalid settings, too little memory, or a profile without the fields that a price needs."""
    config, settings = request.config(), list(request.settings)
    pricing, default = build_pricing(machines), None
    if leaves_layout_open(request):
        chosen, default = choose_layout(config, machines, settings)
        if pricing and default is None:
            _refuse_few_nodes(config, apply_settings(config, list(chosen)), pricing, settings)
        config, settings = apply_settings(config, list(chosen)), [*settings, *chosen]
    config.check(machines.num_ranks)
    if pricing:
        refuse_precision(config, pricing.chip)
        _refuse_too_large(config, pricing)
    _refuse_on_host(config, machines)
    return ClusterPlan(config, machines, find_length_source(request),
                       quote_run(config, pricing, settings) if pricing else [], default=default)


def plan_with_sweep(request: RecipeRequest, machines: Machines, recipe: Sequence[str]) -> ClusterPlan:
    """Plan a run in the fastest fitting layout (`search_layouts`); layout settings in --set stay fixed.
    `recipe`: command-line words that name the recipe, for the submit command. Raises `UserError`: no layout
    fits, or the profile does not name its GPUs."""
    pricing = build_pricing(machines)
    if pricing is None:
        raise UserError(f"--sweep with --cluster {machines.cluster}: {explain_missing_price(machines)}")
    config = request.config()
    fixed = {setting.partition("=")[0] for setting in request.settings}
    pricing.links  # noqa: B018  # raises for incomplete profiles before the search starts
    with create_bar("layouts", count_layouts(config, pricing, fixed), "layout") as bar:
        search = search_layouts(config, pricing, fixed, bar.update)
    if not search.best:
        raise UserError(_explain_no_fit(config, pricing, search, fixed))
    settings = search.best[0].choice.list_settings(config)
    best = apply_settings(config, settings)
    submit = format_submit_command(config, machines, recipe, [*request.settings, *settings])
    _refuse_on_host(best, machines)
    return ClusterPlan(best, machines, find_length_source(request),
                       quote_run(best, pricing, [*request.settings, *settings]),
                       SweepReport(search, machines, settings, submit))


def _refuse_few_nodes(config: RunConfig, searched_config: RunConfig, pricing: Pricing,
                      user_settings: Sequence[str]) -> None:
    """Refuse a run that fits only on more nodes: an error about `config.parallel` would mislead."""
    refuse_precision(config, pricing.chip)
    if not searched_config.problems(pricing.num_ranks):
        return
    nodes = find_fewest_nodes(config, pricing, {setting.partition("=")[0] for setting in user_settings})
    if nodes is not None:
        raise UserError(f"{config.recipe} on {format_gpus(pricing.machines)}: fits nowhere; "
                        f"{format_node_advice(nodes)}")


def _refuse_too_large(config: RunConfig, pricing: Pricing) -> None:
    """Refuse a run that does not fit; suggest `find_nearest_layout`, --sweep or more nodes."""
    try:
        refuse_too_large(config, pricing.num_ranks, pricing.chip)
    except UserError as e:
        if find_nearest_layout(config, pricing.num_ranks, pricing.chip) is not None:
            raise
        way_out = ("--sweep finds one that fits" if has_fitting_layout(config, pricing)
                   else format_node_advice(find_fewest_nodes(config, pricing)))
        raise UserError(f"{e}; {way_out}") from None


def quote_run(config: RunConfig, pricing: Pricing, settings: Sequence[str]) -> list[Quote]:
    """Quote a run's stages (`list_run_stages`); [] for RL rounds, whose engines have no price. `settings`:
    from --set."""
    if config.objective.name == ROUNDS_OBJECTIVE:
        return []
    micro_batch_set = any(s.startswith("train.micro_batch_size=") for s in settings)
    return [quote_stage(stage, pricing)
            for stage in list_run_stages(config, pricing.num_ranks, micro_batch_set=micro_batch_set)]


def _refuse_on_host(config: RunConfig, machines: Machines) -> None:
    profile = machines.profile
    if profile.memory_bytes:
        refuse_on_nodes(config, machines.num_ranks, profile.tasks_per_node, profile.memory_bytes,
                        machines.chip)


def explain_missing_price(machines: Machines) -> str:
    try:
        machines.profile.chip  # noqa: B018  # raises the error that explains it
    except UserError as e:
        return str(e)
    return ""


def _explain_no_fit(config: RunConfig, pricing: Pricing, search: SweepSearch, fixed: Collection[str]) -> str:
    """Return the error for a sweep without a fitting layout: the nearest miss and a fitting node count."""
    machines = pricing.machines
    nodes = f"{machines.nodes:,} node{'s' if machines.nodes > 1 else ''}"
    run = f"{config.recipe} on {nodes} of {machines.profile.gpus_per_node} {pricing.chip.name}"
    misses = [sweep.nearest for sweep in search.sweeps if not sweep.ranked and sweep.nearest is not None]
    if misses:
        lacks_bytes, choice = max(misses, key=lambda miss: miss[0])
        reason = (f"the nearest layout lacks {format_gib(lacks_bytes)} GiB on each GPU "
                  f"({format_layout(choice)})")
    elif all(sweep.ranked for sweep in search.sweeps):
        reason = "each of its stages has layouts, and none is common to all"
    else:
        sweep = next(sweep for sweep in search.sweeps if not sweep.ranked)
        example = sweep.examples[sweep.broken.most_common()[0][0]]
        reason = f"every layout breaks a rule, most of them: {example}"
    return f"{run}: fits nowhere; {reason}; {format_node_advice(find_fewest_nodes(config, pricing, fixed))}"
