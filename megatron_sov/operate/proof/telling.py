"""A verdict as a text and as JSON."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from typing import Any

from megatron_sov.operate.proof.miniature import Miniature
from megatron_sov.operate.proof.proving import DIFFERS, EQUAL, TOLERANCE, Verdict

SHOWN = 8
"""Differences that a text names; JSON has all."""
ASSUMED = ("kernels compute what their plain versions do, and messages arrive as sent: what runs here are "
           "megatron-core's modules without Transformer Engine",
           "widths do not matter: heads, channels, experts and vocabulary are as few as the layout divides")


def as_text(small: Miniature, verdict: Verdict) -> str:
    """Return lines for people."""
    m, c = small.config.model, small.config
    lines = [f"{verdict.num_ranks} processes: {_layout(small)}",
             f"in miniature: {m.num_layers} layers, {m.num_experts} experts, {c.train.global_batch_size} "
             f"rows of {c.data.phases[0].seq_len} tokens a step"]
    if verdict.outcome == EQUAL:
        counts = verdict.compared
        lines.append(
            f"equal to one process: {counts['numbers']} numbers (losses, gradient norm, loads, biases) and "
            f"{counts['tensors']} tensors (moments, weights) of two steps are {verdict.largest:.1e} apart at "
            f"most (allowed {TOLERANCE:g}), each element is written once")
    else:
        lines.append("NOT equal to one process: " + (
            f"numbers are {verdict.largest:.2g} apart (allowed {TOLERANCE:g})" if verdict.outcome == DIFFERS
            else f"it {verdict.outcome}"))
        lines += [f"  {place}" for place in verdict.places[:SHOWN]]
        if len(verdict.places) > SHOWN:
            lines.append(f"  and {len(verdict.places) - SHOWN} more")
        lines += [f"  sent there: {site}" for site in verdict.sites[:SHOWN]]
    lines.append(f"{verdict.messages:,} messages, {verdict.seconds:.0f} s")
    lines += [line for what in (*ASSUMED, *(f"not covered: {what}" for what in small.left_out))
              for line in textwrap.wrap(f"- {what}", 110, subsequent_indent="  ")]
    return "\n".join(lines)


def as_json(small: Miniature, verdict: Verdict) -> dict[str, Any]:
    """Return the same for programs."""
    found = json.loads(json.dumps(dataclasses.asdict(verdict)))
    return {**found, "layout": dataclasses.asdict(small.config.parallel), "tolerance": TOLERANCE,
            "assumed": list(ASSUMED), "not_covered": list(small.left_out)}


def _layout(small: Miniature) -> str:
    p = small.config.parallel
    sizes = [f"{name} {getattr(p, name)}" for name in ("tp", "pp", "vpp", "cp", "ep", "etp")
             if getattr(p, name) > 1]
    switches = [name for name in ("sp", "zero1", "overlap_grad_reduce", "overlap_param_gather")
                if getattr(p, name)]
    return ", ".join([*sizes, *switches]) or "data parallel"
