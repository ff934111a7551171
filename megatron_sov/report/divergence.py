"""How far a run that learns from a teacher is from it on held-out documents, before and after."""

from __future__ import annotations

from typing import Any

from megatron_sov.obs.figures import figure, number
from megatron_sov.pages.content import Section, Table


def divergence_section(events: list[dict[str, Any]]) -> Section:
    """Return the section of `heldout_divergence` events, in the order in which they were written."""
    by_source: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        by_source.setdefault(str(event.get("source")), []).append(event)
    rows = [[source, f"{number(found[-1].get('tokens')):,.0f}",
             *(_measured(event, name) for name in ("kl", "divergence") for event in (found[0], found[-1]))]
            for source, found in by_source.items()]
    head = ["source", "tokens", "KL before", "KL after", "learned divergence before",
            "learned divergence after"]
    return Section("Distance from the teacher", tables=[Table(head, rows)] if rows else [],
                   text="On held-out documents, means over the tokens that are learned, in nats: "
                        "KL(teacher || student), and the divergence that the run learns.")


def _measured(event: dict[str, Any], name: str) -> str:
    return f"{figure(number(event.get(name)))} (step {number(event.get('step')):,.0f})"
