"""Whether the model behind an address is still the one whose answers are kept: it answers a fixed question,
and what it says is compared with what it said before.  Names say little: a server that is started again may
have another model under the same one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

TEXT = "The history of the town began when"
TEXT_PROBE: Mapping[str, Any] = {"prompt": TEXT, "max_tokens": 32, "temperature": 0}
"""For `/completions`: the likeliest continuation, by which two models hardly ever agree."""
CHAT_PROBE: Mapping[str, Any] = {"messages": [{"role": "user", "content": f"Go on: {TEXT}"}],
                                 "max_tokens": 32, "temperature": 0}
"""For `/chat/completions`."""
SCORE_PROBE: Mapping[str, Any] = {"messages": [{"role": "user", "content": "Tell me of the town."},
                                               {"role": "assistant", "content": TEXT}]}
"""For reward models."""
ASKED_AGAIN = 3
"""How often before another model is believed: in another batch a near tie falls otherwise."""
_SAID = ("text", "content", "reasoning_content", "reasoning")
_CLOSE = 0.02
"""Of a score: what another batch or another card may change."""


def is_same(one: Any, other: Any) -> bool:
    """Return whether two answers to one question say the same and name the same model."""
    names = [answer.get("model") for answer in (one, other) if isinstance(answer, dict)]
    if len(names) == 2 and all(isinstance(name, str) for name in names) and names[0] != names[1]:
        return False
    ours, theirs = list(_said(one)), list(_said(other))
    return len(ours) == len(theirs) and all(map(_agree, ours, theirs))


def _agree(one: str | float, other: str | float) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return abs(one - other) <= _CLOSE * max(1.0, abs(one), abs(other))


def _said(answer: Any, name: str = "") -> Iterator[str | float]:
    """Yield the texts of an answer's choices, and the numbers of its data."""
    if isinstance(answer, dict):
        for key in sorted(answer):
            if name or key in ("choices", "data"):
                yield from _said(answer[key], key)
    elif isinstance(answer, list):
        for part in answer:
            yield from _said(part, name)
    elif (isinstance(answer, str) and name in _SAID) or (isinstance(answer, float) and name == "data"):
        yield answer
