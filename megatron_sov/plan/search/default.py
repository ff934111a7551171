"""The layout that `plan` and `submit` choose if the user sets none: the fastest one that a local search finds
and that leaves a share of each GPU's memory unused.

A full sweep prices every layout and takes up to minutes.  The local search prices a coarse grid, then changes
one coordinate of the best layouts at a time until no change helps; it prices some hundreds to thousands of
layouts, in seconds (tests/plan/test_default.py compares its choices with full sweeps)."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_sov.base.errors import UserError
from megatron_sov.base.figures import format_days, format_share
from megatron_sov.model import recipes
from megatron_sov.model.config import ParallelConfig, RunConfig, apply_settings
from megatron_sov.model.recipes.requested import RecipeRequest
from megatron_sov.plan.pricing import Machines, Pricing, RunStage, pricing
from megatron_sov.plan.search.recommended import recommended, says_layout, settings_for
from megatron_sov.plan.search.space import LayoutChoice, LayoutSpace, layouts, own_choice
from megatron_sov.plan.search.sweep import stage_spaces
from megatron_sov.plan.speed.parameters import Parameters

SPARE_SHARE = 0.1
"""Share of the memory that a run may take of a GPU which the chosen layout leaves unused, if one can."""
NUM_STARTS = 6
"""Layouts of the grid from which the local search starts."""
Cost = tuple[int, float]
"""0 and seconds of all steps if a layout fits; 1 and the bytes that it lacks; 2 if it breaks a rule."""
BROKEN: Cost = (2, 0.0)
SEARCHED = ("tp", "pp", "vpp", "pipeline_layout", "cp", "ep", "etp", "zero1", "expert_overlap")
PIPELINE = ("pp", "vpp", "pipeline_layout")
VARIED = ((*PIPELINE, "expert_overlap"), ("ep", "etp", "expert_overlap"), ("tp", "etp"), ("tp", "cp"),
          ("zero1",), (*PIPELINE, "ep"), ("pp", "tp"))
"""Settings that one move of the local search changes together."""


@dataclass(frozen=True)
class DefaultLayout:
    """The layout that a run gets on a cluster."""

    settings: tuple[str, ...]
    """What makes it of the run's own settings, as --set takes it."""
    seconds: float
    """Predicted time of all steps."""
    own_seconds: float
    """Predicted time of all steps with the recipe's own layout; infinite if that does not fit at all."""
    own_spare_share: float
    """Share of the usable GPU memory that the recipe's own layout leaves; negative if it does not fit."""
    num_priced: int
    """Layouts that were priced."""
    spare_share: float
    """Share of the usable GPU memory that the layout leaves; below `SPARE_SHARE` if no layout leaves more."""

    def line(self) -> str:
        """Return the line of a plan on how the layout was chosen."""
        own = "does not fit"
        if self.own_seconds < math.inf:
            own = f"takes {format_days(self.own_seconds)} and leaves {format_share(self.own_spare_share)}"
        return (f"layout: fastest of {self.num_priced:,} priced, {format_days(self.seconds)} of training, "
                f"leaves {format_share(self.spare_share)} of the GPU's memory; the recipe's own {own}")


def leaves_layout_open(request: RecipeRequest) -> bool:
    """Return whether neither --set, nor a file, nor a recipe of the user's own sets a run's layout, its
    micro-batch or what it recomputes."""
    base = request.base
    known = recipes.get(base.recipe).parallel if base.recipe in recipes.names() else ParallelConfig()
    return not request.from_file and not says_layout(request.settings) and base.parallel == known


def choose_layout(config: RunConfig, machines: Machines, said: Sequence[str],
                  learned: Parameters | None = None) -> tuple[tuple[str, ...], DefaultLayout | None]:
    """Return the settings of the layout that a search finds, with that search; if it finds none, those of the
    recommended layout."""
    found = find_layout(config, machines, said, learned)
    return (recommended_settings(config, machines, said), None) if found is None else (found.settings, found)


def recommended_settings(config: RunConfig, machines: Machines, said: Sequence[str]) -> tuple[str, ...]:
    """Return the settings of the layout that is recommended for a run on a cluster; () if none is."""
    gpu = machines.profile.gpu if machines.profile.gpus_per_node else ""
    return settings_for(config, machines.num_ranks, gpu, said)


def find_layout(config: RunConfig, machines: Machines, said: Sequence[str] = (),
                learned: Parameters | None = None) -> DefaultLayout | None:
    """Search the layout of a run for a cluster whose GPUs are known.

    Args:
        config: the run; kernels and precision stay as they are set.
        machines: the cluster.
        said: settings as the user passed them to --set, which stay.
        learned: parameters of speed; None: those of the package.

    Returns:
        The fastest layout found; None if none fits, the profile does not describe its GPUs and links, or the
        run consists of rounds of reinforcement learning, whose recommended layout can be run.
    """
    prices = pricing(machines, learned)
    if prices is None:
        return None
    placed = apply_settings(config, list(recommended_settings(config, machines, said)))
    if config.objective.name == "policy" and not placed.problems(machines.num_ranks):
        return None
    try:
        return LocalSearch(config, prices, said).run()
    except UserError:
        return None


class LocalSearch:
    """Coordinate descent over layouts, from the cheapest layouts of a coarse grid."""

    def __init__(self, config: RunConfig, prices: Pricing, said: Sequence[str]) -> None:
        # kernels and dispatchers that the recipe recommends for these GPUs, which the search does not vary
        own = recommended(config, prices.num_ranks, prices.machines.profile.gpu, said) or ()
        self.own_settings, self.config = own, apply_settings(config, list(own))
        self.prices = prices
        spaces = stage_spaces(self.config, prices, {setting.partition("=")[0] for setting in said})
        self.stages: list[RunStage] = [stage for stage, _, _ in spaces]
        self.space: LayoutSpace = spaces[0][1]
        self.valid = [parallel for parallel in layouts(self.config, self.space)
                      if not parallel.problems(config.model, prices.num_ranks)]
        self.neighbours: list[dict[tuple[object, ...], list[ParallelConfig]]] = []
        for varied in VARIED:
            alike = defaultdict(list)
            for parallel in self.valid:
                alike[_others(parallel, varied)].append(parallel)
            self.neighbours.append(alike)
        self.costs: dict[LayoutChoice, Cost] = {}
        self.limit_bytes = 0.0
        self._needs: dict[LayoutChoice, int | None] = {}
        self._seconds: dict[LayoutChoice, float] = {}

    def run(self) -> DefaultLayout | None:
        """Return the best layout that leaves `SPARE_SHARE`, else the best that fits at all, else None."""
        for spare in (SPARE_SHARE, 0.0):
            self.limit_bytes = (1 - spare) * self.prices.limit_bytes
            self.costs.clear()
            best = min((self.descend(start) for start in self.starts()), key=self.cost)
            if self.cost(best)[0] == 0:
                return self.describe(best)
        return None

    def describe(self, best: LayoutChoice) -> DefaultLayout:
        """Return the settings of a layout, its time, and the time of the recipe's own layout."""
        seconds, num_priced = self.cost(best)[1], len(self.costs)
        self.limit_bytes = self.prices.limit_bytes
        self.costs.clear()
        own = self.cost(own_choice(self.config))
        # of a layout that does not divide these processes there is no memory to count
        own_spare = -math.inf if own == BROKEN else self.spare_share(own_choice(self.config))
        settings = {setting.partition("=")[0]: setting
                    for setting in (*self.own_settings, *best.settings(self.config))}
        return DefaultLayout(tuple(settings.values()), seconds, own[1] if own[0] == 0 else math.inf,
                             own_spare, num_priced, self.spare_share(best))

    def spare_share(self, choice: LayoutChoice) -> float:
        """Return which share of the usable memory the fullest GPU leaves; of a layout that breaks no rule."""
        needs = self.needs(choice)
        assert needs is not None, choice
        return 1 - needs / self.prices.limit_bytes

    def needs(self, choice: LayoutChoice) -> int | None:
        """Return the bytes of the fullest GPU over all stages; None if the layout breaks a rule of one."""
        if choice not in self._needs:
            at = self._stages(choice)
            broken = any(stage.config.problems(self.prices.num_ranks) for stage in at)
            self._needs[choice] = None if broken else max(map(self.prices.needs, at))
        return self._needs[choice]

    def seconds(self, choice: LayoutChoice) -> float:
        """Return the predicted seconds of all steps."""
        if choice not in self._seconds:
            self._seconds[choice] = sum(sum(self.prices.seconds(stage).values()) * stage.steps
                                        for stage in self._stages(choice))
        return self._seconds[choice]

    def _stages(self, choice: LayoutChoice) -> list[RunStage]:
        return [stage.with_config(choice.of(stage.config)) for stage in self.stages]

    def cost(self, choice: LayoutChoice) -> Cost:
        """Price a layout, each once for a limit of memory."""
        if choice not in self.costs:
            self.costs[choice] = self._price(choice)
        return self.costs[choice]

    def _price(self, choice: LayoutChoice) -> Cost:
        needs = self.needs(choice)
        if needs is None:
            return BROKEN
        lacks = needs - self.limit_bytes
        return (1, lacks) if lacks > 0 else (0, self.seconds(choice))

    def starts(self) -> list[LayoutChoice]:
        """Return the run's own layout, and the cheapest of a grid of sizes, all else at its simplest."""
        grid: dict[tuple[int, ...], ParallelConfig] = {}
        for p in sorted(self.valid, key=_complexity):
            grid.setdefault((p.tp, p.pp, p.cp, p.ep), p)
        cheapest = sorted((self.best_variant(parallel) for parallel in grid.values()), key=self.cost)
        return [own_choice(self.config), *cheapest[:NUM_STARTS]]

    def best_variant(self, parallel: ParallelConfig) -> LayoutChoice:
        """Return the cheapest micro-batch and recomputation for sizes of a layout."""
        fitting, found = list(self.space.recompute), []
        for size in sorted(self.space.micro_batch_size):
            tried = [LayoutChoice(parallel, size, recompute) for recompute in fitting]
            found += tried
            # a larger micro-batch needs more memory, never less
            fitting = [choice.recompute for choice in tried if self.cost(choice)[0] != 1]
        return min(found, key=self.cost)

    def descend(self, choice: LayoutChoice) -> LayoutChoice:
        """Change one group of coordinates at a time to its best values, until no change helps."""
        improved = True
        while improved:
            before = self.cost(choice)
            for varied, alike in zip(VARIED, self.neighbours, strict=True):
                found = [dataclasses.replace(choice, parallel=p)
                         for p in alike[_others(choice.parallel, varied)]]
                choice = min([choice, *found], key=self.cost)
            choice = self.best_variant(choice.parallel)
            improved = self.cost(choice) < before
        return choice


def _others(parallel: ParallelConfig, varied: Collection[str]) -> tuple[object, ...]:
    """Return the values of every searched setting that is not varied."""
    return tuple(getattr(parallel, name) for name in SEARCHED if name not in varied)


def _complexity(p: ParallelConfig) -> tuple[int, ...]:
    return len(p.pipeline_layout), p.vpp, p.etp, p.expert_overlap != "none", not p.zero1
