"""Search for the layout in `plan` and `submit`: the fastest with a slow host that leaves GPU memory free.

A full sweep takes minutes. The local search prices a coarse grid, then changes a few settings in the best
layouts at a time until no change helps: hundreds to thousands of layouts, in seconds
(tests/plan/test_local_search.py compares its choices with full sweeps)."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from megatron_sov.base.errors import UserError
from megatron_sov.base.figures import format_days, format_share
from megatron_sov.model import recipes
from megatron_sov.model.config import ParallelConfig, RunConfig, apply_settings
from megatron_sov.model.recipes.requested import RecipeRequest
from megatron_sov.plan.footprint.gpu_capacity import SPILL_LIMITS, can_run
from megatron_sov.plan.pricing import Machines, Pricing, RunStage, build_pricing
from megatron_sov.plan.search.recommended_layouts import find_recommended, list_graphs, sets_layout
from megatron_sov.plan.search.space import LayoutChoice, LayoutSpace, get_current_choice, iter_layouts
from megatron_sov.plan.search.sweep import build_stage_spaces
from megatron_sov.plan.speed.step import SLOW_HOST, StepTime

SPARE_SHARE = 0.1
"""Share of usable GPU memory that the chosen layout leaves free, if a layout can."""
SPILL = "gpu.expert_spill"
"""The search sets it, and drops it if the chosen layout fits without."""
NUM_STARTS = 6
"""Grid layouts from which the local search starts."""
LayoutCost = tuple[int, float]
"""(0, `compute_rank_s` over all stages): fits; (1, missing bytes): too large; (2, 0): breaks a rule."""
BROKEN: LayoutCost = (2, 0.0)
SEARCHED = ("tp", "pp", "vpp", "pipeline_layout", "cp", "ep", "etp", "zero1", "expert_overlap")
PIPELINE = ("pp", "vpp", "pipeline_layout")
VARIED = ((*PIPELINE, "expert_overlap"), ("ep", "etp", "expert_overlap"), ("tp", "etp"), ("tp", "cp"),
          ("zero1",), (*PIPELINE, "ep"), ("pp", "tp"))
"""`parallel` settings that a move changes together."""


@dataclass(frozen=True)
class DefaultLayout:
    """Result from the local search."""

    settings: tuple[str, ...]
    """Changes from the run's settings, for --set."""
    seconds: float
    """Predicted seconds for all steps."""
    slow_seconds: float
    """`seconds` with a host that takes `SLOW_HOST` times as long for launches."""
    own_slow_seconds: float
    """`slow_seconds` of the recipe's layout; infinite if the layout does not fit."""
    own_spare_share: float
    """Share of usable GPU memory that the recipe's layout leaves free; negative if it does not fit."""
    num_priced: int
    spare_share: float
    """Share of usable GPU memory that the layout leaves free; below `SPARE_SHARE` if no layout reaches it."""

    def format_line(self) -> str:
        outcome = "does not fit"
        if self.own_slow_seconds < math.inf:
            spare = format_share(self.own_spare_share)
            outcome = f"takes {format_days(self.own_slow_seconds)} and leaves {spare}"
        return (f"layout: fastest of {self.num_priced:,} priced with a host {SLOW_HOST} times as slow, "
                f"{format_days(self.slow_seconds)} of training, leaves {format_share(self.spare_share)} of "
                f"the GPU's memory; the recipe's own {outcome}")


def leaves_layout_open(request: RecipeRequest) -> bool:
    """Return whether the user leaves layout, micro-batch size and recomputation to the search: no --set, no
    --config, no recipe file."""
    base = request.base
    default = recipes.get(base.recipe).parallel if base.recipe in recipes.names() else ParallelConfig()
    return not request.from_file and not sets_layout(request.settings) and base.parallel == default


def choose_layout(config: RunConfig, machines: Machines, user_settings: Sequence[str]
                  ) -> tuple[tuple[str, ...], DefaultLayout | None]:
    """Return `DefaultLayout.settings` and the `DefaultLayout`; if it fails, recommended settings and None."""
    default = find_layout(config, machines, user_settings)
    if default is None:
        return get_cluster_recommendation(config, machines, user_settings), None
    return default.settings, default


def get_cluster_recommendation(config: RunConfig, machines: Machines,
                               user_settings: Sequence[str]) -> tuple[str, ...]:
    """Return the recommended settings for a run on a cluster; () if `RECOMMENDED` has none."""
    gpu = machines.profile.gpu if machines.profile.gpus_per_node else ""
    return find_recommended(config, machines.num_ranks, gpu, user_settings, machines.profile) or ()


def find_layout(config: RunConfig, machines: Machines, user_settings: Sequence[str] = ()
                ) -> DefaultLayout | None:
    """Search for a run's fastest layout on a cluster; kernels, precision and `user_settings` from --set stay
    fixed. None: no layout fits, the profile does not describe its GPUs and links, or an RL run has a valid
    recommended layout."""
    pricing = build_pricing(machines)
    if pricing is None:
        return None
    recommended = apply_settings(config, list(get_cluster_recommendation(config, machines, user_settings)))
    if config.objective.name == "policy" and not recommended.problems(machines.num_ranks):
        return None
    graphs = list_graphs({setting.partition("=")[0] for setting in user_settings}, machines.profile)
    try:
        found = [LocalSearch(config, pricing, user_settings, choice).find_best()
                 for choice in dict.fromkeys(((), graphs))]
    except UserError:
        return None
    layouts = [layout for layout in found if layout is not None]
    if not layouts:
        return None
    best = min(layouts, key=lambda layout: (layout.spare_share < SPARE_SHARE, layout.slow_seconds))
    return dataclasses.replace(best, num_priced=sum(layout.num_priced for layout in layouts))


class LocalSearch:
    """Coordinate descent over `LayoutChoice`, from the cheapest layouts in a coarse grid."""

    def __init__(self, config: RunConfig, pricing: Pricing, user_settings: Sequence[str],
                 graphs: Sequence[str] = ()) -> None:
        fixed = {setting.partition("=")[0] for setting in user_settings}
        # recommended kernels and dispatchers stay fixed
        recommended = get_cluster_recommendation(config, pricing.machines,
                                                 (*user_settings, "gpu.cuda_graphs=[]"))
        may_spill = config.model.num_moe_layers() and not config.gpu.offload_modules and SPILL not in fixed
        self.own_settings = (*([f"{SPILL}={SPILL_LIMITS[0]}"] if may_spill else []), *recommended, *graphs)
        self.config = apply_settings(config, list(self.own_settings))
        self.pricing = pricing
        spaces = build_stage_spaces(self.config, pricing, fixed)
        self.stages: list[RunStage] = [stage for stage, _, _ in spaces]
        self.space: LayoutSpace = spaces[0][1]
        self.valid = [parallel for parallel in iter_layouts(self.config, self.space)
                      if not parallel.problems(config.model, pricing.num_ranks)]
        self.neighbours: list[dict[tuple[object, ...], list[ParallelConfig]]] = []
        for varied in VARIED:
            neighbours = defaultdict(list)
            for parallel in self.valid:
                neighbours[_get_fixed_values(parallel, varied)].append(parallel)
            self.neighbours.append(neighbours)
        self.costs: dict[LayoutChoice, LayoutCost] = {}
        self.limit_bytes = 0.0
        self._bytes: dict[LayoutChoice, int | None] = {}
        self._ranks: dict[LayoutChoice, float] = {}

    def find_best(self) -> DefaultLayout | None:
        """Return the best layout that leaves `SPARE_SHARE` free, else the best fitting layout, else None."""
        for spare in (SPARE_SHARE, 0.0):
            self.limit_bytes = (1 - spare) * self.pricing.limit_bytes
            self.costs.clear()
            best = min((self.descend_from(start) for start in self.list_starts()), key=self.get_cost)
            if self.get_cost(best)[0] == 0:
                return self.describe_layout(best)
        return None

    def describe_layout(self, best: LayoutChoice) -> DefaultLayout:
        """Return the layout's settings and time, next to the recipe's layout."""
        num_priced, searched_bytes = len(self.costs), self.limit_bytes
        self.limit_bytes = self.pricing.limit_bytes
        self.costs.clear()
        current_choice = get_current_choice(self.config)
        current_cost = self.get_cost(current_choice)
        # An invalid layout has no memory account.
        current_bytes = self.count_bytes(current_choice) or math.inf
        settings = {setting.partition("=")[0]: setting
                    for setting in (*self.own_settings, *best.list_settings(self.config))}
        stages = self._apply_to_stages(best)
        stored = [stage.with_config(apply_settings(stage.config, [f"{SPILL}=0"])) for stage in stages]
        if self.can_run(stored, searched_bytes):
            settings.pop(SPILL, None)
            stages = stored
        own_s = math.inf
        if current_cost[0] == 0:
            own_s = _sum_seconds(self._apply_to_stages(current_choice), self.pricing.time_slow_host)
        spare = 1 - max(map(self.pricing.count_bytes, stages)) / self.pricing.limit_bytes
        return DefaultLayout(tuple(settings.values()), _sum_seconds(stages, self.pricing.time_step),
                             _sum_seconds(stages, self.pricing.time_slow_host),
                             own_s, 1 - current_bytes / self.pricing.limit_bytes, num_priced, spare)

    def can_run(self, stages: list[RunStage], limit_bytes: float) -> bool:
        return all(can_run(stage.config, self.pricing.num_ranks, limit_bytes) for stage in stages)

    def count_bytes(self, choice: LayoutChoice) -> int | None:
        """Return the bytes on the fullest GPU over all stages; None if the layout breaks a rule."""
        if choice not in self._bytes:
            stages = self._apply_to_stages(choice)
            is_broken = any(stage.config.problems(self.pricing.num_ranks) for stage in stages)
            self._bytes[choice] = None if is_broken else max(map(self.pricing.count_bytes, stages))
        return self._bytes[choice]

    def rank(self, choice: LayoutChoice) -> float:
        if choice not in self._ranks:
            self._ranks[choice] = sum(map(self.pricing.compute_rank_s, self._apply_to_stages(choice)))
        return self._ranks[choice]

    def _apply_to_stages(self, choice: LayoutChoice) -> list[RunStage]:
        return [stage.with_config(choice.apply_to(stage.config)) for stage in self.stages]

    def get_cost(self, choice: LayoutChoice) -> LayoutCost:
        """Return a layout's cost, computed once per `limit_bytes`."""
        if choice not in self.costs:
            num_bytes = self.count_bytes(choice)
            if num_bytes is None:
                self.costs[choice] = BROKEN
            elif num_bytes > self.limit_bytes:
                self.costs[choice] = (1, num_bytes - self.limit_bytes)
            else:
                self.costs[choice] = (0, self.rank(choice))
        return self.costs[choice]

    def list_starts(self) -> list[LayoutChoice]:
        """Return the run's layout, and the cheapest layouts in a grid over `tp`, `pp`, `cp` and `ep`, with
        further settings at their simplest."""
        grid: dict[tuple[int, ...], ParallelConfig] = {}
        for p in sorted(self.valid, key=_rank_complexity):
            grid.setdefault((p.tp, p.pp, p.cp, p.ep), p)
        cheapest = sorted((self.find_best_variant(parallel) for parallel in grid.values()), key=self.get_cost)
        return [get_current_choice(self.config), *cheapest[:NUM_STARTS]]

    def find_best_variant(self, parallel: ParallelConfig) -> LayoutChoice:
        """Return the cheapest micro-batch size and recomputation for `parallel` settings."""
        recomputes, variants = list(self.space.recompute), []
        for size in sorted(self.space.micro_batch_size):
            choices = [LayoutChoice(parallel, size, recompute) for recompute in recomputes]
            variants += choices
            # A larger micro-batch never needs less memory.
            recomputes = [choice.recompute for choice in choices if self.get_cost(choice)[0] != 1]
        return min(variants, key=self.get_cost)

    def descend_from(self, choice: LayoutChoice) -> LayoutChoice:
        """Set a group in `VARIED` at a time to its best values, until no change helps."""
        is_improved = True
        while is_improved:
            previous_cost = self.get_cost(choice)
            for varied, neighbours in zip(VARIED, self.neighbours, strict=True):
                moves = [dataclasses.replace(choice, parallel=parallel)
                         for parallel in neighbours[_get_fixed_values(choice.parallel, varied)]]
                choice = min([choice, *moves], key=self.get_cost)
            choice = self.find_best_variant(choice.parallel)
            is_improved = self.get_cost(choice) < previous_cost
        return choice


def _sum_seconds(stages: list[RunStage], time_step: Callable[[RunStage], StepTime]) -> float:
    return sum(time_step(stage).total_s * stage.steps for stage in stages)


def _get_fixed_values(parallel: ParallelConfig, varied: Collection[str]) -> tuple[object, ...]:
    """Return the values in `SEARCHED` outside `varied`."""
    return tuple(getattr(parallel, name) for name in SEARCHED if name not in varied)


def _rank_complexity(p: ParallelConfig) -> tuple[int, ...]:
    return len(p.pipeline_layout), p.vpp, p.etp, p.expert_overlap != "none", not p.zero1
