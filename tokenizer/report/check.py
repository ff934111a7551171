"""Results of tokenizer checks and the HTML report."""

from dataclasses import dataclass, field
from typing import Any, Literal

from markupsafe import Markup

from megatron_sov.base.pages.page import Chapter, PageSection, PageTable, render_page as render_page
from tokenizer.formats.reader import LoadedTokenizer

Verdict = Literal["good", "note", "bad"]


def choose_verdict(is_bad: object, is_note: object) -> Verdict:
    if is_bad:
        return "bad"
    return "note" if is_note else "good"


@dataclass(frozen=True)
class TokenizerCheck:
    name: str
    """Key in the JSON file."""
    title: str
    verdict: Verdict
    """bad: a defect; note: no defect, but relevant for some uses."""
    summary: str
    """A sentence with the main numbers."""
    numbers: dict[str, Any]
    """Measurements as JSON values for `format_json`."""
    tables: list[PageTable] = field(default_factory=list)


def format_token(token: bytes | str) -> str:
    """Format a token for display: spaces as ␣, control characters and partial characters as escapes."""
    text = token if isinstance(token, str) else token.decode("utf-8", errors="backslashreplace")
    visible = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(visible).replace(" ", "␣")


def format_tokens(tokens: list[bytes]) -> str:
    return "|".join(map(format_token, tokens))


def is_text(token: bytes) -> bool:
    """Return whether a token is valid UTF-8."""
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


VERDICTS = {"good": Markup('<span class="good">good</span>'), "note": "note",
            "bad": Markup('<span class="bad">BAD</span>')}


def render_report(tokenizer: LoadedTokenizer, checks: list[TokenizerCheck]) -> str:
    """Return the HTML page."""
    overview = PageTable(["check", "verdict", "result"],
                         [[c.title, VERDICTS[c.verdict], c.summary] for c in checks])
    num_bad = sum(c.verdict == "bad" for c in checks)
    subtitle = (f"{tokenizer.vocab_size:,} ids, opened by {tokenizer.library}; {len(checks)} checks, "
                f"{num_bad or 'none'} of them bad.")
    sections = [PageSection(c.title, f"{c.summary[0].upper()}{c.summary[1:]}.", [], c.tables) for c in checks]
    chapter = Chapter(tokenizer.name, "", _collect_figures(tokenizer, checks), sections)
    return render_page("Tokenizer report", tokenizer.name, subtitle, [chapter],
                       overview=("All checks", overview), anchor="tokenizer")


def _collect_figures(tokenizer: LoadedTokenizer, checks: list[TokenizerCheck]) -> list[tuple[str, str, str]]:
    """Return (label, value, unit) rows for the top of the page."""
    by_name = {c.name: c for c in checks}
    figures = [("Vocabulary", f"{tokenizer.vocab_size:,}", f"{len(tokenizer.special):,} special")]
    if "texts" in by_name:
        figures += [(name, f"{numbers['bytes_per_token']:.3f}", "bytes per token")
                    for name, numbers in list(by_name["texts"].numbers["texts"].items())[:8]]
    if "used" in by_name:
        figures.append(("Never used", f"{by_name['used'].numbers['share_never_used']:.1%}",
                        "of all tokens, on these texts"))
    if "superwords" in by_name:
        figures.append(("Superwords", f"{by_name['superwords'].numbers['share']:.1%}", "of the vocabulary"))
    return figures
