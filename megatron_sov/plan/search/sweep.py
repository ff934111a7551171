"""Sweep over a run's layouts: broken rules, missing memory, and fitting layouts ranked by speed."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from megatron_sov.base.settings import SettingsProblem
from megatron_sov.model.config import ParallelConfig, RunConfig
from megatron_sov.model.families.count import count_params
from megatron_sov.plan.footprint.gpu_capacity import can_run
from megatron_sov.plan.pricing import Pricing, RunStage, group_stages, list_run_stages, refuse_precision
from megatron_sov.plan.search.space import (
    LayoutChoice, LayoutSpace, Recompute, build_space, iter_choices, iter_layouts)

PROCESSES = "must divide the number of processes"
"""Suffix in rules about products of sizes."""
EVERY_NODE = 32
"""`find_fewest_nodes` tries all node counts up to this number."""
NODES_TRIED = (*range(1, EVERY_NODE + 1),
               *((EVERY_NODE << octave) * quarter // 4 for octave in range(7) for quarter in (5, 6, 7, 8)))


@dataclass(frozen=True)
class SweepResult:
    """A layout that fits a kind of stage."""

    choice: LayoutChoice
    needs_bytes: int
    """Bytes on the fullest process."""
    seconds: dict[str, float]
    """Component -> seconds per step."""
    step_s: float
    slow_step_s: float
    """`step_s` with a host that takes `SLOW_HOST` times as long for launches."""
    rank_s: float
    """`Pricing.compute_rank_s`."""


@dataclass
class Sweep:
    """Outcome over all layouts for a kind of stage."""

    stage: RunStage
    num_looked_at: int = 0
    ranked: list[SweepResult] = field(default_factory=list)
    """Layouts that fit, fastest with a slow host first."""
    num_too_large: int = 0
    nearest: tuple[int, LayoutChoice] | None = None
    """Fewest missing bytes, and the layout; None: all valid layouts fit."""
    broken: Counter[str] = field(default_factory=Counter)
    """Rule -> count of layouts that break the rule first."""
    examples: dict[str, str] = field(default_factory=dict)
    """Rule -> error message for a layout."""

    def record_broken(self, problem: SettingsProblem, count: int) -> None:
        sentence = problem.sentence
        # A rule is counted once, without its numbers; rules about products of sizes too.
        rule = PROCESSES
        if PROCESSES not in sentence:
            rule = re.sub(r"\d[\d.,]*", "N", sentence.partition(";")[0])
        self.broken[rule] += count
        self.examples.setdefault(rule, sentence)

    def record_too_large(self, choice: LayoutChoice, lacks_bytes: int) -> None:
        self.num_too_large += 1
        if self.nearest is None or lacks_bytes < self.nearest[0]:
            self.nearest = lacks_bytes, choice


@dataclass(frozen=True)
class CommonLayout:
    """A layout that fits all stages in a run."""

    choice: LayoutChoice
    needs_bytes: int
    """Bytes on the fullest process over all stages."""
    seconds: float
    """Predicted seconds for all steps in all stages."""
    results: list[SweepResult]
    """A result per kind of stage."""


@dataclass(frozen=True)
class SweepSearch:
    """Sweeps over a run's kinds of stages."""

    config: RunConfig
    sweeps: list[Sweep]
    """A sweep per kind: stages with equal sequence length and batch size share a sweep."""
    names: list[str]
    best: list[CommonLayout]
    """Layouts that fit all stages, fastest with a slow host first."""

    @property
    def num_looked_at(self) -> int:
        return sum(sweep.num_looked_at for sweep in self.sweeps)


def search_layouts(config: RunConfig, pricing: Pricing, fixed: Collection[str] = (),
                   advance: Callable[[int], object] = lambda count: None) -> SweepSearch:
    """Price all layouts for a run; `fixed` names settings that keep their value. Raises `UserError`: the chip
    has no tensor cores for the run's precision."""
    sweeps, names = [], []
    for stage, space, stages in build_stage_spaces(config, pricing, fixed):
        sweeps.append(sweep_stage(stage, space, pricing, advance))
        names.append(", ".join(stage.name for stage in stages))
    return SweepSearch(config, sweeps, names, find_common_layouts(sweeps))


def sweep_stage(stage: RunStage, space: LayoutSpace, pricing: Pricing,
                advance: Callable[[int], object] = lambda count: None) -> Sweep:
    sweep = Sweep(stage)
    for parallel in iter_layouts(stage.config, space):
        problems = parallel.problems(stage.config.model, pricing.num_ranks)
        if problems:
            # A broken rule about `parallel` affects all variants: count the variants without building them.
            sweep.record_broken(problems[0], space.variants)
        else:
            _try_variants(sweep, parallel, space, pricing)
        sweep.num_looked_at += space.variants
        advance(space.variants)
    # ties: least memory first
    sweep.ranked.sort(key=lambda result: (result.rank_s, result.needs_bytes))
    return sweep


def _try_variants(sweep: Sweep, parallel: ParallelConfig, space: LayoutSpace, pricing: Pricing) -> None:
    """Price all micro-batch sizes and recomputations for `parallel`, smallest micro-batch first: if it does
    not fit, larger micro-batches do not."""
    lacks: dict[Recompute, int] = {}
    for size in sorted(space.micro_batch_size):
        choices = [LayoutChoice(parallel, size, recompute) for recompute in space.recompute]
        if len(lacks) == len(choices) and all(lacks.values()):
            for choice in choices:
                sweep.record_too_large(choice, lacks[choice.recompute])
            continue
        stages = [sweep.stage.with_config(choice.apply_to(sweep.stage.config)) for choice in choices]
        # Check all rules once; further choices only need the rules about recomputation.
        problems = stages[0].config.problems(pricing.num_ranks)
        recompute_problems = _find_recompute_problems(stages[0].config)
        general = [problem for problem in problems if problem not in recompute_problems]
        if general:
            sweep.record_broken(general[0], len(choices))
            continue
        for choice, stage in zip(choices, stages, strict=True):
            if problems := _find_recompute_problems(stage.config):
                sweep.record_broken(problems[0], 1)
                continue
            lacking = lacks.get(choice.recompute, 0)
            needs = 0 if lacking else pricing.count_bytes(stage)
            if not lacking and pricing.limit_bytes:
                lacking = lacks[choice.recompute] = max(0, needs - pricing.limit_bytes)
            if lacking:
                sweep.record_too_large(choice, lacking)
            else:
                seconds = pricing.time_step(stage).components
                sweep.ranked.append(SweepResult(
                    choice, needs, seconds, sum(seconds.values()), pricing.time_slow_host(stage).total_s,
                    pricing.compute_rank_s(stage)))


def _find_recompute_problems(config: RunConfig) -> list[SettingsProblem]:
    """Return broken rules that may depend on recomputation."""
    gpu, train, optim = config.gpu, config.train, config.optim
    return [*gpu.problems(config.model, config.parallel, train, optim),
            *config.lora.problems(config.model, config.parallel, train, optim, gpu)]


def find_common_layouts(sweeps: Iterable[Sweep]) -> list[CommonLayout]:
    """Return the layouts that fit all kinds of stages, fastest with a slow host over all steps first."""
    sweeps = list(sweeps)
    results = [{result.choice: result for result in sweep.ranked} for sweep in sweeps]
    layouts = []
    for choice in (results[0] if results else ()):
        if all(choice in by_choice for by_choice in results):
            fitting = [by_choice[choice] for by_choice in results]
            seconds = sum(result.step_s * sweep.stage.steps
                          for result, sweep in zip(fitting, sweeps, strict=True))
            layouts.append(CommonLayout(choice, max(result.needs_bytes for result in fitting), seconds,
                                        fitting))
    return sorted(layouts, key=lambda layout: (sum(result.rank_s for result in layout.results),
                                               layout.needs_bytes))


def group_run_stages(config: RunConfig, num_ranks: int) -> list[tuple[RunStage, list[RunStage]]]:
    """Return a run's kinds of stages: a stage with the kind's total steps, and the kind's stages."""
    # A searched layout sets `train.micro_batch_size`.
    stages = list_run_stages(config, num_ranks, micro_batch_set=True)
    kinds = []
    for first, group in group_stages(stages):
        steps, tokens = sum(stage.steps for stage in group), sum(stage.tokens for stage in group)
        kinds.append((dataclasses.replace(first, steps=steps, tokens=tokens), group))
    return kinds


def build_stage_spaces(config: RunConfig, pricing: Pricing, fixed: Collection[str]
                       ) -> list[tuple[RunStage, LayoutSpace, list[RunStage]]]:
    """Return (stage, search space, stages) per kind of stage. All kinds try the same uneven pipelines,
    because a run has a single layout. Raises `UserError`: the chip has no tensor cores for the run's
    precision."""
    refuse_precision(config, pricing.chip)
    kinds = group_run_stages(config, pricing.num_ranks)
    extra_layers = dict.fromkeys(pricing.estimate_extra_layers(stage) for stage, _ in kinds)
    return [(stage, build_space(stage.config, pricing.num_ranks, pricing.links.domain, fixed, extra_layers),
             stages) for stage, stages in kinds]


def count_layouts(config: RunConfig, pricing: Pricing, fixed: Collection[str] = ()) -> int:
    return sum(space.variants * sum(1 for _ in iter_layouts(stage.config, space))
               for stage, space, _ in build_stage_spaces(config, pricing, fixed))


def find_fewest_nodes(config: RunConfig, pricing: Pricing, fixed: Collection[str] = ()) -> int | None:
    """Return the fewest nodes in `NODES_TRIED`, above `pricing.machines.nodes`, on which all stages fit with
    full recomputation and the smallest micro-batch; None: no count fits."""
    for nodes in NODES_TRIED:
        if nodes > pricing.machines.nodes:
            larger = Pricing(pricing.machines.with_nodes(nodes))
            if has_fitting_layout(config, larger, fixed):
                return nodes
    return None


def format_node_advice(nodes: int | None) -> str:
    """Format the result from `find_fewest_nodes` as an error's last clause."""
    if nodes is None:
        return (f"no number of nodes up to {NODES_TRIED[-1]:,} is enough: set less of the layout, take "
                "larger GPUs, or shorter samples")
    if nodes <= EVERY_NODE:
        return f"the fewest nodes that it fits are {nodes:,}: --nodes {nodes}"
    return f"{nodes:,} nodes are enough: --nodes {nodes}"


def has_fitting_layout(config: RunConfig, pricing: Pricing, fixed: Collection[str] = ()) -> bool:
    """Return whether all stages fit with full recomputation and the smallest micro-batch."""
    if _estimate_least_bytes(config, pricing.num_ranks) > pricing.limit_bytes:
        return False
    for stage, _ in group_run_stages(config, pricing.num_ranks):
        space = build_space(stage.config, pricing.num_ranks, pricing.links.domain, fixed)
        full = tuple(recompute for recompute in space.recompute if recompute[0] is True)
        space = dataclasses.replace(space, micro_batch_size=space.micro_batch_size[:1],
                                    recompute=full or space.recompute)
        # layouts that split the weights most come first
        choices = sorted(iter_choices(stage.config, space), key=lambda choice: -(
            choice.parallel.tp * choice.parallel.pp * choice.parallel.ep * choice.parallel.cp))
        stages = (stage.with_config(choice.apply_to(stage.config)) for choice in choices
                  if not choice.parallel.problems(stage.config.model, pricing.num_ranks))
        if not any(can_run(changed.config, pricing.num_ranks, pricing.limit_bytes) for changed in stages):
            return False
    return True


def _estimate_least_bytes(config: RunConfig, num_ranks: int) -> float:
    """Return a lower bound on a process's bytes: all states sharded evenly."""
    # bf16 weight and gradient, float32 master weight, two bf16 moments; frozen or offloaded: only the weight
    bytes_per_weight = 2 if config.lora.on or config.gpu.optimizer_offload else 2 + 2 + 4 + 2 * 2
    return bytes_per_weight * count_params(config.model).total / num_ranks
