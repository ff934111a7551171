"""Held-out pairs of a run that learns from preferences: how many it ranks right before and after."""

from __future__ import annotations

from typing import Any

from megatron_sov.obs.figures import number
from megatron_sov.pages.content import Section, Table


def pair_section(events: list[dict[str, Any]]) -> Section:
    """Return the section of `heldout_pairs` events, in the order in which they were written; of an older
    step one may come later, by `megatron-sov eval pairs --run`."""
    by_source: dict[str, list[dict[str, Any]]] = {}
    for event in sorted(events, key=lambda event: number(event.get("step"))):
        by_source.setdefault(str(event.get("source")), []).append(event)
    rows = [[source, f"{number(found[-1].get('pairs')):,.0f}", *map(_ranked, (found[0], found[-1]))]
            for source, found in by_source.items()]
    head = ["source", "pairs", "ranked right before", "ranked right after"]
    return Section("Held-out pairs", tables=[Table(head, rows)] if rows else [],
                   text="The share of pairs whose chosen answer the model would rather write than the "
                        "rejected one: greater log-probability per token.")


def _ranked(event: dict[str, Any]) -> str:
    return f"{number(event.get('right')):.1%} (step {number(event.get('step')):,.0f})"
