"""How a constraint and a query become the turns of a conversation."""

from __future__ import annotations

from data_prep.synth.generators.autoif.texts import Texts
from data_prep.synth.generators.drawing import choose, share_of

PLAIN_SHARE = 0.5
"""Of the phrasings, that add no word of their own, as in Typhoon-S."""


def in_user_turn(query: str, constraint: str, texts: Texts, *names: object) -> list[dict[str, str]]:
    """Return one turn that holds both; names decide the phrasing."""
    if share_of("plain", *names) < PLAIN_SHARE:
        first, second = (query, constraint) if share_of("order", *names) < 0.5 else (constraint, query)
        content = _ended(first) + second
    else:
        content = _filled(choose(texts.user, "phrasing", *names), query, constraint)
    return [{"role": "user", "content": content}]


def in_system_turn(query: str, constraint: str, texts: Texts, *names: object) -> list[dict[str, str]]:
    """Return the constraint as system turn, and the query; names decide the phrasing."""
    content = constraint
    if share_of("plain", *names) >= PLAIN_SHARE:
        content = _filled(choose(texts.system, "phrasing", *names), query, constraint)
    return [{"role": "system", "content": content}, {"role": "user", "content": query}]


def _ended(text: str) -> str:
    """Return a text that another may follow in the same line, or in a new one where it has several itself."""
    return text + "\n\n" if "\n" in text else text + " "


def _filled(phrasing: str, query: str, constraint: str) -> str:
    """Put both into a phrasing; braces of their own are nothing to fill in."""
    before, _, after = phrasing.partition("{constraint}")
    return (before.replace("{query}", query) + constraint + after.replace("{query}", query)).strip()
