"""The gate of an extension in the report: every check with what failed, and the search that
proves the test clean."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from megatron_sov.obs.figures import number
from megatron_sov.pages.content import Section, Table

MAX_CELLS = 40
VERDICTS = {True: Markup('<span class="good">passed</span>'),
            False: Markup('<span class="bad">FAILED</span>')}


def gate_section(checks: list[dict[str, Any]], searches: list[dict[str, Any]]) -> Section:
    """Return the section; without checks it has no content, and is left out.

    Args:
        checks: `gate` events in the order of steps.
        searches: `decontamination` events.
    """
    tables = [_checks(checks)] if checks else []
    failing = (checks[-1].get("failing_cells") or []) if checks else []
    if failing:
        tables.append(_cells(failing))
    tables += [_search(s) for s in searches[-1:]]
    return Section("Gate", tables=tables, text=(
        "A stage is complete when every row of needles (kind, language, length) reaches the threshold, "
        "no single cell lies below it with its whole confidence interval, and the loss on the short context "
        "is within its tolerance."))


def verdict(check: dict[str, Any]) -> Markup:
    """Return what a check found, in one word or two."""
    if check.get("judged") and not check.get("passed"):
        return Markup("good, before step {}").format(check.get("min_steps"))
    return VERDICTS[bool(check.get("passed"))]


def _checks(checks: list[dict[str, Any]]) -> Table:
    rows = []
    for check in checks:
        accuracies = [number(r.get("accuracy")) for r in check.get("rows") or []]
        rows.append([
            f"{int(check.get('step') or 0):,}", f"{min(accuracies):.1%}" if accuracies else "–",
            f"{number(check.get('threshold')):.0%}", str(len(check.get("failing_rows") or [])),
            str(len(check.get("failing_cells") or [])), f"{number(check.get('loss')):.4f}",
            f"{number(check.get('start_loss')):.4f}", f"{number(check.get('loss_limit')):.4f}",
            verdict(check)])
    return Table(["step", "worst row", "threshold", "rows below", "cells below for sure",
                  "short-context loss", "at the start", "limit", "verdict"], rows)


def _cells(cells: list[dict[str, Any]]) -> Table:
    rows = [[str(c.get("kind")), str(c.get("language")), f"{int(c['length_tokens']):,}",
             f"{number(c['depth']):.0%}", f"{c['correct']} of {c['samples']}",
             f"{number(c['interval'][0]):.1%} to {number(c['interval'][1]):.1%}"]
            for c in cells[:MAX_CELLS]]
    if len(cells) > MAX_CELLS:
        rows.append([f"and {len(cells) - MAX_CELLS:,} more", "", "", "", "", ""])
    return Table(["cells below at the last check", "language", "tokens", "depth", "right", "95 % interval"],
                 rows)


def _search(found: dict[str, Any]) -> Table:
    scanned, held = found.get("scanned_tokens") or {}, found.get("train_tokens") or {}
    rows = [
        ["questions of the test in the training text",
         f"{found.get('questions_found')} of {found.get('questions'):,}"],
        [f"windows of {found.get('window_tokens')} held-out tokens in the training text",
         f"{found.get('windows_found'):,} of {found.get('windows'):,} ({number(found.get('overlap')):.2%})"]]
    rows += [[f"tokens searched of {name}", f"{count:,} of {held.get(name, 0):,}"]
             for name, count in scanned.items()]
    return Table(["search for the test in the training data", "found"], rows)
