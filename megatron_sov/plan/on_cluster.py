"""A run on a cluster: its layout, what it needs, what it takes; or why it cannot be there."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.model.recipes.requested import RecipeRequest
from megatron_sov.plan.calibration.expected import LearnedCorrection
from megatron_sov.plan.calibration.fitting import fullest, nearest, refuse_on_nodes, refuse_too_large
from megatron_sov.plan.footprint.memory import Account
from megatron_sov.plan.pages import quote as quote_tables
from megatron_sov.plan.pages.quote import Quote, as_json, gib, totals
from megatron_sov.plan.pages.telling import PlanText, name, set_line, size_line, sizes, submit_line
from megatron_sov.plan.post_training import covers, quotes
from megatron_sov.plan.pricing import Machines, Pricing, pricing, quote, refuse_precision, run_stages
from megatron_sov.plan.search.default import DefaultLayout, find_layout, leaves_layout_open
from megatron_sov.plan.search.recommended import settings_for
from megatron_sov.plan.search.space import own_choice
from megatron_sov.plan.search.sweep import (
    SweepSearch, fewest_nodes, fits_somehow, num_layouts, search, told_nodes)
from megatron_sov.work.clusters.chips import Chip
from megatron_sov.work.clusters.units import GIB
from megatron_sov.work.progress.progress_bar import work_bar

LEAST_SHOWN_SHARE = 0.0005
"""Items of memory that one line has no place for are smaller."""
UNSEEN_ERROR = 0.25
"""Nine tenths of the speeds of sources that the fit never saw lie within it
(benchmarks/results/plan_calibration.txt)."""


@dataclass(frozen=True)
class PlacedPlan:
    config: RunConfig
    machines: Machines
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
            "processes": self.machines.num_ranks, "layout": dataclasses.asdict(self.config.parallel),
            "gpu": chip.name if chip else None, "fullest_stage": stage + 1,
            "memory_bytes": needs.components() | {"total": needs.total}}
        if self.quotes:
            found |= {"stages": [as_json(q) for q in self.quotes],
                      "totals": quote_tables.totals_json(totals(self.quotes))}
        found |= {"layout_search": dataclasses.asdict(self.default)} if self.default else {}
        return found | ({"sweep": self.told.as_json()} if self.told else {})

    def as_text(self) -> str:
        """Return size, days, layout, memory, and the tables of what it takes."""
        parts = ["\n".join([size_line(self.config), *self._days(),
                            memory_lines(self.config, self.machines.num_ranks, self.machines.chip)])]
        if self.told:
            parts += [quote_tables.text(self.told.table()), "\n".join(self.told.lines())]
        if self.quotes:
            parts += [quote_tables.text(table) for table in quote_tables.tables(self.quotes)]
            parts.append("\n".join(quote_tables.notes(self.quotes)))
        else:
            parts.append(f"no price: {_unknown(self.machines)}")
        if self.told:
            parts.append(f"settings: {set_line(self.told.settings) or 'as the recipe has them'}\n"
                         f"submit:   {self.told.submit}")
        return "\n\n".join(parts)

    def _days(self) -> list[str]:
        """Return a line on how long it takes, with the interval of what is not known."""
        if not self.quotes:
            return []
        days = totals(self.quotes).days
        low, high = days / (1 + UNSEEN_ERROR), days * (1 + UNSEEN_ERROR)
        return [f"{days:,.1f} days, {low:,.1f} to {high:,.1f} in nine "
                "of ten cases (docs/plan_speed.md)", *([self.default.line()] if self.default else [])]


def memory_lines(config: RunConfig, num_ranks: int, chip: Chip | None = None) -> str:
    """Return the layout of a run, and what its fullest process needs of memory."""
    stage, needs = fullest(config, num_ranks)
    shown = needs.components() | ({"on_host": needs.on_host} if needs.on_host else {})
    items = ", ".join(f"{item.replace('_', ' ')} {_gib(n)}" for item, n in shown.items()
                      if n >= max(LEAST_SHOWN_SHARE * needs.total, 1)
                      or item in ("weights", "gradients", "optimizer"))
    return (f"{num_ranks:,} process{'es' if num_ranks > 1 else ''}{' of ' + chip.name if chip else ''}: "
            f"{sizes(config.parallel)}{_kernels(config)}\n"
            f"{_gib(needs.total)} GiB on each of stage {stage + 1}: {items}")


def _kernels(config: RunConfig) -> str:
    """Return what has to be installed for the messages of a run's experts; "": nothing."""
    dispatcher = config.parallel.expert_dispatcher
    return f", experts by {dispatcher}" if dispatcher in ("deepep", "hybridep") else ""


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f}" if num_bytes >= GIB / 10 else f"{num_bytes / GIB:.2g}"


def placed(request: RecipeRequest, machines: Machines,
           learned: LearnedCorrection | None = None) -> PlacedPlan:
    """Return a run with its own layout, or with the one that a search finds if the user sets none.

    Raises:
        UserError: it breaks a rule, does not fit, or its profile does not say what `plan` has to know.
    """
    config, settings = request.config(), list(request.settings)
    prices, default = pricing(machines, learned), None
    if leaves_layout_open(request):
        default = find_layout(config, machines, settings, learned)
        chosen = list(default.settings) if default else _recommended(config, machines, settings)
        config, settings = apply_settings(config, chosen), settings + chosen
    config.check(machines.num_ranks)
    if prices:
        refuse_precision(config, prices.chip)
        _refuse_too_large(config, prices)
    _refuse_on_host(config, machines)
    return PlacedPlan(config, machines, _quotes(config, prices, settings) if prices else [], default=default)


def searched(request: RecipeRequest, machines: Machines, recipe: Sequence[str],
             learned: LearnedCorrection | None = None) -> PlacedPlan:
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
    with work_bar("layouts", num_layouts(config, prices, fixed), "layout") as bar:
        found = search(config, prices, fixed, bar.update)
    if not found.best:
        raise UserError(_fits_nowhere(config, prices, found, fixed))
    choice = found.best[0].choice
    settings = choice.settings(config)
    best = apply_settings(config, settings)
    otherwise = _recommended(config, machines, request.settings) if leaves_layout_open(request) else []
    told = PlanText(found, machines, own_choice(apply_settings(config, otherwise)), settings,
                    submit_line(config, machines, recipe, [*request.settings, *settings]))
    _refuse_on_host(best, machines)
    return PlacedPlan(best, machines, _quotes(best, prices, [*request.settings, *settings]), told)


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


def _recommended(config: RunConfig, machines: Machines, said: Sequence[str]) -> list[str]:
    """Return the settings of the recommended layout; none where none is."""
    gpu = machines.profile.gpu if machines.profile.gpus_per_node else ""
    return list(settings_for(config, machines.num_ranks, gpu, said))


def _quotes(config: RunConfig, prices: Pricing, settings: Sequence[str]) -> list[Quote]:
    if covers(config):
        return quotes(config, prices)
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
