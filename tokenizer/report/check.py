"""What a check of a tokenizer says: a verdict, numbers, and tables made of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from markupsafe import Markup

from megatron_sov.base.pages.page import Chapter, PageSection, PageTable, render_page as render_page
from tokenizer.formats.reader import LoadedTokenizer

Verdict = Literal["good", "note", "bad"]


def choose_verdict(is_bad: object, is_note: object) -> Verdict:
    """Return "bad" or "note" where that holds, "bad" before "note", else "good"."""
    if is_bad:
        return "bad"
    return "note" if is_note else "good"


@dataclass(frozen=True)
class TokenizerCheck:
    """One question about a tokenizer and its answer."""

    name: str
    """Key in the JSON file."""
    title: str
    verdict: Verdict
    """good: as it should be; note: true, and worth knowing; bad: a defect."""
    summary: str
    """The answer in a sentence, with its numbers."""
    numbers: dict[str, Any]
    """Everything that was measured, as plain JSON values."""
    tables: list[PageTable] = field(default_factory=list)


def format_token(token: bytes | str) -> str:
    """Return a token for people: spaces as ␣, controls and bytes that are no character as escapes."""
    text = token if isinstance(token, str) else token.decode("utf-8", errors="backslashreplace")
    visible = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(visible).replace(" ", "␣")


def format_tokens(tokens: list[bytes]) -> str:
    """Return tokens side by side, with a bar between any two."""
    return "|".join(map(format_token, tokens))


def is_text(token: bytes) -> bool:
    """Return whether a token's bytes are whole characters."""
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


# Checks as a page.

VERDICTS = {"good": Markup('<span class="good">good</span>'), "note": "note",
            "bad": Markup('<span class="bad">BAD</span>')}


def render_report(tokenizer: LoadedTokenizer, checks: list[TokenizerCheck]) -> str:
    """Return the HTML of a report on one tokenizer."""
    overview = PageTable(["check", "verdict", "what was found"],
                         [[c.title, VERDICTS[c.verdict], c.summary] for c in checks])
    bad = sum(c.verdict == "bad" for c in checks)
    subtitle = f"{tokenizer.vocab_size:,} ids, opened by {tokenizer.library}; {len(checks)} checks, " + (
        f"{bad} of them bad." if bad else "none of them bad.")
    sections = [PageSection(c.title, f"{c.summary[0].upper()}{c.summary[1:]}.", [], c.tables) for c in checks]
    chapter = Chapter(tokenizer.name, "", _collect_figures(tokenizer, checks), sections)
    return render_page("Tokenizer report", tokenizer.name, subtitle, [chapter],
                       overview=("All checks", overview), anchor="tokenizer")


def _collect_figures(tokenizer: LoadedTokenizer, checks: list[TokenizerCheck]) -> list[tuple[str, str, str]]:
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
    return figures
