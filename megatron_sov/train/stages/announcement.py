"""Texts that a run prints: a banner with its plan before the first step, and a summary after the last."""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sov.base.figures import format_count, format_memory, format_share, format_value
from megatron_sov.model.config import RunConfig
from megatron_sov.model.families.adapters import count_adapter_params
from megatron_sov.model.families.count import count_params
from megatron_sov.model.process_memory import MemoryEstimate
from megatron_sov.runs.obs.events import EVENTS, read_events
from megatron_sov.runs.obs.meters import HeldoutFigures, Meter, format_recent_means
from megatron_sov.train.checkpointer import TrainState
from megatron_sov.train.data.ledger import LedgerEntry, count_over_long
from megatron_sov.train.data.sources import Source


def format_banner(config: RunConfig, num_ranks: int, run: Path, steps: range, entries: Sequence[LedgerEntry],
                  sources: Sequence[Source], memory: MemoryEstimate | None = None,
                  num_threads: int = 0) -> str:
    """Describe a run's remaining `steps` (from 0): model, layout, estimated memory and data."""
    count, p, rollout = count_params(config.model), config.parallel, config.rollout
    dp_size = num_ranks // (p.tp * p.pp * p.cp)
    planned = count_planned_tokens(entries, steps)
    needs = "" if memory is None else f", {_format_estimate(config, memory)}"
    layout = ", ".join(f"{name} {size}" for name, size in (
        ("tp", p.tp), ("pp", p.pp), ("cp", p.cp), ("ep", p.ep), ("dp", dp_size)) if size > 1)
    tokens = {s.name: s.num_tokens.get("train", 0) for s in sources}
    padded = {s.name for s in sources if s.is_chat}
    read = ", ".join(
        f"{name} {format_count(size)} tokens{_format_epochs(size, tokens.get(name, 0), name in padded)}"
        for name, size in planned.items() if size)
    length = f", {format_count(sum(planned.values()))} tokens"
    if rollout.rounds:  # the lengths of responses are unknown
        length, read = "", (f"{rollout.rounds:,} rounds of {rollout.prompts_per_round:,} prompts, each with "
                            f"{rollout.samples_per_prompt:,} responses")
    loss = {"cut": "their tails are left out", "drop": "they are left out"}.get(config.data.over_long)
    over_long = "".join(f"\n  over-long  {units.source}: {units.count:,} of {units.total:,} are longer than "
                        f"{units.seq_len} tokens, {loss} (data.over_long)"
                        for units in count_over_long(sources, entries))
    encoders = f", {format_count(count.encoders)} of encoders" if count.encoders else ""
    threads = f"threads {num_threads}; " if num_threads else ""
    return (f"{config.recipe}: {format_count(count.total)} parameters ({format_count(count.active)} active)"
            f"{encoders}, steps {steps.start + 1} to {steps.stop}{length}\n"
            f"  processes  {num_ranks}{f': {layout}' if layout else ''}; "
            f"{threads}{config.train.precision}{needs}\n"
            f"{_format_adapter(config, count.total)}"
            f"  data       {read}{over_long}\n"
            f"  run        {run}, a checkpoint {'at least ' if rollout.rounds else ''}every "
            f"{config.train.checkpoint_every_steps} steps")


def _format_estimate(config: RunConfig, memory: MemoryEstimate) -> str:
    text = f"{format_memory(memory.states)} of weights, gradients and optimizer each"
    if config.train.recompute:
        text += f", {format_memory(memory.peak)} with activations"
    if memory.on_host:
        text += f", {format_memory(memory.on_host)} of the host's memory"
    if memory.imbalance_limit:
        load = "all" if memory.imbalance_limit == math.inf else f"{memory.imbalance_limit:g} times the mean"
        text += f", enough for {load} tokens on an expert process"
    return text


def _format_epochs(num_tokens: float, available_tokens: int, is_padded: bool) -> str:
    """Format tokens that a run reads from a source, as " (1.5 epochs)"; chat rows are padded."""
    if is_padded:
        return " with padding"
    return f" ({format_value(num_tokens / available_tokens, 3)} epochs)" if available_tokens else ""


def _format_adapter(config: RunConfig, total: int) -> str:
    if not config.lora.on:
        return ""
    learn = count_adapter_params(config.model, config.lora)
    share = learn / (total + learn)
    return (f"  adapter    of rank {config.lora.rank}: {format_count(learn)} of "
            f"{format_count(total + learn)} parameters "
            f"learn ({format_share(share)}); `megatron-sov convert to-peft` writes it for PEFT\n")


def count_planned_tokens(entries: Sequence[LedgerEntry], steps: range) -> dict[str, float]:
    """Return source -> tokens that the ledger plans for `steps` (from 0)."""
    planned: dict[str, float] = {}
    ends = [*(e.first_step for e in entries[1:]), steps.stop]
    for entry, end in zip(entries, ends, strict=True):
        count = max(0, min(end, steps.stop) - max(entry.first_step, steps.start))
        for name, weight in entry.weights.items():
            planned[name] = planned.get(name, 0.0) + count * entry.global_batch_size * entry.seq_len * weight
    return planned


def format_summary(run: Path, checkpoint: Path, counters: TrainState, wall_s: float, config: RunConfig,
                   headline: Sequence[Meter], sources: Sequence[Source]) -> str:
    """Describe a complete run by its last checkpoint and `headline` meters, and propose the next commands."""
    path = shlex.quote(str(run))
    is_chat = any(source.is_chat for source in sources)
    try_out = f"chat {path}" if is_chat else f"generate {path} --prompt TEXT"
    heldout = HeldoutFigures()

    def collect_heldout() -> Iterator[Mapping[str, Any]]:
        for event in read_events(run / EVENTS):
            heldout.add(event)
            yield event

    means = format_recent_means(collect_heldout(), headline)  # reads events once, for both figures
    minutes, seconds = divmod(round(wall_s), 60)
    # a loss over pairs of responses has no meaning
    compared = {source.name for source in sources if source.group > 1 or source.train_documents is not None}
    figures = (heldout.text(headline, lambda source: source not in compared), means)
    results = "".join(f"; {text}" for text in figures if text)
    return (f"complete: step {counters.step}, {format_count(counters.tokens)} tokens in "
            f"{minutes}:{seconds:02d} min{results}\n"
            f"  checkpoint  {checkpoint}\n{format_next_commands(run, config, try_out)}")


def format_next_commands(run: Path, config: RunConfig, *try_out: str) -> str:
    """Format the commands that read a complete run; `try_out`: commands for its kind of data."""
    path = shlex.quote(str(run))
    adapter = [f"convert to-peft {path} PEFT_DIR"] if config.lora.on else []
    commands = [f"report {path}", *try_out, f"convert to-hf {path} HF_DIR", *adapter]
    return "  next        " + "\n              ".join(f"megatron-sov {command}" for command in commands)
