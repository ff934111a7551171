"""Checks as a page."""

from __future__ import annotations

from markupsafe import Markup

from megatron_sov.pages.page import Chapter, Section, Table
from megatron_sov.pages.page import render as render_page
from tokenizer.formats.loaders import Opened
from tokenizer.report.check import Check

VERDICTS = {"good": Markup('<span class="good">good</span>'), "note": "note",
            "bad": Markup('<span class="bad">BAD</span>')}


def render(tokenizer: Opened, checks: list[Check]) -> str:
    """Return the HTML of a report on one tokenizer."""
    overview = Table(["check", "verdict", "what was found"],
                     [[c.title, VERDICTS[c.verdict], c.summary] for c in checks])
    bad = sum(c.verdict == "bad" for c in checks)
    subtitle = f"{tokenizer.vocab_size:,} ids, opened by {tokenizer.library}; {len(checks)} checks, " + (
        f"{bad} of them bad." if bad else "none of them bad.")
    sections = [Section(c.title, f"{c.summary[0].upper()}{c.summary[1:]}.", c.charts, c.tables)
                for c in checks]
    chapter = Chapter(tokenizer.name, "", _figures(tokenizer, checks), sections)
    return render_page("Tokenizer report", tokenizer.name, subtitle, [chapter],
                       overview=("All checks", overview), anchor="tokenizer")


def _figures(tokenizer: Opened, checks: list[Check]) -> list[tuple[str, str, str]]:
    """Return the figures that stand at the top."""
    by_name = {c.name: c for c in checks}
    figures = [("Vocabulary", f"{tokenizer.vocab_size:,}", f"{len(tokenizer.special):,} special")]
    if "texts" in by_name:
        figures += [(name, f"{found['bytes_per_token']:.3f}", "bytes per token")
                    for name, found in list(by_name["texts"].numbers["texts"].items())[:8]]
    if "used" in by_name:
        figures.append(("Never used", f"{by_name['used'].numbers['share_never_used']:.1%}",
                        "of all tokens, on these texts"))
    if "superwords" in by_name:
        figures.append(("Superwords", f"{by_name['superwords'].numbers['share']:.1%}", "of the vocabulary"))
    if "reach" in by_name:
        figures.append(("Unreachable", f"{by_name['reach'].numbers['num_unreachable']:,}", "tokens"))
    return figures
