"""What a stage of training takes on a cluster: the record that tables and JSON of `plan` show."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_sov.base.figures import (
    format_count, format_days, format_duration, format_energy, format_money, format_seconds, format_share,
    format_size)
from megatron_sov.work.clusters.units import GIB, HOURS_PER_DAY, SECONDS_PER_DAY


@dataclass(frozen=True)
class QuotedMemory:
    by_component: Mapping[str, int]
    """Item -> bytes on the device; they add up to what it needs."""
    limit_bytes: int
    """What a run may take of the device; 0: nobody knows."""
    stage: int = 0
    """Pipeline stage of the process (0-based)."""
    on_host_bytes: int = 0
    """What it pins of the host's memory beside."""

    @property
    def total_bytes(self) -> int:
        return sum(self.by_component.values())


@dataclass(frozen=True)
class Checkpoint:
    size_bytes: int
    """Of one of them, over all processes."""
    write_s: float
    """Seconds from its start until it is on disk."""
    stall_s: float
    """Seconds of them in which training waits."""
    interval_s: float
    """Best time between two of them (Young 1974, Daly 2006)."""
    interval_steps: int


@dataclass(frozen=True)
class Quote:
    """What one stage takes: a phase of a curriculum, or a stage of an extension."""

    name: str
    kind: str
    """phase, extension stage, mid-training stage."""
    gpu: str
    """Kind of the GPUs, as people call it."""
    num_gpus: int
    tokens: int
    """Tokens that it reads, padding counted in."""
    steps: int
    seq_len: int
    global_batch_size: int
    layout: Mapping[str, Any]
    """Setting -> value: those of `parallel` that matter, and train.micro_batch_size, train.recompute."""
    memory: QuotedMemory
    seconds: Mapping[str, float]
    """Component -> seconds of one step, on the slowest process; they add up to the step."""
    tokens_per_s_per_gpu: float
    tflops_per_gpu: float
    """Floating-point operations that the model needs, 1e12 a second and GPU."""
    mfu: float
    """The same as a share of the chip's dense peak in bf16."""
    hours: float
    """Hours of undisturbed work."""
    effective_share: float
    """Share of the wall-clock time that is this work: the rest is checkpoints, lost steps and restarts."""
    energy_kwh: float
    cost_usd: float
    checkpoint: Checkpoint
    cost_range_usd: tuple[float, float] = (0.0, 0.0)
    """Cheapest and dearest, where the price is a guess; zeros: it is the cluster's own."""
    bubble_share: float = 0.0
    """Share of the step in which pipeline stages have nothing to do."""
    imbalance: float = 1.0
    """Tokens of the busiest expert process beside the mean that was reckoned with."""
    notes: tuple[str, ...] = field(default=())
    """Sentences on what the figures leave out or assume."""

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def days(self) -> float:
        """Days by the calendar, failures counted in."""
        return self.hours / HOURS_PER_DAY / self.effective_share

    @property
    def gpu_hours(self) -> float:
        return self.days * HOURS_PER_DAY * self.num_gpus


@dataclass(frozen=True)
class QuoteTotals:
    """All stages of a run together, one after the other."""

    tokens: int
    days: float
    gpu_hours: float
    energy_kwh: float
    cost_usd: float
    cost_range_usd: tuple[float, float]
    """Cheapest and dearest; the same twice where the price is the cluster's own."""
    effective_share: float
    peak_memory_bytes: int

    def at_tokens(self, tokens: float) -> QuoteTotals:
        """Return the totals of a run of `tokens` tokens at the same speed; stages keep their shares."""
        share = tokens / self.tokens
        low, high = self.cost_range_usd
        return dataclasses.replace(
            self, tokens=round(tokens), days=self.days * share, gpu_hours=self.gpu_hours * share,
            energy_kwh=self.energy_kwh * share, cost_usd=self.cost_usd * share,
            cost_range_usd=(low * share, high * share))


def totals(quotes: Sequence[Quote]) -> QuoteTotals:
    """Return what stages take one after the other; there is at least one."""
    days = sum(q.days for q in quotes)
    ranges = [q.cost_range_usd if any(q.cost_range_usd) else (q.cost_usd, q.cost_usd) for q in quotes]
    return QuoteTotals(
        tokens=sum(q.tokens for q in quotes), days=days, gpu_hours=sum(q.gpu_hours for q in quotes),
        energy_kwh=sum(q.energy_kwh for q in quotes), cost_usd=sum(q.cost_usd for q in quotes),
        cost_range_usd=(sum(low for low, _ in ranges), sum(high for _, high in ranges)),
        effective_share=(sum(q.hours for q in quotes) / HOURS_PER_DAY / days if days else 1.0),
        peak_memory_bytes=max(q.memory.total_bytes for q in quotes))


def as_json(quote: Quote) -> dict[str, Any]:
    """Return a quote as plain values; what follows from others stands beside them."""
    values = asdict(quote)
    values["memory"] |= {"total_bytes": quote.memory.total_bytes}
    return values | {"step_s": quote.step_s, "days": quote.days, "gpu_hours": quote.gpu_hours}


# Amounts of a plan as people read them, beside those of `obs.figures`: memory, seconds, money, energy.


def gib(num_bytes: float) -> str:
    """Return bytes in GiB: 38.8; the smallest amounts with more digits."""
    return f"{num_bytes / GIB:,.1f}" if num_bytes >= GIB / 20 or not num_bytes else f"{num_bytes / GIB:.2g}"


# Quotes as tables for a terminal: price, memory, a step, checkpoints.


COMPONENTS = {"memory": "memory-bound", "launch": "kernel launches", "bubble": "pipeline bubble"} | {
    group: f"{group} messages" for group in ("tp", "cp", "ep", "pp", "dp")}
"""Component of a step -> what it is called where its own name is a word for something else as well."""
OTHERS = "other items"
NOTHING_SHARE = 0.001
"""Items of memory that take less are not told."""


@dataclass(frozen=True)
class QuoteTable:
    """A table of text; the first column is names, the others are figures."""

    title: str
    head: list[str]
    rows: list[list[str]]


def tables(quotes: Sequence[Quote]) -> list[QuoteTable]:
    """Return all tables of a run's stages; there is at least one stage."""
    return [stages(quotes), memory(quotes), step(quotes), checkpoints(quotes)]


def stages(quotes: Sequence[Quote]) -> QuoteTable:
    """Return what each stage takes and what all of them take."""
    head = ["stage", "context", "batch", "tokens", "step", "tokens/s/GPU", "MFU", "time", "GPU-hours",
            "energy", "cost"]
    rows = [[q.name, f"{q.seq_len:,}", f"{q.global_batch_size:,}", format_count(q.tokens),
             format_seconds(q.step_s),
             f"{q.tokens_per_s_per_gpu:,.0f}", format_share(q.mfu),
             format_days(q.days * SECONDS_PER_DAY), format_count(q.gpu_hours), format_energy(q.energy_kwh),
             format_money(q.cost_usd)] for q in quotes]
    if len(quotes) > 1:
        t = totals(quotes)
        rows.append(["total", "", "", format_count(t.tokens), "", "", "",
                     format_days(t.days * SECONDS_PER_DAY), format_count(t.gpu_hours),
                     format_energy(t.energy_kwh), format_money(t.cost_usd)])
    return QuoteTable("What it takes", head, rows)


def memory(quotes: Sequence[Quote]) -> QuoteTable:
    """Return the items of the fullest process's memory, for each kind of stage."""
    kinds = alike(quotes, lambda q: (q.memory,))
    shown = [seen(same[0].memory) for same in kinds]
    names = list(dict.fromkeys(name for items in shown for name in items))
    rows = [[_words(name), *(gib(items.get(name, 0)) for items in shown)] for name in names]
    rows.append(["total", *(gib(same[0].memory.total_bytes) for same in kinds)])
    if any(same[0].memory.limit_bytes for same in kinds):
        rows.append(["may take", *(gib(same[0].memory.limit_bytes) for same in kinds)])
    if any(same[0].memory.on_host_bytes for same in kinds):
        rows.append(["in the host's memory", *(gib(same[0].memory.on_host_bytes) for same in kinds)])
    stage = {same[0].memory.stage + 1 for same in kinds}
    where = f", pipeline stage {stage.pop()}" if len(stage) == 1 and quotes[0].layout.get("pp", 1) > 1 else ""
    return QuoteTable(f"Memory of the fullest GPU in GiB{where}", ["item", *labels(kinds)], rows)


def seen(memory: QuotedMemory, share: float = NOTHING_SHARE) -> dict[str, int]:
    """Return the items of memory that take more than a share of it, the others together, if they are
    anything."""
    large = {item: n for item, n in memory.by_component.items() if n > share * memory.total_bytes}
    rest = memory.total_bytes - sum(large.values())
    return large | ({OTHERS: rest} if rest > NOTHING_SHARE * memory.total_bytes else {})


def step(quotes: Sequence[Quote]) -> QuoteTable:
    """Return where the time of a step goes, for each kind of stage."""
    kinds = alike(quotes, lambda q: (q.seconds,))
    names = list(dict.fromkeys(name for same in kinds for name, s in same[0].seconds.items() if s))

    def cell(q: Quote, name: str) -> str:
        part = q.seconds.get(name, 0.0)
        return f"{format_seconds(part)} {format_share(part / q.step_s):>6}" if part else "-"

    rows = [[component(name), *(cell(same[0], name) for same in kinds)] for name in names]
    rows.append(["step", *(f"{format_seconds(same[0].step_s)} {'100 %':>6}" for same in kinds)])
    if any(same[0].imbalance > 1 for same in kinds):
        rows.append(["busiest experts / mean", *(f"{same[0].imbalance:.2f}" for same in kinds)])
    return QuoteTable("A step", ["component", *labels(kinds)], rows)


def component(name: str) -> str:
    return COMPONENTS.get(name, _words(name))


def checkpoints(quotes: Sequence[Quote]) -> QuoteTable:
    """Return size, time and rhythm of checkpoints, and the share of time that is training."""
    kinds = alike(quotes, lambda q: (q.checkpoint, q.effective_share))
    rows = [[name, format_size(c.size_bytes), format_seconds(c.write_s), format_seconds(c.stall_s),
             f"{c.interval_steps:,} steps, {format_duration(c.interval_s)}",
             format_share(same[0].effective_share)]
            for name, same in zip(labels(kinds), kinds, strict=True) for c in [same[0].checkpoint]]
    return QuoteTable("Checkpoints", ["stage", "size", "on disk after", "training waits", "best interval",
                                      "effective training time"], rows)


def alike(quotes: Sequence[Quote], key: Callable[[Quote], object]) -> list[list[Quote]]:
    """Return stages in groups that a table shows in one column."""
    groups: list[list[Quote]] = []
    for quote in quotes:
        same = next((group for group in groups if key(group[0]) == key(quote)), None)
        if same is None:
            groups.append([quote])
        else:
            same.append(quote)
    return groups


def notes(quotes: Sequence[Quote]) -> list[str]:
    """Return what the figures assume, a sentence each, and between what prices the cost lies."""
    low, high = totals(quotes).cost_range_usd
    said = list(dict.fromkeys(note for q in quotes for note in q.notes))
    return said + ([f"At the prices that were found the whole is {format_money(low)} to "
                    f"{format_money(high)}."]
                   if high > low else [])


def text(table: QuoteTable) -> str:
    """Return a table for a terminal: names to the left, figures to the right."""
    rows = [table.head, *table.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.head))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width
                                                   in zip(row[1:], widths[1:], strict=True))]).rstrip()
             for row in rows]
    return "\n".join([f"{table.title}:", *(f"  {line}" for line in lines)])


def totals_json(found: QuoteTotals) -> dict[str, float]:
    return dataclasses.asdict(found)


def labels(kinds: list[list[Quote]]) -> list[str]:
    if len(kinds) == 1 and len(kinds[0]) > 1:
        return ["each stage"]
    return [", ".join(dict.fromkeys(q.name for q in same)) for same in kinds]


def _words(name: str) -> str:
    return name.replace("_", " ")
