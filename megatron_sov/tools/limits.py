"""How far an episode may go: settings that differ for training and testing, and stand beside each figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from megatron_sov.errors import UserError, list_problems, nearest

MOST_TIMEOUT_S = 86_400.0


@dataclass(frozen=True)
class EpisodeLimits:
    """Where an episode ends."""

    max_turns: int = 5
    """Of the model, its answer among them."""
    max_tool_chars: int = 1024
    """Of one result; the rest is cut off, and the model is told so."""
    max_prompt_tokens: int = 4096
    """Of the first prompt: rules, tools and question."""
    max_response_tokens: int = 8192
    """Behind the first prompt: what the model writes and what tools say."""
    max_turn_tokens: int = 4096
    """That the model may write in one turn; asked of an engine whatever is left of an episode, so that its
    samples do not depend on that."""
    max_calls_per_turn: int = 8
    """More calls of a turn are not made, and the model is told so."""
    call_timeout_s: float = 30.0
    """For one call, without the time that it waits for a processor; what takes longer is ended."""
    max_state_bytes: int = 16 << 20
    """Of an environment's state as JSON, which the journal keeps for each turn."""

    def problems(self) -> list[str]:
        """Return one sentence for every rule that these settings break."""
        p = [f"{f.name} = {getattr(self, f.name)} must be at least 1" for f in fields(self)
             if f.name != "call_timeout_s" and getattr(self, f.name) < 1]
        if not 0 < self.call_timeout_s <= MOST_TIMEOUT_S:
            p.append(f"call_timeout_s = {self.call_timeout_s} must be positive and at most "
                     f"{MOST_TIMEOUT_S:g}")
        return p


LIMITS = {"train": EpisodeLimits(), "test": EpisodeLimits(max_turns=12, max_tool_chars=4000)}
"""Name -> limits; both as in Typhoon-S's released code (scb-10x/typhoon-s), whose agent is trained with 5
turns and 1,024 characters of a tool's answer, and judged with 12 and 4,000."""


def limits_of(name: str, changes: Sequence[str]) -> EpisodeLimits:
    """Return limits by name, with changes `key=value`.

    Raises:
        UserError: there is no such limit, or a value has no meaning.
    """
    known = {f.name: f for f in fields(EpisodeLimits)}
    changed: dict[str, Any] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or key not in known:
            raise UserError(f"--limit {change!r}: must be one of {', '.join(known)} with a value, e.g. "
                            f"max_turns=7{nearest(key, known)}")
        made: Callable[[str], float] = float if key == "call_timeout_s" else int
        try:
            changed[key] = made(text)
        except ValueError:
            raise UserError(f"--limit {change!r}: {text!r} is no {'number' if made is float else 'whole '}"
                            f"{'' if made is float else 'number'}") from None
    limits = replace(LIMITS[name], **changed)
    if problems := limits.problems():
        raise UserError(list_problems("--limit", problems))
    return limits


def cut(text: str, max_chars: int) -> tuple[str, bool]:
    """Return a tool's result within the limit, with a note of what was cut, and whether anything was."""
    if len(text) <= max_chars:
        return text, False
    note = f"\n[cut: {max_chars:,} of {len(text):,} characters]"
    return (text[:max_chars - len(note)] + note if len(note) < max_chars else text[:max_chars]), True
