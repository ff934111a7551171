"""Quotes for training stages on a cluster (memory, speed, time, cost), and the tables in `plan`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_sov.base.figures import (
    align_columns, format_count, format_days, format_money, format_seconds, format_share)
from megatron_sov.work.clusters.units import GIB, HOURS_PER_DAY, SECONDS_PER_DAY

COMPONENTS = {"memory": "memory-bound", "launch": "kernel launches", "bubble": "pipeline bubble"} | {
    group: f"{group} messages" for group in ("tp", "cp", "ep", "pp", "dp")}
"""`StepTime` component -> label, if the component's name is ambiguous."""
SMALLEST_SHARE = 0.001
"""The table leaves out memory items with a smaller share of the total."""


@dataclass(frozen=True)
class QuotedMemory:
    """Predicted memory on the fullest process."""

    by_component: Mapping[str, int]
    """Item -> bytes on the device; the sum is the predicted peak."""
    limit_bytes: int
    """Usable bytes on the device; 0: unknown."""
    stage: int = 0
    """The process's pipeline stage (0-based)."""
    on_host_bytes: int = 0
    """Pinned host memory, in bytes."""

    @property
    def total_bytes(self) -> int:
        return sum(self.by_component.values())


@dataclass(frozen=True)
class Quote:
    """A stage's price: a phase in `data.phases`, or an entry in `extend.stages`."""

    name: str
    kind: str
    """phase, extension stage or mid-training stage."""
    gpu: str
    """Product name, e.g. H100-80GB."""
    num_gpus: int
    tokens: int
    """Tokens in all steps, padding included."""
    steps: int
    seq_len: int
    global_batch_size: int
    layout: Mapping[str, Any]
    """Setting -> value (`choice_to_dict`)."""
    memory: QuotedMemory
    seconds: Mapping[str, float]
    """Component -> seconds per step on the slowest process; the sum is the step time."""
    tokens_per_s_per_gpu: float
    tflops_per_gpu: float
    """Model TFLOPs per second and GPU."""
    mfu: float
    """Model FLOPs per second as a share of the chip's dense bf16 peak."""
    hours: float
    """Training hours without interruptions."""
    cost_usd: float
    cost_range_usd: tuple[float, float] = (0.0, 0.0)
    """Lowest and highest cost for an estimated GPU price; zeros: the profile sets the price."""
    bubble_share: float = 0.0
    """Pipeline bubble as a share of the step."""
    imbalance: float = 1.0
    """Tokens on the busiest expert-parallel rank divided by the mean."""
    notes: tuple[str, ...] = ()
    """Sentences about assumptions and missing parts."""

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def days(self) -> float:
        return self.hours / HOURS_PER_DAY

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.num_gpus


@dataclass(frozen=True)
class QuoteTotals:
    """Sums over a run's consecutive stages."""

    tokens: int
    days: float
    gpu_hours: float
    cost_usd: float
    cost_range_usd: tuple[float, float]
    """Lowest and highest cost; equal if the profile sets the price."""
    peak_memory_bytes: int


def sum_quotes(quotes: Sequence[Quote]) -> QuoteTotals:
    """Sum stages; `quotes` is not empty."""
    ranges = [q.cost_range_usd if any(q.cost_range_usd) else (q.cost_usd, q.cost_usd) for q in quotes]
    return QuoteTotals(
        tokens=sum(q.tokens for q in quotes), days=sum(q.days for q in quotes),
        gpu_hours=sum(q.gpu_hours for q in quotes), cost_usd=sum(q.cost_usd for q in quotes),
        cost_range_usd=(sum(low for low, _ in ranges), sum(high for _, high in ranges)),
        peak_memory_bytes=max(q.memory.total_bytes for q in quotes))


def quote_to_json(quote: Quote) -> dict[str, Any]:
    """Convert a quote to JSON values, with derived fields such as `days`."""
    values = asdict(quote)
    values["memory"] |= {"total_bytes": quote.memory.total_bytes}
    return values | {"step_s": quote.step_s, "days": quote.days, "gpu_hours": quote.gpu_hours}


def format_gib(num_bytes: float) -> str:
    """Format bytes in GiB: 38.8; amounts below 0.05 GiB with two significant digits."""
    return f"{num_bytes / GIB:,.1f}" if num_bytes >= GIB / 20 or not num_bytes else f"{num_bytes / GIB:.2g}"


@dataclass(frozen=True)
class QuoteTable:
    """A text table: names in the first column, figures in all further columns."""

    title: str
    head: list[str]
    rows: list[list[str]]


def build_tables(quotes: Sequence[Quote]) -> list[QuoteTable]:
    """Build all tables; `quotes` is not empty."""
    return [build_stage_table(quotes), build_memory_table(quotes), build_step_table(quotes)]


def build_stage_table(quotes: Sequence[Quote]) -> QuoteTable:
    """Build the table with time and cost per stage; several stages have a total row."""
    head = ["stage", "context", "batch", "tokens", "step", "tokens/s/GPU", "MFU", "time", "GPU-hours", "cost"]
    rows = [[q.name, f"{q.seq_len:,}", f"{q.global_batch_size:,}", format_count(q.tokens),
             format_seconds(q.step_s), f"{q.tokens_per_s_per_gpu:,.0f}", format_share(q.mfu),
             format_days(q.days * SECONDS_PER_DAY), format_count(q.gpu_hours),
             format_money(q.cost_usd)] for q in quotes]
    if len(quotes) > 1:
        total = sum_quotes(quotes)
        rows.append(["total", "", "", format_count(total.tokens), "", "", "",
                     format_days(total.days * SECONDS_PER_DAY), format_count(total.gpu_hours),
                     format_money(total.cost_usd)])
    return QuoteTable("What it takes", head, rows)


def build_memory_table(quotes: Sequence[Quote]) -> QuoteTable:
    """Build the table with memory items on the fullest process, a column per kind of stage."""
    groups = group_quotes(quotes, lambda q: q.memory)
    memories = [group[0].memory for group in groups]
    columns = [{item: num_bytes for item, num_bytes in memory.by_component.items()
                if num_bytes > SMALLEST_SHARE * memory.total_bytes} for memory in memories]
    names = list(dict.fromkeys(name for items in columns for name in items))
    rows = [[_format_name(name), *(format_gib(items.get(name, 0)) for items in columns)] for name in names]
    rows.append(["total", *(format_gib(memory.total_bytes) for memory in memories)])
    if any(memory.limit_bytes for memory in memories):
        rows.append(["may take", *(format_gib(memory.limit_bytes) for memory in memories)])
    if any(memory.on_host_bytes for memory in memories):
        rows.append(["in the host's memory", *(format_gib(memory.on_host_bytes) for memory in memories)])
    stages = {memory.stage + 1 for memory in memories}
    suffix = ""
    if len(stages) == 1 and quotes[0].layout.get("pp", 1) > 1:
        suffix = f", pipeline stage {stages.pop()}"
    return QuoteTable(f"Memory of the fullest GPU in GiB{suffix}", ["item", *label_groups(groups)], rows)


def build_step_table(quotes: Sequence[Quote]) -> QuoteTable:
    """Build the table with seconds per step component, a column per kind of stage."""
    groups = group_quotes(quotes, lambda q: q.seconds)
    first = [group[0] for group in groups]
    names = list(dict.fromkeys(name for q in first for name, seconds in q.seconds.items() if seconds))

    def format_cell(q: Quote, name: str) -> str:
        part = q.seconds.get(name, 0.0)
        return f"{format_seconds(part)} {format_share(part / q.step_s):>6}" if part else "-"

    rows = [[COMPONENTS.get(name, _format_name(name)), *(format_cell(q, name) for q in first)]
            for name in names]
    rows.append(["step", *(f"{format_seconds(q.step_s)} {'100 %':>6}" for q in first)])
    if any(q.imbalance > 1 for q in first):
        rows.append(["busiest experts / mean", *(f"{q.imbalance:.2f}" for q in first)])
    return QuoteTable("A step", ["component", *label_groups(groups)], rows)


def group_quotes(quotes: Sequence[Quote], key: Callable[[Quote], object]) -> list[list[Quote]]:
    """Group stages with equal keys; a table has one column per group."""
    groups: list[list[Quote]] = []
    for quote in quotes:
        group = next((group for group in groups if key(group[0]) == key(quote)), None)
        if group is None:
            groups.append([quote])
        else:
            group.append(quote)
    return groups


def list_notes(quotes: Sequence[Quote]) -> list[str]:
    """Return distinct notes, and a sentence about `cost_range_usd`."""
    low, high = sum_quotes(quotes).cost_range_usd
    sentences = list(dict.fromkeys(note for q in quotes for note in q.notes))
    if high > low:
        sentences.append(f"At the prices that were found the whole is {format_money(low)} to "
                         f"{format_money(high)}.")
    return sentences


def format_table(table: QuoteTable) -> str:
    """Format a table for a terminal: names left-aligned, figures right-aligned."""
    lines = align_columns([table.head, *table.rows], left=(0,)).split("\n")
    return "\n".join([f"{table.title}:", *(f"  {line}" for line in lines)])


def label_groups(groups: list[list[Quote]]) -> list[str]:
    """Return a column label per group: its stage names, or `each stage` for a single group."""
    if len(groups) == 1 and len(groups[0]) > 1:
        return ["each stage"]
    return [", ".join(dict.fromkeys(q.name for q in group)) for group in groups]


def _format_name(name: str) -> str:
    return name.replace("_", " ")
