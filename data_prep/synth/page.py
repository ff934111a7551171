"""The page of a folder of synthesis: what was kept and rejected and why, what it has cost, and samples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from data_prep.curate.journey.page import bars
from megatron_sov.base.artifacts import write_output
from megatron_sov.base.errors import UserError, visible
from megatron_sov.base.figures import format_count, format_duration, format_value
from megatron_sov.base.pages.page import Chapter, PageSection, PageTable, Panel, render as render_page

REPORT_HTML, SUMMARY = "report.html", "summary.json"
MAX_SUMMARY_BYTES = 64 << 20
NOT_STATED = "not stated"


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
    """Return what the end of a run has written.

    Raises:
        UserError: there is none, or it is damaged.
    """
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
    """Return the page's HTML.

    Args:
        summary: of the run.
        now_s: Unix time to print as the time of writing; the current one by default.
    """
    chapters = [Chapter("Kept and rejected", "", _figures(summary), [*_reasons(summary), *_agreement(summary),
                                                                     _settings(summary)]),
                Chapter("What it has cost", "", [], [_sheet(summary)])]
    shown = [one for one in summary["shown"] if not one["reason"]]
    if shown:
        chapters.append(Chapter("Kept", f"{summary['num_kept']:,} samples", [], [
            PageSection(f"Sample {i}", _about(one), turns=_turns(one)) for i, one in enumerate(shown, 1)]))
    # `shown` is sorted by reason, as groupby needs it
    for reason, group in groupby((one for one in summary["shown"] if one["reason"]),
                                 lambda one: str(one["reason"])):
        chapters.append(Chapter(f"Rejected: {visible(reason)}",
                                f"{summary['rejected'].get(reason, 0):,} samples", [], [
                                    PageSection(f"Sample {i}", _about(one), turns=_turns(one))
                                    for i, one in enumerate(group, 1)]))
    more = "" if summary["is_complete"] else " Items are left: these are the figures so far."
    return render_page(
        "Synthesis", str(summary["generator"]),
        f"{summary['num_kept']:,} of {summary['num_samples']:,} samples kept, of {summary['num_items']:,} "
        f"items.{more}", chapters, opening=_opening(summary), anchor="part", nothing="Nothing was made.",
        now_s=now_s)


def _opening(summary: Mapping[str, Any]) -> list[Panel]:
    templates = ", ".join(f"{name} {version}" for name, version in summary["templates"].items())
    facts = [("Generator", f"{summary['generator']}, version {summary['version']}"),
             ("Model", _models(summary)), ("Judge", summary["judge"] or "the same"),
             ("Templates", templates or "none"),
             ("Licences of the source", ", ".join(f"{name or NOT_STATED} ({num:,})"
                                                  for name, num in summary["licences"].items()) or "–")]
    return [Panel("What made it", 5, [(label, visible(value)) for label, value in facts]),
            Panel("Mostly rejected for", 7, tables=[_reasons_table(summary, 6)])]


def _models(summary: Mapping[str, Any]) -> str:
    """Return the requested model, and the models that answered with their numbers of samples if they
    differ."""
    requested, answered = summary["model"], summary.get("models", {})
    if not set(answered) - {requested}:
        return requested or NOT_STATED
    counts = ", ".join(f"{name} ({num:,})" for name, num in answered.items())
    return f"{requested} requested; samples written by {counts}"


def _figures(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    share = f"{summary['num_kept'] / summary['num_samples']:.1%}" if summary["num_samples"] else "–"
    return [("Kept", format_count(summary["num_kept"]), "samples"),
            ("Rejected", format_count(summary["num_rejected"]), "samples"),
            ("Share kept", share, "of samples"),
            ("Items", format_count(summary["num_items"]),
             f"{summary['num_unusable_items']:,} without an answer of use")]


def _reasons_table(summary: Mapping[str, Any], most: int) -> PageTable:
    rows = [[visible(reason), f"{num:,}", f"{num / summary['num_samples']:.1%}"]
            for reason, num in list(summary["rejected"].items())[:most]]
    return PageTable(["reason", "samples", "share"], rows or [["nothing was rejected", "", ""]])


def _reasons(summary: Mapping[str, Any]) -> list[PageSection]:
    if not summary["rejected"]:
        return []
    counts = {visible(reason): float(num) for reason, num in summary["rejected"].items()}
    steps = [[str(one["step"]), f"{one['source']} ({one['kind']})", f"{one['documents_in']:,}",
              f"{one['documents_kept']:,}",
              ", ".join(f"{num:,} {reason}" for reason, num in one["dropped"].items()) or "–"]
             for one in summary["steps"]]
    said = ("The first check that a sample does not pass is its reason; rejected.jsonl has each with all "
            "verdicts.")
    chart = bars(counts, "samples", "Samples that were rejected, by reason.")
    sections = [PageSection("Reasons", said, [chart], [_reasons_table(summary, 200)])]
    if steps:
        table = PageTable(["step", "looks at", "in", "kept", "dropped for"], steps)
        sections.append(PageSection("Steps behind the generator's own checks", tables=[table]))
    return sections


def _agreement(summary: Mapping[str, Any]) -> list[PageSection]:
    if not summary["agreement"]:
        return []
    rows = [[visible(one["who"]), f"{one['num_samples']:,}", f"{one['agreement']:.1%}",
             "undefined" if one["kappa"] is None else f"{one['kappa']:.3f}", f"{one['num_good']:,}",
             f"{one['num_false_kept']:,}", f"{one['num_false_rejected']:,}"] for one in summary["agreement"]]
    bound = ""
    if summary["min_kappa"] is not None:
        said = "passed" if summary["gate_passed"] else "not passed"
        bound = f" Asked for at least {summary['min_kappa']:g}: {said}."
    table = PageTable(["who", "samples", "agreement", "kappa", "good, say people", "bad ones kept",
                       "good ones rejected"], rows)
    return [PageSection("Agreement with people", "Of the samples that people have looked at; kappa is "
                        f"Cohen's (1960), agreement beyond chance.{bound}", tables=[table])]


def _settings(summary: Mapping[str, Any]) -> PageSection:
    return PageSection("Settings", "Of the generator, and of each step.", json=visible(json.dumps(
        {"generator": summary["settings"],
         "steps": [[one["step"], one["kind"], one["source"], one["settings"]] for one in summary["steps"]]},
        indent=1, ensure_ascii=False)))


def _sheet(summary: Mapping[str, Any]) -> PageSection:
    costs, per = summary["costs"], summary["per_kept"] or {}
    names = [("requests", "num_requests", "requests"), ("tokens read", "input_tokens", "input_tokens"),
             ("tokens written", "output_tokens", "output_tokens"), ("cost", "cost", "cost"),
             ("seconds of requests", "seconds", "seconds")]
    rows = [[label, _number(costs[key]), _number(per.get(each))] for label, key, each in names]
    outcomes = [[visible(str(name)), f"{num:,}"] for name, num in costs["outcomes"].items()]
    took = format_duration(costs["seconds"])
    said = ("All requests, those that failed and those of rejected samples too; several run at a time, one "
            f"after the other they take {took}. The cost is in the currency of the prices that were given.")
    tables = [PageTable(["what", "in all", "for each kept sample"], rows)]
    if outcomes:
        tables.append(PageTable(["what came back", "requests"], outcomes))
    return PageSection("Sheet", said, tables=tables)


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


def _turns(one: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(visible(who), visible(said) or "(nothing)") for who, said in one["turns"]]
