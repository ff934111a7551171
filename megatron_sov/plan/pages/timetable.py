"""The schedule of a run before it runs: learning rate, batch size, tokens and blend, as text and as plain
values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.schedules import Schedule

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
    return sorted(found | {s for turn in schedule.turns() for s in (turn - 1, turn) if 0 <= s <= last})


def rows(config: RunConfig, evenly: int = EVENLY) -> list[TimetableRow]:
    schedule = Schedule(config)
    steps = steps_to_show(schedule, evenly)
    rates = [schedule.learning_rate(step) for step in steps]
    found = []
    for step, lr in zip(steps, rates, strict=True):
        stretch = schedule.stretch(step)
        name = schedule.phases[stretch.phase].name
        found.append(TimetableRow(step + 1, schedule.tokens(step), name, stretch.batch_size, stretch.seq_len,
                                  lr, lr / max(rates)))
    return found


def as_text(config: RunConfig) -> str:
    """Return the plan for a terminal; the bars are the learning rate, from 0 to its peak."""
    found = rows(config)
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


def as_json(config: RunConfig) -> dict[str, Any]:
    schedule = Schedule(config)
    return {"recipe": config.recipe, "steps": schedule.num_steps,
            "tokens": schedule.tokens(schedule.num_steps - 1),
            "phases": [{"name": p.name, "first_step": s + 1, "blend": p.blend}
                       for p, s in zip(config.data.phases, config.phase_starts(), strict=True)],
            "schedule": [asdict(row) for row in rows(config)]}
