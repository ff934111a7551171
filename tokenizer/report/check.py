"""What a check of a tokenizer says: a verdict, numbers, and tables and charts made of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_sov.base.pages.page import Chart, PageTable

Verdict = Literal["good", "note", "bad"]


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
    charts: list[Chart] = field(default_factory=list)


def shown(token: bytes | str) -> str:
    """Return a token for people: spaces as ␣, controls and bytes that are no character as escapes."""
    text = token if isinstance(token, str) else token.decode("utf-8", errors="backslashreplace")
    visible = (c if c.isprintable() and c != " " else "␣" if c == " " else c.encode("unicode_escape").decode()
               for c in text)
    return "".join(visible)


def cut(tokens: list[bytes]) -> str:
    """Return tokens side by side, with a bar between any two."""
    return "|".join(map(shown, tokens))


def is_text(token: bytes) -> bool:
    """Return whether a token's bytes are whole characters."""
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True
