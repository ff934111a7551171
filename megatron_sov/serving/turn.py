"""What a model's turn says, thinks and calls, while it is being written and at its end."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_sov.chat.marks import (
    BEGIN_CALL,
    BEGIN_THOUGHTS,
    END_THOUGHTS,
    FAMILIES,
    as_written,
    plain_form,
)
from megatron_sov.chat.tool_calls import BadCall, ToolCall, parse_turn

_OTHERS = tuple(mark for family in FAMILIES[1:] for mark in family)
_UNFINISHED = re.compile(r"(?:<\|start\|>[^<]*)?(?:<\|channel\|>[^<]*(?:<\|constrain\|>\w*)?)?\Z")
"""The frame of a part that has not begun yet."""


@dataclass(frozen=True)
class Turn:
    """A turn, or as much of it as is sure."""

    thoughts: str
    """What it thinks before it speaks."""
    content: str
    """What it says."""
    calls: tuple[ToolCall, ...] = ()
    """What it calls."""


def whole_turn(text: str, in_thoughts: bool, has_tools: bool) -> Turn:
    """Return what a turn that has ended says.

    Thoughts are what stands between `<think>` at its beginning and the first `</think>`; without that they
    reach to its end.  Where one of its calls is malformed none is told, and the text stays as it was written,
    for the client to see.

    Args:
        text: of the turn.
        in_thoughts: the template has opened thoughts before it.
        has_tools: whether calls are looked for.
    """
    text = plain_form(text, in_thoughts=in_thoughts)
    thoughts, said = _split(text, in_thoughts)
    place = said.find(BEGIN_CALL) if has_tools else -1
    if place < 0:
        return _turn(thoughts, said)
    behind = parse_turn(said[place:])
    calls = tuple(call for call in behind.calls if isinstance(call, ToolCall))
    if not calls or any(isinstance(call, BadCall) for call in behind.calls):
        return _turn(thoughts, said)
    more = f"\n{behind.content}" if behind.content else ""
    return _turn(thoughts, said[:place].rstrip(), calls, more)


def turn_so_far(text: str, in_thoughts: bool, has_tools: bool) -> Turn:
    """Return what is sure of a turn that is being written: the beginning of what `whole_turn` will say of
    it, without calls."""
    marks = (END_THOUGHTS, BEGIN_CALL) if has_tools else (END_THOUGHTS,)
    sure = _UNFINISHED.sub("", text[:len(text) - max(_begun(text, mark) for mark in _OTHERS)])
    text = plain_form(sure, in_thoughts=in_thoughts)
    has_tools = has_tools or text != sure  # what a call becomes shows at its end alone
    text = text[:len(text) - max(_begun(text, mark) for mark in marks)]
    if BEGIN_THOUGHTS.startswith(text.lstrip()):
        return Turn("", "")
    thoughts, said = _split(text, in_thoughts)
    if has_tools:
        said = said.partition(BEGIN_CALL)[0].rstrip()
    return _turn(thoughts, said)


def _turn(thoughts: str, said: str, calls: tuple[ToolCall, ...] = (), more: str = "") -> Turn:
    return Turn(as_written(thoughts), as_written(said) + more, calls)


def _split(text: str, in_thoughts: bool) -> tuple[str, str]:
    """Return thoughts and what is said behind them."""
    begun = text.lstrip()
    if not in_thoughts and not begun.startswith(BEGIN_THOUGHTS):
        return "", text
    # a model may open its thoughts again where the template has done so
    thoughts, _, said = begun.removeprefix(BEGIN_THOUGHTS).partition(END_THOUGHTS)
    return thoughts.strip(), said.lstrip()


def _begun(text: str, mark: str) -> int:
    """Return how many characters at the end of a text may begin a mark."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)
