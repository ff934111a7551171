"""Texts that a run prints: its plan before the first step, and its results after the last step."""

from __future__ import annotations

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
from megatron_sov.train.data.token_shards import Source


def format_banner(config: RunConfig, num_ranks: int, run: Path, steps: range, entries: Sequence[LedgerEntry],
           sources: Sequence[Source], memory: MemoryEstimate | None = None, num_threads: int = 0) -> str:
    """Describe the rest of a run: model, layout, memory (if estimated) and data of `steps` (0-based)."""
    count, p, rollout = count_params(config.model), config.parallel, config.rollout
    dp_size = num_ranks // (p.tp * p.pp * p.cp)
    planned = planned_tokens(entries, steps)
    needs = "" if memory is None else f", {_format_estimate(config, memory)}"
    layout = ", ".join(f"{name} {size}" for name, size in (
        ("tp", p.tp), ("pp", p.pp), ("cp", p.cp), ("ep", p.ep), ("dp", dp_size)) if size > 1)
    tokens = {s.name: s.num_tokens.get("train", 0) for s in sources}
    padded = {s.name for s in sources if s.is_chat}
    read = ", ".join(f"{name} {format_count(n)} tokens{_share_read(n, tokens.get(name, 0), name in padded)}"
                     for name, n in planned.items() if n)
    length = f", {format_count(sum(planned.values()))} tokens"
    if rollout.rounds:  # the lengths of responses are unknown
        length, read = "", (f"{rollout.rounds:,} rounds of {rollout.prompts_per_round:,} prompts, each with "
                            f"{rollout.samples_per_prompt:,} responses")
    fate = {"cut": "their tails are left out", "drop": "they are left out"}.get(config.data.over_long)
    too_long = "".join(f"\n  over-long  {o.source}: {o.count:,} of {o.total:,} are longer than {o.seq_len} "
                       f"tokens, {fate} (data.over_long)" for o in count_over_long(sources, entries))
    return (f"{config.recipe}: {format_count(count.total)} parameters ({format_count(count.active)} active)"
            f"{f', {format_count(count.encoders)} of encoders' if count.encoders else ''}, steps "
            f"{steps.start + 1} to {steps.stop}{length}\n"
            f"  processes  {num_ranks}{f': {layout}' if layout else ''}; "
            f"{f'threads {num_threads}; ' if num_threads else ''}{config.train.precision}{needs}\n"
            f"{_adapter(config, count.total)}"
            f"  data       {read}{too_long}\n"
            f"  run        {run}, a checkpoint {'at least ' if rollout.rounds else ''}every "
            f"{config.train.checkpoint_every_steps} steps")


def _format_estimate(config: RunConfig, memory: MemoryEstimate) -> str:
    text = f"{format_memory(memory.states)} of weights, gradients and optimizer each"
    if config.train.recompute:
        text += f", {format_memory(memory.peak)} with activations"
    if memory.on_host:
        text += f", {format_memory(memory.on_host)} of the host's memory"
    return text


def _share_read(num_tokens: float, available_tokens: int, is_padded: bool) -> str:
    """Return " (1.5 epochs)" for the tokens that a run reads from a source; rows of chats are padded."""
    if is_padded:
        return " with padding"
    return f" ({format_value(num_tokens / available_tokens, 3)} epochs)" if available_tokens else ""


def _adapter(config: RunConfig, total: int) -> str:
    if not config.lora.on:
        return ""
    learn = count_adapter_params(config.model, config.lora)
    share = learn / (total + learn)
    return (f"  adapter    of rank {config.lora.rank}: {format_count(learn)} of "
            f"{format_count(total + learn)} parameters "
            f"learn ({format_share(share)}); `megatron-sov convert to-peft` writes it for PEFT\n")


def planned_tokens(entries: Sequence[LedgerEntry], steps: range) -> dict[str, float]:
    """Return source -> tokens that the ledger plans for `steps` (0-based)."""
    planned: dict[str, float] = {}
    ends = [*(e.first_step for e in entries[1:]), steps.stop]
    for entry, end in zip(entries, ends, strict=True):
        count = max(0, min(end, steps.stop) - max(entry.first_step, steps.start))
        for name, weight in entry.weights.items():
            planned[name] = planned.get(name, 0.0) + count * entry.global_batch_size * entry.seq_len * weight
    return planned


def format_summary(run: Path, checkpoint: Path, done: TrainState, wall_s: float, config: RunConfig,
            headline: Sequence[Meter], sources: Sequence[Source]) -> str:
    """Describe a complete run by its last checkpoint and `headline` meters, and propose the next commands."""
    words = shlex.quote(str(run))
    ask = f"chat {words}" if any(source.is_chat for source in sources) else f"generate {words} --prompt TEXT"
    heldout = HeldoutFigures()

    def collect_heldout() -> Iterator[Mapping[str, Any]]:
        for event in read_events(run / EVENTS):
            heldout.add(event)
            yield event

    means = format_recent_means(collect_heldout(), headline)  # reads all events, once for both figures
    then = "\n              megatron-sov "
    adapter = f"{then}convert to-peft {words} PEFT_DIR" if config.lora.on else ""
    minutes, seconds = divmod(round(wall_s), 60)
    # the loss of compared responses says nothing
    compared = {source.name for source in sources if source.group > 1 or source.train_documents is not None}
    figures = (heldout.text(headline, lambda source: source not in compared), means)
    return (f"complete: step {done.step}, {format_count(done.tokens)} tokens in {minutes}:{seconds:02d} min"
            + "".join(f"; {text}" for text in figures if text)
            + f"\n  checkpoint  {checkpoint}\n"
            f"  next        megatron-sov report {words}{then}{ask}{then}convert to-hf {words} HF_DIR"
            + adapter)
