"""A run's timetable and what a search found, as lines and tables for people and as plain values for
scripts."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_sov.base.figures import format_count, format_seconds
from megatron_sov.model.config import ParallelConfig, RunConfig
from megatron_sov.model.families.count import count_params
from megatron_sov.model.objectives import BUILT_IN
from megatron_sov.plan.pages.quote import QuoteTable, gib
from megatron_sov.plan.pricing import Machines
from megatron_sov.plan.search.space import AXES, LayoutChoice, as_dict
from megatron_sov.plan.search.sweep import Sweep, SweepResult, SweepSearch
from megatron_sov.schedules import Schedule
from megatron_sov.work.clusters.units import HOURS_PER_DAY, SECONDS_PER_HOUR

EVENLY = 12
"""Steps of the table that lie evenly over the run, beside those at which something changes."""
MAX_CHANGES = 24
"""Changes of the batch size that the table shows at most; a ramp may have hundreds."""
BAR_CHARACTERS = 32


@dataclass(frozen=True)
class TimetableRow:
    step: int
    """1-based, as in events."""
    tokens: int
    """Read up to its end, padding counted in."""
    phase: str
    samples: int
    seq_len: int
    lr: float
    lr_share: float
    """The rate beside the largest one of the table."""


def steps_to_show(schedule: Schedule, evenly: int) -> list[int]:
    """Return steps (0-based): the first, the last, where phase or batch size change,
    where the rate turns, and some between."""
    last = schedule.num_steps - 1
    changes = [s.first_step for s in schedule.stretches]
    every = -(-len(changes) // MAX_CHANGES)
    found = {0, last, *changes[::every], *(c - 1 for c in changes[::every] if c)}
    found |= {round(last * i / evenly) for i in range(evenly + 1)}
    return sorted(found | {s for turn in schedule.list_turning_steps() for s in (turn - 1, turn)
                           if 0 <= s <= last})


def timetable_rows(config: RunConfig, evenly: int = EVENLY) -> list[TimetableRow]:
    schedule = Schedule(config)
    steps = steps_to_show(schedule, evenly)
    rates = [schedule.learning_rate(step) for step in steps]
    # a run of one step without warm-up has only the rate at the end of its decay, which may be 0
    highest = max(rates) or 1.0
    found = []
    for step, lr in zip(steps, rates, strict=True):
        stretch = schedule.get_stretch(step)
        name = schedule.phases[stretch.phase].name
        found.append(TimetableRow(step + 1, schedule.count_tokens(step), name, stretch.batch_size,
                                  stretch.seq_len,
                                  lr, lr / highest))
    return found


def size_line(config: RunConfig) -> str:
    """Return how large a run's model is."""
    count = parameters_json(config)
    parts = [f"{format_count(count['total'])} parameters ({format_count(count['active'])} active)"]
    parts += [f"{format_count(count[name])} of {what}" for name, what in (
        ("encoders", "encoders"), ("mtp", "multi-token prediction")) if count[name]]
    return f"{config.recipe}: {', '.join(parts)}"


def parameters_json(config: RunConfig) -> dict[str, int]:
    return asdict(count_params(config.model))


def timetable_text(config: RunConfig) -> str:
    """Return the plan for a terminal; the bars are the learning rate, from 0 to its peak."""
    found = timetable_rows(config)
    width = max(len("phase"), *(len(r.phase) for r in found))
    lines = [f"{'step':>12} {'tokens':>20}  {'phase':<{width}} {'samples':>8} {'length':>8} {'rate':>11}"]
    for r in found:
        bar = "#" * round(BAR_CHARACTERS * r.lr_share)
        line = (f"{r.step:>12,} {r.tokens:>20,}  {r.phase:<{width}} {r.samples:>8,} {r.seq_len:>8,} "
                f"{r.lr:>11.4g} {bar}")
        lines.append(line.rstrip())
    lines += ["", *(f"{phase.name}: {_blend(phase.blend)}" for phase in config.data.phases)]
    return "\n".join(lines)


def _blend(blend: dict[str, float]) -> str:
    total = sum(blend.values())
    return (", ".join(f"{name} {100 * weight / total:.3g} %" for name, weight in blend.items())
            or "every source by its tokens")


def timetable_json(config: RunConfig) -> dict[str, Any]:
    schedule = Schedule(config)
    return {"recipe": config.recipe, "parameters": parameters_json(config), "steps": schedule.num_steps,
            "tokens": schedule.count_tokens(schedule.num_steps - 1),
            "phases": [{"name": p.name, "first_step": s + 1, "blend": p.blend}
                       for p, s in zip(config.data.phases, config.phase_starts(), strict=True)],
            "schedule": [asdict(row) for row in timetable_rows(config)]}


SHOWN = 10
"""Layouts that the table shows."""


@dataclass(frozen=True)
class PlanText:
    search: SweepSearch
    machines: Machines
    settings: list[str]
    """What makes the winner of the run's own settings."""
    submit: str
    """The command that submits the run with them."""

    def lines(self) -> list[str]:
        """Return everything but the tables, a line each."""
        found = self.search
        lines = [f"looked at {found.num_looked_at:,} layouts on {self.machines.num_ranks:,} GPUs: "
                 f"{len(found.best):,} fit" + (" all stages" if len(found.sweeps) > 1 else "")]
        for sweep, stages in zip(found.sweeps, found.names, strict=True):
            of = f" ({stages})" if len(found.sweeps) > 1 else ""
            lines += [f"{line}{of}" for line in too_large(sweep)]
        return [*lines, *broken(found.sweeps)]

    def table(self) -> QuoteTable:
        several = len(self.search.sweeps) > 1
        head = ["", "layout", "GiB"]
        for stages in self.search.names:
            head += [f"step{f' {stages}' if several else ''}", "tokens/s/GPU"]
        rows = []
        for i, one in enumerate(self.search.best[:SHOWN], 1):
            row = [f"{i}", name(one.choice), gib(one.needs_bytes)]
            for sweep, found in zip(self.search.sweeps, self.search.found(one.choice), strict=True):
                assert found is not None, one.choice
                row += [format_seconds(found.step_s), f"{self.speed(sweep, found):,.0f}"]
            rows.append([*row, f"{one.seconds / SECONDS_PER_HOUR / HOURS_PER_DAY:,.1f}"])
        return QuoteTable("Layouts, fastest first", [*head, "days"], rows)

    def speed(self, sweep: Sweep, found: SweepResult) -> float:
        tokens = sweep.stage.global_batch_size * sweep.stage.phase.seq_len
        return tokens / found.step_s / self.machines.num_ranks

    def as_json(self) -> dict[str, Any]:
        """Return the search as plain values; of layouts the fastest."""
        kinds = []
        for sweep, stages in zip(self.search.sweeps, self.search.names, strict=True):
            kinds.append({
                "stages": stages, "looked_at": sweep.num_looked_at, "fit": len(sweep.ranked),
                "too_large": sweep.num_too_large,
                "nearest_lacks_bytes": sweep.nearest[0] if sweep.nearest else None,
                "rules": [{"count": count, "example": sweep.examples[rule]}
                          for rule, count in sweep.broken.most_common()],
                "fastest": [self._found(sweep, found) for found in sweep.ranked[:SHOWN]]})
        return {"looked_at": self.search.num_looked_at, "fit": len(self.search.best), "kinds": kinds,
                "best": [{"layout": as_dict(c.choice), "memory_bytes": c.needs_bytes, "seconds": c.seconds}
                         for c in self.search.best[:SHOWN]],
                "settings": self.settings, "submit": self.submit}

    def _found(self, sweep: Sweep, found: SweepResult) -> dict[str, Any]:
        return {"layout": as_dict(found.choice), "memory_bytes": found.needs_bytes, "step_s": found.step_s,
                "seconds": found.seconds, "tokens_per_s_per_gpu": self.speed(sweep, found)}


# Layouts in words, and why others were not ranked.


SHOWN_RULES = 6
"""Broken rules that are told apart; the rest are counted together."""


def sizes(parallel: ParallelConfig) -> str:
    """Return the sizes of a layout above 1, as the first line of a plan and its page have them."""
    found = ", ".join(f"{axis} {getattr(parallel, axis)}" for axis in AXES if getattr(parallel, axis) > 1)
    return f"{found or 'data parallel alone'}{', ZeRO-1' if parallel.zero1 else ''}"


def name(choice: LayoutChoice) -> str:
    """Return a layout as people say it: the sizes above 1."""
    p = choice.parallel
    parts = [f"{axis} {getattr(p, axis)}" for axis in AXES if getattr(p, axis) > 1]
    if p.pipeline_layout:
        parts.append(f"{sum(p.pipeline_layout[p.pp - 1::p.pp])} layers on the last stage")
    if not p.zero1:
        parts.append("no ZeRO-1")
    if p.expert_overlap == "micro_batches":
        parts.append("experts' messages hidden")
    parts.append(f"micro-batch {choice.micro_batch_size}")
    return ", ".join([*(parts if len(parts) > 1 else ["data parallel alone", *parts]), recomputes(choice)])


def recomputes(choice: LayoutChoice) -> str:
    recompute, modules = choice.recompute
    if recompute == "selective":
        return f"recomputes {' + '.join(modules)}"
    return "recomputes layers" if recompute else "recomputes nothing"


def too_large(sweep: Sweep) -> list[str]:
    """Return the line on layouts of a kind of stage that do not fit; none where all do."""
    if sweep.nearest is None:
        return []
    lacks, choice = sweep.nearest
    return [f"{sweep.num_too_large:,} do not fit: the nearest lacks {gib(lacks)} GiB ({name(choice)})"]


def broken(sweeps: Sequence[Sweep]) -> list[str]:
    """Return a line for each rule that layouts break, over all kinds of stages."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for sweep in sweeps:
        counts.update(sweep.broken)
        examples = {**sweep.examples, **examples}
    most = counts.most_common()
    lines = [f"{count:,} break a rule, as: {examples[rule].partition(';')[0]}"
             for rule, count in most[:SHOWN_RULES]]
    if most[SHOWN_RULES:]:
        lines.append(f"{sum(count for _, count in most[SHOWN_RULES:]):,} break one of "
                     f"{len(most) - SHOWN_RULES} other rules")
    return lines


# What to type: the settings of a layout, and the command that submits the run with them.


PLACEHOLDERS = {"extend": ("--from CHECKPOINT",), "sft": ("--from CHECKPOINT",),
                "prefer": ("--from CHECKPOINT",),
                "distill": ("--from CHECKPOINT", "--teacher TEACHER"),
                "rl-run": ("--from CHECKPOINT", "--teacher TEACHER", "--store STORE", "--prompts PROMPTS",
                           "--reward none"),
                "rl-train": ("--from CHECKPOINT", "--store STORE", "--prompts PROMPTS", "--reward REWARD")}
"""Stage -> what it has to be told beside --data and --run; capitals stand for folders of the user's."""


def set_line(settings: Sequence[str]) -> str:
    """Return settings as they are typed; empty where there are none."""
    return " ".join(f"--set {shlex.quote(setting)}" for setting in settings)


def stage_of(config: RunConfig) -> str:
    command = BUILT_IN.get(config.objective.name, "pretrain")
    if command == "rl train" and config.policy.learns_distributions:
        command = "rl run"
    return "extend" if config.extend.stages and command == "pretrain" else command.replace(" ", "-")


def submit_line(config: RunConfig, machines: Machines, recipe: Sequence[str], settings: Sequence[str]) -> str:
    """Return the command that submits a run."""
    stage = stage_of(config)
    account = [] if machines.profile.account is not None else ["--account", "ACCOUNT"]
    data = [] if stage == "rl-train" else ["--data", "DATA"]
    words = ["megatron-sov", "submit", stage, "--cluster", machines.cluster, "--nodes", str(machines.nodes),
             *account, *recipe, *data, "--run", "RUN",
             *(word for pair in PLACEHOLDERS.get(stage, ()) for word in pair.split())]
    return " ".join([shlex.join(words), *([set_line(settings)] if settings else [])])
