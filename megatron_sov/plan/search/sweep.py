"""Every layout of a space: which break a rule, which do not fit, and how fast the others are."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from megatron_sov.base.settings import SettingsProblem
from megatron_sov.model.config import ParallelConfig, RunConfig
from megatron_sov.model.families.count import count_params
from megatron_sov.plan.pricing import Pricing, RunStage, group_stages, refuse_precision, run_stages
from megatron_sov.plan.search.space import LayoutChoice, LayoutSpace, Recompute, choices, layouts, space_of

PROCESSES = "must divide the number of processes"
"""How rules on products of sizes end."""


@dataclass(frozen=True)
class SweepResult:
    choice: LayoutChoice
    needs_bytes: int
    seconds: dict[str, float]
    """Component -> seconds of one step."""
    step_s: float


@dataclass
class Sweep:
    stage: RunStage
    num_looked_at: int = 0
    ranked: list[SweepResult] = field(default_factory=list)
    """Those that fit, fastest first."""
    num_too_large: int = 0
    nearest: tuple[int, LayoutChoice] | None = None
    """Bytes that the layout lacks that comes nearest to fitting, and that layout; None: all that keep the
    rules fit."""
    broken: Counter[str] = field(default_factory=Counter)
    """Rule -> layouts that break it first."""
    examples: dict[str, str] = field(default_factory=dict)
    """Rule -> a sentence that tells it."""

    def breaks(self, problem: SettingsProblem, count: int) -> None:
        sentence = problem.sentence
        # the same rule with other numbers is one rule, and so are both products of sizes
        rule = (PROCESSES if PROCESSES in sentence else re.sub(r"\d[\d.,]*", "N", sentence.partition(";")[0]))
        self.broken[rule] += count
        self.examples.setdefault(rule, sentence)

    def too_large(self, choice: LayoutChoice, lacks_bytes: int) -> None:
        self.num_too_large += 1
        if self.nearest is None or lacks_bytes < self.nearest[0]:
            self.nearest = lacks_bytes, choice


def sweep(stage: RunStage, space: LayoutSpace, scales: Pricing,
          advance: Callable[[int], object] = lambda count: None) -> Sweep:
    """Look at every layout of a space."""
    found = Sweep(stage)
    for parallel in layouts(stage.config, space):
        problems = parallel.problems(stage.config.model, scales.num_ranks)
        if problems:
            # A rule on the layout breaks all of its variants at once, so they are counted without being
            # built.
            found.breaks(problems[0], space.variants)
        else:
            _look(found, parallel, space, scales)
        found.num_looked_at += space.variants
        advance(space.variants)
    # Ties go to the one that leaves more memory.
    found.ranked.sort(key=lambda f: (f.step_s, f.needs_bytes))
    return found


def _look(found: Sweep, parallel: ParallelConfig, space: LayoutSpace, scales: Pricing) -> None:
    """Weigh and time layouts that differ in micro-batch and recomputation; the smallest micro-batch first:
    where it does not fit, no larger one does."""
    lacks: dict[Recompute, int] = {}
    for size in sorted(space.micro_batch_size):
        tried = [LayoutChoice(parallel, size, recompute) for recompute in space.recompute]
        # A larger micro-batch needs more memory, never less.
        if len(lacks) == len(tried) and all(lacks.values()):
            for choice in tried:
                found.too_large(choice, lacks[choice.recompute])
            continue
        at = [found.stage.with_config(choice.of(found.stage.config)) for choice in tried]
        # all rules, and then for the others those alone that know of recomputation
        problems = at[0].config.problems(scales.num_ranks)
        general = [p for p in problems if p not in _of_recompute(at[0].config)]
        if general:
            found.breaks(general[0], len(tried))
            continue
        for choice, stage in zip(tried, at, strict=True):
            if own := _of_recompute(stage.config):
                found.breaks(own[0], 1)
                continue
            lacking = lacks.get(choice.recompute, 0)
            needs = 0 if lacking else scales.needs(stage)
            if not lacking and scales.limit_bytes:
                lacking = lacks[choice.recompute] = max(0, needs - scales.limit_bytes)
            if lacking:
                found.too_large(choice, lacking)
            else:
                seconds = scales.seconds(stage)
                found.ranked.append(SweepResult(choice, needs, seconds, sum(seconds.values())))


def _of_recompute(config: RunConfig) -> list[SettingsProblem]:
    """Return the rules that a run breaks among those that recomputation has a part in."""
    gpu, train, optim = config.gpu, config.train, config.optim
    return [*gpu.problems(config.model, config.parallel, train, optim),
            *config.lora.problems(config.model, config.parallel, train, optim, gpu)]


@dataclass(frozen=True)
class Common:
    choice: LayoutChoice
    needs_bytes: int
    seconds: float
    """Of all steps of all stages."""


def common(sweeps: Iterable[Sweep]) -> list[Common]:
    """Return the layouts that fit every stage, fastest over all of their steps first."""
    sweeps = list(sweeps)
    by_choice = [{f.choice: f for f in s.ranked} for s in sweeps]
    found = []
    for choice in (by_choice[0] if by_choice else ()):
        of_stages = [these.get(choice) for these in by_choice]
        here = [f for f in of_stages if f is not None]
        if len(here) == len(sweeps):
            seconds = sum(f.step_s * s.stage.steps for f, s in zip(here, sweeps, strict=True))
            found.append(Common(choice, max(f.needs_bytes for f in here), seconds))
    return sorted(found, key=lambda c: (c.seconds, c.needs_bytes))


# The best layouts of a run on a cluster: of each kind of stage apart, and of all of them together.


EVERY_NODE = 32
"""Up to so many nodes each number is tried where nothing fits."""
NODES_TRIED = (*range(1, EVERY_NODE + 1),
               *((EVERY_NODE << octave) * quarter // 4 for octave in range(7) for quarter in (5, 6, 7, 8)))
"""Numbers of nodes that are tried."""


@dataclass(frozen=True)
class SweepSearch:
    config: RunConfig
    sweeps: list[Sweep]
    """One for each kind of stage: stages of equal length and batch are one kind."""
    names: list[str]
    best: list[Common]
    """Layouts that fit all stages, fastest first."""

    @property
    def num_looked_at(self) -> int:
        """Layouts, each for each kind of stage."""
        return sum(s.num_looked_at for s in self.sweeps)

    def found(self, choice: LayoutChoice) -> list[SweepResult | None]:
        """Return what was found of a layout for each kind of stage; None: it does not fit there."""
        return [next((f for f in s.ranked if f.choice == choice), None) for s in self.sweeps]


def kinds(config: RunConfig, num_ranks: int) -> list[tuple[RunStage, list[RunStage]]]:
    """Return the stages of a run by kind, each with its steps together."""
    # a searched layout says its micro-batch itself
    stages = run_stages(config, num_ranks, micro_batch_set=True)
    return [(dataclasses.replace(first, steps=sum(s.steps for s in same), tokens=sum(s.tokens for s in same)),
             same) for first, same in group_stages(stages)]


def search(config: RunConfig, pricing: Pricing, fixed: Collection[str] = (),
           advance: Callable[[int], object] = lambda count: None) -> SweepSearch:
    """Look at every layout of a run.

    Raises:
        UserError: the chip has no products in the run's precision.
    """
    found, names = [], []
    for stage, space, same in stage_spaces(config, pricing, fixed):
        found.append(sweep(stage, space, pricing, advance))
        names.append(", ".join(s.name for s in same))
    return SweepSearch(config, found, names, common(found))


def stage_spaces(config: RunConfig, pricing: Pricing,
            fixed: Collection[str]) -> list[tuple[RunStage, LayoutSpace, list[RunStage]]]:
    """Return the stages of a run by kind, each with its space: uneven pipelines that suit one of them are
    looked at for all, since one layout is to serve them all.

    Raises:
        UserError: the chip has no products in the run's precision.
    """
    refuse_precision(config, pricing.chip)
    of = kinds(config, pricing.num_ranks)
    beside = dict.fromkeys(pricing.beside_layers(stage) for stage, _ in of)
    return [(stage, space_of(stage.config, pricing.num_ranks, pricing.links.domain, fixed, beside), same)
            for stage, same in of]


def num_layouts(config: RunConfig, pricing: Pricing, fixed: Collection[str] = ()) -> int:
    return sum(space.variants * sum(1 for _ in layouts(stage.config, space))
               for stage, space, _ in stage_spaces(config, pricing, fixed))


def fewest_nodes(config: RunConfig, pricing: Pricing, fixed: Collection[str] = ()) -> int | None:
    """Return the fewest of `NODES_TRIED`, above those that are there, on which some layout fits every stage;
    None: there is none.

    Only layouts that recompute everything are tried, a sample at a time: they need least."""
    for nodes in NODES_TRIED:
        if nodes > pricing.machines.nodes:
            more = Pricing(pricing.machines.with_nodes(nodes), pricing.parameters)
            if fits_somehow(config, more, fixed):
                return nodes
    return None


def _least_bytes(config: RunConfig, num_ranks: int) -> float:
    """Return what a process needs at least if everything is shared evenly."""
    # The least any setting allows: bf16 weight and gradient, float32 master, two bf16 moments.
    of_a_weight = 2 if config.lora.on or config.gpu.optimizer_offload else 2 + 2 + 4 + 2 * 2
    return of_a_weight * count_params(config.model).total / num_ranks


def told_nodes(nodes: int | None) -> str:
    if nodes is None:
        return (f"no number of nodes up to {NODES_TRIED[-1]:,} is enough: set less of the layout, take "
                "larger GPUs, or shorter samples")
    return (f"the fewest nodes that it fits are {nodes:,}: --nodes {nodes}" if nodes <= EVERY_NODE
            else f"{nodes:,} nodes are enough: --nodes {nodes}")


def fits_somehow(config: RunConfig, pricing: Pricing, fixed: Collection[str] = ()) -> bool:
    """Return whether every stage of a run has a layout that fits, of those that need least."""
    if _least_bytes(config, pricing.num_ranks) > pricing.limit_bytes:
        return False
    for stage, _ in kinds(config, pricing.num_ranks):
        space = space_of(stage.config, pricing.num_ranks, pricing.links.domain, fixed)
        whole = tuple(r for r in space.recompute if r[0] is True)
        space = dataclasses.replace(space, micro_batch_size=space.micro_batch_size[:1],
                                    recompute=whole or space.recompute)
        if not _any_fits(stage, space, pricing):
            return False
    return True


def _any_fits(stage: RunStage, space: LayoutSpace, pricing: Pricing) -> bool:
    # those that share weights most come first
    tried = sorted(choices(stage.config, space),
                   key=lambda c: -c.parallel.tp * c.parallel.pp * c.parallel.ep * c.parallel.cp)
    for choice in tried:
        if not choice.parallel.problems(stage.config.model, pricing.num_ranks):
            at = stage.with_config(choice.of(stage.config))
            if not at.config.problems(pricing.num_ranks) and pricing.needs(at) <= pricing.limit_bytes:
                return True
    return False
