"""The spectrum of a run's checkpoints in the report: pass@k of each in each domain, and the best ones."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from megatron_sov.obs.figures import number
from megatron_sov.pages.content import Section, Table


def spectrum_section(events: list[dict[str, Any]]) -> Section:
    """Return the section; without events it has no content, and is left out.

    Args:
        events: `ssp_probe` events; of one probe's folder the newest counts.
    """
    newest = {str(e.get("output")): e for e in events if e.get("table")}.values()
    tables = [table for e in newest for table in (_figures(e), _choices(e), *_gains(e))]
    return Section("Spectrum of the checkpoints", tables=tables,
                   text="pass@k of each checkpoint in each domain, with 95 % intervals over problems; the "
                        "best single checkpoint of a domain is bold.")


def _figures(event: dict[str, Any]) -> Table:
    k, domains = event["k"], event["domains"]
    found = {(row["checkpoint"], row["domain"]): row for row in event["table"]}
    best = {(c["checkpoint"], c["domain"]) for c in event["choice"]}
    rows = []
    for checkpoint in event["checkpoints"]:
        name = checkpoint["name"]
        cells = [_cell(found[name, domain], k, (name, domain) in best) for domain in domains]
        rows.append([f"{name} (merged)" if checkpoint["is_merged"] else name, *cells])
    sizes = {row["domain"]: row["num_prompts"] for row in event["table"]}
    return Table([f"pass@{k}, {event.get('reward')}, {event.get('samples')} samples",
                  *(f"{domain} ({int(number(sizes[domain])):,} problems)" for domain in domains)], rows)


def _cell(row: dict[str, Any], k: int, is_best: bool) -> str:
    estimate = next(e for e in row["pass_at_k"] if e["k"] == k)
    low, high = map(number, estimate["interval"])
    text = f"{number(estimate['value']):.1%} ({low:.1%} to {high:.1%})"
    return Markup("<strong>{}, best</strong>").format(text) if is_best else text


def _choices(event: dict[str, Any]) -> Table:
    return Table(["domain", "best checkpoint", f"pass@{event['k']}", "not told from it by these problems"],
                 [[c["domain"], c["checkpoint"], f"{number(c['value']):.1%}",
                   ", ".join(c["as_good"]) or "none: the choice is clear"] for c in event["choice"]])


def _gains(event: dict[str, Any]) -> list[Table]:
    rows = [[g["checkpoint"], g["domain"], g["expert"], f"pass@{g['k']}", f"{number(g['gain']):+.1%}",
             f"{number(g['interval'][0]):+.1%} to {number(g['interval'][1]):+.1%}"]
            for g in event.get("merged") or []]
    head = ["merged checkpoint", "domain", "against its expert", "figure", "gain", "95 % interval"]
    return [Table(head, rows)] if rows else []
