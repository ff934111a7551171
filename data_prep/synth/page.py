"""The page of a folder of synthesis: samples kept and rejected and why, costs, and a few samples of each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import write_output
from megatron_sov.base.errors import UserError, visible
from megatron_sov.base.figures import format_count, format_value
from megatron_sov.base.pages.page import Chapter, PageSection, PageTable, render as render_page

REPORT_HTML, SUMMARY = "report.html", "summary.json"
MAX_SUMMARY_BYTES = 64 << 20
NOT_STATED = "not stated"
COSTS = {"num_requests": "requests", "input_tokens": "tokens read", "output_tokens": "tokens written",
         "cost": "cost, in the currency of the prices", "seconds": "seconds of requests"}


def write_page(output: Path, file: Path | None = None) -> Path:
    """Write the page.

    Args:
        output: folder of `sov-data synth`.
        file: the page; None: report.html in it.

    Raises:
        UserError: there is no summary, it is damaged, or the disk refuses.
    """
    file = file or output / REPORT_HTML
    write_output(file, render(read_summary(output)))
    return file


def read_summary(output: Path) -> dict[str, Any]:
    """Return what the end of a run has written; raises UserError where there is none, or it is damaged."""
    file = output / SUMMARY
    try:
        if file.stat().st_size > MAX_SUMMARY_BYTES:
            raise ValueError(f"has more than {MAX_SUMMARY_BYTES:,} bytes")
        found = json.loads(file.read_bytes())
        if not isinstance(found, dict) or found.get("format") != 1 or "generator" not in found:
            raise ValueError("is no summary of samples")
    except FileNotFoundError:
        raise UserError(f"{file}: does not exist; run `sov-data synth` to its end first") from None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{file}: cannot be read ({e}); run the same `sov-data synth` again") from None
    return found


def render(summary: Mapping[str, Any], now_s: float | None = None) -> str:
    """Return the page's HTML; `now_s`: Unix time to print as the time of writing."""
    share = f"{summary['num_kept'] / summary['num_samples']:.1%}" if summary["num_samples"] else "–"
    figures = [("Kept", format_count(summary["num_kept"]), "samples"),
               ("Rejected", format_count(summary["num_rejected"]), "samples"),
               ("Share kept", share, "of samples"),
               ("Items", format_count(summary["num_items"]),
                f"{summary['num_unusable_items']:,} without an answer of use")]
    chapters = [Chapter("Kept and rejected", "", figures, list(_sections(summary)))]
    # `shown` is sorted by reason, as groupby needs it; the kept samples have none and come first
    for reason, group in groupby(summary["shown"], lambda one: str(one["reason"])):
        num = summary["rejected"].get(reason, 0) if reason else summary["num_kept"]
        chapters.append(Chapter(f"Rejected: {visible(reason)}" if reason else "Kept", f"{num:,} samples", [],
                                [
            PageSection(f"Sample {i}", _about(one), turns=[(visible(who), visible(said) or "(nothing)")
                                                           for who, said in one["turns"]])
            for i, one in enumerate(group, 1)]))
    more = "" if summary["is_complete"] else " Items are left: these are the figures so far."
    return render_page(
        "Synthesis", str(summary["generator"]),
        f"{summary['num_kept']:,} of {summary['num_samples']:,} samples kept, of {summary['num_items']:,} "
        f"items.{more}", chapters, anchor="part", nothing="Nothing was made.", now_s=now_s)


def _sections(summary: Mapping[str, Any]) -> Iterator[PageSection]:
    licences = (f"{name or NOT_STATED} ({num:,})" for name, num in summary["licences"].items())
    facts = [["generator", f"{summary['generator']}, version {summary['version']}"],
             ["model", _models(summary)],
             ["judge", summary["judge"] or "the same"], ["licences of the source", ", ".join(licences)],
             ["templates", ", ".join(f"{name} {version}" for name, version in summary["templates"].items())]]
    yield PageSection("What made it", tables=[PageTable(["", ""], [[label, visible(str(value)) or "–"]
                                                                   for label, value in facts])])
    reasons = [[visible(reason), f"{num:,}", f"{num / summary['num_samples']:.1%}"]
               for reason, num in summary["rejected"].items()]
    if reasons:
        yield PageSection("Reasons",
                          "The first check that a sample does not pass is its reason; rejected.jsonl "
                          "has each with all verdicts.", tables=[PageTable(["reason", "samples", "share"],
                                                                           reasons)])
    steps = [[str(one["step"]), f"{one['source']} ({one['kind']})", f"{one['documents_in']:,}",
              f"{one['documents_kept']:,}", ", ".join(f"{num:,} {reason}" for reason,
                                                      num in one["dropped"].items())]
             for one in summary["steps"]]
    if steps:
        yield PageSection("Steps after the generator's own checks", tables=[
            PageTable(["step", "looks at", "in", "kept", "dropped for"], steps)])
    costs, per = summary["costs"], summary["per_kept"] or {}
    rows = [[label, _number(costs[name]), _number(per.get(name.removeprefix("num_")))]
            for name, label in COSTS.items()]
    yield PageSection("Costs", "All requests, those that failed and those of rejected samples too.", tables=[
        PageTable(["what", "in all", "for each kept sample"], rows),
        PageTable(["what came back", "requests"], [[visible(str(name)), f"{num:,}"]
                                                   for name, num in costs["outcomes"].items()])])
    yield PageSection("Settings", json=visible(json.dumps(
        {"generator": summary["settings"],
         "steps": [[one["step"], one["settings"]] for one in summary["steps"]]},
        indent=1, ensure_ascii=False)))


def _models(summary: Mapping[str, Any]) -> str:
    """Return the requested model, and the models that answered with their numbers of samples if they
    differ."""
    requested, answered = summary["model"], summary.get("models", {})
    if not set(answered) - {requested}:
        return requested or NOT_STATED
    counts = ", ".join(f"{name} ({num:,})" for name, num in answered.items())
    return f"{requested} requested; samples written by {counts}"


def _number(value: float | None) -> str:
    if value is None:
        return NOT_STATED
    return f"{value:,}" if isinstance(value, int) else format_value(value)


def _about(one: Mapping[str, Any]) -> str:
    verdicts = ", ".join(f"{check}{'' if passed else ' NOT passed'}{f' ({detail})' if detail else ''}"
                         for check, passed, detail in one["verdicts"])
    parts = [f"{one['sample']}.", f"{one['detail']}." if one["detail"] else "",
             f"Own checks: {verdicts}." if verdicts else "",
             f"Notes: {json.dumps(one['notes'], ensure_ascii=False)}" if one["notes"] else ""]
    return visible(" ".join(filter(None, parts)))
