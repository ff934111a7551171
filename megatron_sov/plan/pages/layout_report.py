"""Text and JSON for a plan: the schedule as a timetable, a sweep's layouts, and the submit command."""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_sov.base.figures import format_count, format_seconds
from megatron_sov.model.config import RunConfig
from megatron_sov.model.families.count import count_params
from megatron_sov.model.objectives import BUILT_IN
from megatron_sov.plan.pages.quotes import QuoteTable, format_gib
from megatron_sov.plan.pricing import Machines
from megatron_sov.plan.search.space import LayoutChoice, choice_to_dict
from megatron_sov.plan.search.sweep import Sweep, SweepResult, SweepSearch
from megatron_sov.schedules import Schedule
from megatron_sov.work.clusters.units import HOURS_PER_DAY, SECONDS_PER_HOUR

NUM_EVEN_STEPS = 12
"""Evenly spaced steps in the timetable, next to the steps at which a setting changes."""
MAX_CHANGES = 24
"""Limit on batch-size changes in the timetable; a ramp may have hundreds."""
BAR_CHARACTERS = 32
MAX_LAYOUTS = 10
"""Layouts in a sweep's table."""
MAX_RULES = 6
"""Broken rules with a line each; further rules share a line."""
PLACEHOLDERS = {"extend": ("--from CHECKPOINT",), "sft": ("--from CHECKPOINT",),
                "prefer": ("--from CHECKPOINT",), "distill": ("--from CHECKPOINT", "--teacher TEACHER"),
                "rl-run": ("--from CHECKPOINT", "--teacher TEACHER", "--store STORE", "--prompts PROMPTS",
                           "--reward none"),
                "rl-train": ("--from CHECKPOINT", "--store STORE", "--prompts PROMPTS", "--reward REWARD")}
"""Stage -> required options in addition to --data and --run; words in capitals are placeholders."""


@dataclass(frozen=True)
class SweepReport:
    """Result from `plan --sweep`."""

    search: SweepSearch
    machines: Machines
    settings: list[str]
    """Changes from the run's settings to the fastest layout, for --set."""
    submit: str
    """Command that submits the run in the fastest layout."""

    def list_lines(self) -> list[str]:
        """Return lines with counts: layouts compared, too large, and against a rule."""
        search = self.search
        suffix = " all stages" if len(search.sweeps) > 1 else ""
        lines = [f"looked at {search.num_looked_at:,} layouts on {self.machines.num_ranks:,} GPUs: "
                 f"{len(search.best):,} fit{suffix}"]
        for sweep, stages in zip(search.sweeps, search.names, strict=True):
            suffix = f" ({stages})" if len(search.sweeps) > 1 else ""
            lines += [f"{line}{suffix}" for line in describe_too_large(sweep)]
        return [*lines, *describe_broken_rules(search.sweeps)]

    def build_table(self) -> QuoteTable:
        """Build the table with the fastest layouts that fit all stages."""
        has_stages = len(self.search.sweeps) > 1
        head = ["", "layout", "GiB"]
        for stages in self.search.names:
            head += [f"step {stages}" if has_stages else "step", "slow host", "tokens/s/GPU"]
        rows = []
        for i, layout in enumerate(self.search.best[:MAX_LAYOUTS], 1):
            row = [f"{i}", format_layout(layout.choice), format_gib(layout.needs_bytes)]
            for sweep, result in zip(self.search.sweeps, layout.results, strict=True):
                row += [format_seconds(result.step_s), format_seconds(result.slow_step_s),
                        f"{self.compute_token_rate(sweep, result):,.0f}"]
            rows.append([*row, f"{layout.seconds / SECONDS_PER_HOUR / HOURS_PER_DAY:,.1f}"])
        return QuoteTable("Layouts, fastest with a slow host first", [*head, "days"], rows)

    def compute_token_rate(self, sweep: Sweep, result: SweepResult) -> float:
        """Return tokens per second and GPU."""
        tokens = sweep.stage.global_batch_size * sweep.stage.phase.seq_len
        return tokens / result.step_s / self.machines.num_ranks

    def to_json(self) -> dict[str, Any]:
        """Convert the counts and the fastest layouts to JSON values."""
        kinds = []
        for sweep, stages in zip(self.search.sweeps, self.search.names, strict=True):
            kinds.append({
                "stages": stages, "looked_at": sweep.num_looked_at, "fit": len(sweep.ranked),
                "too_large": sweep.num_too_large,
                "nearest_lacks_bytes": sweep.nearest[0] if sweep.nearest else None,
                "rules": [{"count": count, "example": sweep.examples[rule]}
                          for rule, count in sweep.broken.most_common()],
                "fastest": [self._result_to_json(sweep, result) for result in sweep.ranked[:MAX_LAYOUTS]]})
        best = [{"layout": choice_to_dict(layout.choice), "memory_bytes": layout.needs_bytes,
                 "seconds": layout.seconds} for layout in self.search.best[:MAX_LAYOUTS]]
        return {"looked_at": self.search.num_looked_at, "fit": len(self.search.best), "kinds": kinds,
                "best": best, "settings": self.settings, "submit": self.submit}

    def _result_to_json(self, sweep: Sweep, result: SweepResult) -> dict[str, Any]:
        return {"layout": choice_to_dict(result.choice), "memory_bytes": result.needs_bytes,
                "step_s": result.step_s, "slow_host_step_s": result.slow_step_s, "seconds": result.seconds,
                "tokens_per_s_per_gpu": self.compute_token_rate(sweep, result)}


def format_layout(choice: LayoutChoice) -> str:
    """Format a layout: sizes, micro-batch size and recomputation."""
    p = choice.parallel
    parts = [p.format_sizes()]
    if p.pipeline_layout:
        parts.append(f"{sum(p.pipeline_layout[p.pp - 1::p.pp])} layers on the last stage")
    if p.expert_overlap == "micro_batches":
        parts.append("experts' messages hidden")
    names = {True: "layers", False: "nothing", "selective": " + ".join(choice.recompute[1])}
    return ", ".join([*parts, f"micro-batch {choice.micro_batch_size}",
                      f"recomputes {names[choice.recompute[0]]}"])


def describe_too_large(sweep: Sweep) -> list[str]:
    """Return a line about layouts that need too much memory; [] if all layouts fit."""
    if sweep.nearest is None:
        return []
    lacks_bytes, choice = sweep.nearest
    return [f"{sweep.num_too_large:,} do not fit: the nearest lacks {format_gib(lacks_bytes)} GiB "
            f"({format_layout(choice)})"]


def describe_broken_rules(sweeps: Sequence[Sweep]) -> list[str]:
    """Return a line per broken rule, with counts over all stages."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for sweep in sweeps:
        counts.update(sweep.broken)
        examples = {**sweep.examples, **examples}
    rules = counts.most_common()
    lines = [f"{count:,} break a rule, as: {examples[rule].partition(';')[0]}"
             for rule, count in rules[:MAX_RULES]]
    if rest := rules[MAX_RULES:]:
        lines.append(f"{sum(count for _, count in rest):,} break one of {len(rest)} other rules")
    return lines


def format_set_options(settings: Sequence[str]) -> str:
    """Format settings as --set options, quoted for a shell."""
    return " ".join(f"--set {shlex.quote(setting)}" for setting in settings)


def find_stage_name(config: RunConfig) -> str:
    """Return the stage for `megatron-sov submit`, e.g. rl-train."""
    command = BUILT_IN.get(config.objective.name, "pretrain")
    if command == "rl train" and config.policy.learns_distributions:
        command = "rl run"
    return "extend" if config.extend.stages and command == "pretrain" else command.replace(" ", "-")


def format_submit_command(config: RunConfig, machines: Machines, recipe: Sequence[str],
                          settings: Sequence[str]) -> str:
    """Format the command that submits a run; `recipe` holds the words that name the recipe."""
    stage = find_stage_name(config)
    account = [] if machines.profile.account is not None else ["--account", "ACCOUNT"]
    data = [] if stage == "rl-train" else ["--data", "DATA"]
    words = ["megatron-sov", "submit", stage, "--cluster", machines.cluster, "--nodes", str(machines.nodes),
             *account, *recipe, *data, "--run", "RUN"]
    for pair in PLACEHOLDERS.get(stage, ()):
        words += pair.split()
    return " ".join([shlex.join(words), *([format_set_options(settings)] if settings else [])])


@dataclass(frozen=True)
class TimetableRow:
    """A step in the schedule."""

    step: int
    """1-based, as in `events.jsonl`."""
    tokens: int
    """Tokens up to and including this step, padding included."""
    phase: str
    samples: int
    seq_len: int
    lr: float
    lr_share: float
    """`lr` divided by the largest `lr` in the table."""


def select_steps(schedule: Schedule, num_even_steps: int) -> list[int]:
    """Select steps (0-based): first, last, evenly spaced, and around changes in phase, batch size or rate."""
    last = schedule.num_steps - 1
    changes = [stretch.first_step for stretch in schedule.stretches]
    changes = changes[::-(-len(changes) // MAX_CHANGES)]
    steps = {0, last, *changes, *(step - 1 for step in changes if step)}
    steps |= {round(last * i / num_even_steps) for i in range(num_even_steps + 1)}
    turns = schedule.list_turning_steps()
    return sorted(steps | {step for turn in turns for step in (turn - 1, turn) if 0 <= step <= last})


def build_timetable(config: RunConfig) -> list[TimetableRow]:
    schedule = Schedule(config)
    steps = select_steps(schedule, NUM_EVEN_STEPS)
    rates = [schedule.learning_rate(step) for step in steps]
    # A run with a single step may have rate 0, the end of its decay.
    highest = max(rates) or 1.0
    rows = []
    for step, lr in zip(steps, rates, strict=True):
        stretch = schedule.get_stretch(step)
        rows.append(TimetableRow(step + 1, schedule.count_tokens(step), schedule.phases[stretch.phase].name,
                                 stretch.batch_size, stretch.seq_len, lr, lr / highest))
    return rows


def format_model_size(config: RunConfig) -> str:
    """Format the recipe's name and its parameter counts."""
    count = count_params(config.model)
    parts = [f"{format_count(count.total)} parameters ({format_count(count.active)} active)"]
    parts += [f"{format_count(number)} of {part}" for number, part in (
        (count.encoders, "encoders"), (count.mtp, "multi-token prediction")) if number]
    return f"{config.recipe}: {', '.join(parts)}"


def format_timetable(config: RunConfig) -> str:
    """Format the schedule for a terminal; bars show the learning rate relative to its peak."""
    rows = build_timetable(config)
    width = max(len("phase"), *(len(row.phase) for row in rows))
    lines = [f"{'step':>12} {'tokens':>20}  {'phase':<{width}} {'samples':>8} {'length':>8} {'rate':>11}"]
    for row in rows:
        bar = "#" * round(BAR_CHARACTERS * row.lr_share)
        line = (f"{row.step:>12,} {row.tokens:>20,}  {row.phase:<{width}} {row.samples:>8,} "
                f"{row.seq_len:>8,} {row.lr:>11.4g} {bar}")
        lines.append(line.rstrip())
    return "\n".join([*lines, "", *(f"{phase.name}: {_format_blend(phase.blend)}"
                                    for phase in config.data.phases)])


def _format_blend(blend: dict[str, float]) -> str:
    total = sum(blend.values())
    return (", ".join(f"{name} {100 * weight / total:.3g} %" for name, weight in blend.items())
            or "every source by its tokens")


def timetable_to_json(config: RunConfig) -> dict[str, Any]:
    schedule = Schedule(config)
    return {"recipe": config.recipe, "parameters": asdict(count_params(config.model)),
            "steps": schedule.num_steps, "tokens": schedule.count_tokens(schedule.num_steps - 1),
            "phases": [{"name": phase.name, "first_step": start + 1, "blend": phase.blend}
                       for phase, start in zip(config.data.phases, config.phase_starts(), strict=True)],
            "schedule": [asdict(row) for row in build_timetable(config)]}
