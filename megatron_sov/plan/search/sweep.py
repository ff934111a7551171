"""Every layout of a space: which break a rule, which do not fit, and how fast the others are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from megatron_sov.config import ParallelConfig, RunConfig
from megatron_sov.plan.run_stages import RunStage
from megatron_sov.plan.search.space import AXES, Choice, Recompute, Space, layouts
from megatron_sov.settings import Problem

PROCESSES = "must divide the number of processes"
"""How rules on products of sizes end."""


class Scales(Protocol):
    """What a search asks of a cluster."""

    @property
    def num_ranks(self) -> int:
        """Processes."""

    @property
    def limit_bytes(self) -> int:
        """What a run may take of each device; 0: whatever it wants."""

    def needs(self, stage: RunStage) -> int:
        """Return the bytes of the process that needs most."""

    def beside_layers(self, stage: RunStage) -> float:
        """Return what the last pipeline stage computes beside its layers, in units of a layer."""

    def seconds(self, stage: RunStage) -> dict[str, float]:
        """Return component -> seconds of a step, which add up to it."""


@dataclass(frozen=True)
class Found:
    """A layout that a stage can have."""

    choice: Choice
    needs_bytes: int
    """Memory of the process that needs most."""
    seconds: dict[str, float]
    """Component -> seconds of one step."""
    step_s: float


@dataclass
class Sweep:
    """What a search found for one stage."""

    stage: RunStage
    num_looked_at: int = 0
    ranked: list[Found] = field(default_factory=list)
    """Those that fit, fastest first."""
    num_too_large: int = 0
    lacks: dict[tuple[str, object], tuple[int, Choice]] = field(default_factory=dict)
    """(axis, value) -> bytes that the nearest layout with this value lacks, and that layout; of those that do
    not fit.  ("", None) stands for all of them."""
    broken: Counter[str] = field(default_factory=Counter)
    """Rule -> layouts that break it first."""
    examples: dict[str, str] = field(default_factory=dict)
    """Rule -> a sentence that tells it."""

    @property
    def nearest(self) -> tuple[int, Choice] | None:
        """What the layout lacks that comes nearest to fitting; None: all that keep the rules fit."""
        return self.lacks.get(("", None))

    def breaks(self, problem: Problem, count: int) -> None:
        """Count layouts that break a rule."""
        sentence = problem.sentence
        # the same rule with other numbers is one rule, and so are both products of sizes
        rule = (PROCESSES if PROCESSES in sentence
                else re.sub(r"\d[\d.,]*", "N", sentence.partition(";")[0]))
        self.broken[rule] += count
        self.examples.setdefault(rule, sentence)

    def too_large(self, choice: Choice, lacks_bytes: int) -> None:
        """Count a layout that does not fit."""
        self.num_too_large += 1
        for key in (("", None), *values(choice)):
            if key not in self.lacks or lacks_bytes < self.lacks[key][0]:
                self.lacks[key] = lacks_bytes, choice


def values(choice: Choice) -> Iterator[tuple[str, object]]:
    """Yield axis and value of a layout."""
    for axis in AXES[:6]:
        yield axis, getattr(choice.parallel, axis)
    yield "stages", "uneven" if choice.parallel.pipeline_layout else "equal"
    yield "micro_batch_size", choice.micro_batch_size
    yield "recompute", choice.recompute


def sweep(stage: RunStage, space: Space, scales: Scales,
          advance: Callable[[int], object] = lambda count: None) -> Sweep:
    """Look at every layout of a space.

    Args:
        stage: what is to be trained.
        space: values to combine.
        scales: tells what a layout needs and how long its step is.
        advance: is told how many more have been looked at.
    """
    found = Sweep(stage)
    for parallel in layouts(stage.config, space):
        problems = parallel.problems(stage.config.model, scales.num_ranks)
        if problems:
            found.breaks(problems[0], space.variants)
        else:
            _look(found, parallel, space, scales)
        found.num_looked_at += space.variants
        advance(space.variants)
    found.ranked.sort(key=lambda f: (f.step_s, f.needs_bytes))
    return found


def _look(found: Sweep, parallel: ParallelConfig, space: Space, scales: Scales) -> None:
    """Weigh and time layouts that differ in micro-batch and recomputation; the smallest micro-batch first:
    where it does not fit, no larger one does."""
    lacks: dict[Recompute, int] = {}
    for size in sorted(space.micro_batch_size):
        tried = [Choice(parallel, size, recompute) for recompute in space.recompute]
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
                found.ranked.append(Found(choice, needs, seconds, sum(seconds.values())))


def _of_recompute(config: RunConfig) -> list[Problem]:
    """Return the rules that a run breaks among those that recomputation has a part in."""
    gpu, train, optim = config.gpu, config.train, config.optim
    return [*gpu.problems(config.model, config.parallel, train, optim),
            *config.lora.problems(config.model, config.parallel, train, optim, gpu)]


@dataclass(frozen=True)
class Common:
    """A layout that all stages of a run can have."""

    choice: Choice
    needs_bytes: int
    """Of the stage that needs most."""
    by_component: dict[str, float]
    """Component -> seconds of all steps of all stages."""
    seconds: float
    """All of them."""


def common(sweeps: Iterable[Sweep]) -> list[Common]:
    """Return the layouts that fit every stage, fastest over all of their steps first."""
    sweeps = list(sweeps)
    by_choice = [{f.choice: f for f in s.ranked} for s in sweeps]
    found = []
    for choice in (by_choice[0] if by_choice else ()):
        of_stages = [these.get(choice) for these in by_choice]
        here = [f for f in of_stages if f is not None]
        if len(here) == len(sweeps):
            parts: Counter[str] = Counter()
            for f, s in zip(here, sweeps, strict=True):
                parts.update({part: seconds * s.stage.steps for part, seconds in f.seconds.items()})
            found.append(Common(choice, max(f.needs_bytes for f in here), dict(parts), sum(parts.values())))
    return sorted(found, key=lambda c: (c.seconds, c.needs_bytes))

