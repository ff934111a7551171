"""How far an episode may go: settings that differ for training and testing, and stand beside each figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt, Le

from megatron_sov.base.settings import AtLeastOne

MOST_TIMEOUT_S = 86_400.0


@dataclass(frozen=True)
class EpisodeLimits:
    """Where an episode ends."""

    max_turns: AtLeastOne = 5
    """Of the model, its answer among them."""
    max_tool_chars: AtLeastOne = 1024
    """Of one result; the rest is cut off, and the model is told so."""
    max_prompt_tokens: AtLeastOne = 4096
    """Of the first prompt: rules, tools and question."""
    max_response_tokens: AtLeastOne = 8192
    """Behind the first prompt: what the model writes and what tools say."""
    max_turn_tokens: AtLeastOne = 4096
    """That the model may write in one turn; asked of an engine whatever is left of an episode, so that its
    samples do not depend on that."""
    max_calls_per_turn: AtLeastOne = 8
    """More calls of a turn are not made, and the model is told so."""
    call_timeout_s: Annotated[float, Gt(0), Le(MOST_TIMEOUT_S)] = 30.0
    """For one call, without the time that it waits for a processor; what takes longer is ended."""
    max_state_bytes: AtLeastOne = 16 << 20
    """Of an environment's state as JSON, which the journal keeps for each turn."""


LIMITS = {"train": EpisodeLimits(), "test": EpisodeLimits(max_turns=12, max_tool_chars=4000)}
"""Name -> limits; both as in Typhoon-S's released code (scb-10x/typhoon-s), whose agent is trained with 5
turns and 1,024 characters of a tool's answer, and judged with 12 and 4,000."""


def cut(text: str, max_chars: int) -> tuple[str, bool]:
    """Return a tool's result within the limit, with a note of what was cut, and whether anything was."""
    if len(text) <= max_chars:
        return text, False
    note = f"\n[cut: {max_chars:,} of {len(text):,} characters]"
    return (text[:max_chars - len(note)] + note if len(note) < max_chars else text[:max_chars]), True
