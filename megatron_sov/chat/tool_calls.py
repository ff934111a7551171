"""Calls of tools in what a model wrote, in the form of its chat template: see `FORMS`.

Read strictly: what is nearly a call is told apart from a call and from a text without one, so that a model
is told what was wrong with it and a count of such turns can be kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_sov.base.documents.messages import BadRecord, refuse_deep
from megatron_sov.base.documents.rows import finite, no_constant
from megatron_sov.chat.marks import (
    BEGIN_CALL, BEGIN_THOUGHTS, END_CALL, END_THOUGHTS, LLAMA, CallForm, to_hermes_form, unquote_marks)

Fault = Literal["json", "form", "unclosed"]
FORMS: dict[CallForm, str] = {
    "marked": '{"name": ..., "arguments": {...}}',
    LLAMA: '{"name": ..., "parameters": {...}}'}
"""What stands between `<tool_call>` and `</tool_call>`.  marked: Hermes' form, and all that `chat.marks`
makes one of (Solar Open, DeepSeek, Kimi K2).  Llama 3's calls have no marks: all of the turn is the call."""
_SPACE = " \t\r\n"
_MARK = re.compile(f"{BEGIN_CALL}|{BEGIN_THOUGHTS}")
_PIECE_CHARS = 1024
"""Of a text, in which its JSON is looked for first."""
_WORD_CHARS = 16
"""More than the longest word or escape of JSON: an error nearer to the end may come from the cut."""


@dataclass(frozen=True)
class ToolCall:
    """A call as a model wrote it; whether there is such a tool is another question."""

    name: str
    arguments: dict[str, Any]
    """Name -> JSON value."""


@dataclass(frozen=True)
class BadCall:
    """Something that begins as a call and is none."""

    code: Fault
    """json: what stands inside is no JSON; form: it is, and no object of a name and arguments; unclosed:
    nothing ends it."""
    reason: str
    """One sentence for the model."""


@dataclass(frozen=True)
class WrittenTurn:
    """A model's turn."""

    content: str
    """What it says, without thoughts and calls."""
    calls: tuple[ToolCall | BadCall, ...]


def parse_turn(text: str, *, in_thoughts: bool = False, form: CallForm | None = None) -> WrittenTurn:
    """Return what a model's turn says and calls; calls inside of thoughts are thoughts.

    The first `</think>` ends the thoughts that a turn begins with, as in the reasoning parsers of vLLM and
    SGLang that serve the model later; thoughts without an end reach to the end of the turn.

    Args:
        text: of the turn.
        in_thoughts: the template has opened thoughts before it.
        form: of calls; None: whichever marks show.
    """
    # one form for all families, so that what follows knows one pair of marks
    text = to_hermes_form(text, in_thoughts=in_thoughts, form=form)
    place, last_end = _skip_opened_thoughts(text, in_thoughts), text.rfind(END_CALL)
    said: list[str] = []
    calls: list[ToolCall | BadCall] = []
    while mark := _MARK.search(text, place):
        said.append(text[place:mark.start()])
        if mark[0] == BEGIN_CALL:
            call, place = _parse_call(text, mark.end(), last_end, form)
            calls.append(call)
        else:
            place = _skip_thoughts(text, mark.end())
    said.append(text[place:])
    # indentation stays: an answer may be code
    return WrittenTurn(unquote_marks("".join(said)).lstrip("\n").rstrip(), tuple(calls))


@dataclass(frozen=True)
class ServedTurn:
    """A turn, or as much of it as is sure."""

    thoughts: str
    """What it thinks before it speaks."""
    content: str
    """What it says."""
    calls: tuple[ToolCall, ...] = ()
    """What it calls."""

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> ServedTurn:
        """Return a turn out of plain values, as `asdict` gives them."""
        return cls(told["thoughts"], told["content"], tuple(ToolCall(**call) for call in told["calls"]))


def parse_served_turn(text: str, in_thoughts: bool, tools: Sequence[Mapping[str, Any]],
               form: CallForm | None = None) -> ServedTurn:
    """Return what a turn that has ended says.

    Thoughts are what stands between `<think>` at its beginning and the first `</think>`; without that they
    reach to its end.  Where one of its calls is malformed none is told, and the text stays as it was written,
    for the client to see.

    Args:
        text: of the turn.
        in_thoughts: the template has opened thoughts before it.
        tools: that could be called, as OpenAI describes functions; without any no calls are looked for.
        form: of calls; None: whichever marks show.
    """
    text = to_hermes_form(text, in_thoughts=in_thoughts, form=form if tools else None)
    thoughts, said = split_thoughts(text, in_thoughts)
    # Text before the first call stays text.
    place = said.find(BEGIN_CALL) if tools else -1
    if place < 0:
        return build_served_turn(thoughts, said)
    behind = parse_turn(said[place:], form=form)
    calls = tuple(call for call in behind.calls if isinstance(call, ToolCall))
    if not calls or any(isinstance(call, BadCall) for call in behind.calls):
        return build_served_turn(thoughts, said)
    more = f"\n{behind.content}" if behind.content else ""
    return build_served_turn(thoughts, said[:place].rstrip(), calls, more)


def build_served_turn(thoughts: str, content: str, calls: tuple[ToolCall, ...] = (), suffix: str = "") -> ServedTurn:
    """Return a turn whose quoted marks are as the model wrote them; `suffix` is taken as it is."""
    return ServedTurn(unquote_marks(thoughts), unquote_marks(content) + suffix, calls)


def split_thoughts(text: str, in_thoughts: bool) -> tuple[str, str]:
    """Split the thoughts that a turn begins with from the content after them.

    Line feeds around thoughts are the template's and belong to neither; other white space, such as the
    indentation of code, stays.
    """
    begun = text.lstrip()
    # a model may open its thoughts again where the template has done so
    if begun.startswith(BEGIN_THOUGHTS):
        text = begun.removeprefix(BEGIN_THOUGHTS)
    elif not in_thoughts:
        return "", text
    thoughts, _, said = text.partition(END_THOUGHTS)
    return thoughts.strip("\n"), said.lstrip("\n")


def _skip_opened_thoughts(text: str, in_thoughts: bool) -> int:
    """Return where a turn goes on behind thoughts that it does not open itself."""
    end, begin = text.find(END_THOUGHTS), text.find(BEGIN_THOUGHTS)
    if in_thoughts or (end >= 0 and not 0 <= begin < end):
        return _skip_thoughts(text, 0)
    return 0


def _skip_thoughts(text: str, start: int) -> int:
    end = text.find(END_THOUGHTS, start)
    return len(text) if end < 0 else end + len(END_THOUGHTS)


def _parse_call(text: str, start: int, last_end: int, form: CallForm | None) -> tuple[ToolCall | BadCall, int]:
    """Return the call whose opening tag ends at `start`, and where the text goes on behind it.

    Args:
        text: of the turn.
        start: behind the tag.
        last_end: place of the text's last closing tag; -1: it has none.
        form: as of `parse_turn`.
    """
    while start < len(text) and text[start] in _SPACE:
        start += 1
    try:
        value, end = _decode_value(text, start)
        # the marks inside arguments were quoted; their value is what the model wrote
        if (inside := unquote_marks(text[start:end])) != text[start:end]:
            value, _ = _decode_value(inside, 0)
        _check_value(value)
    except (ValueError, RecursionError, BadRecord) as e:
        return _report_bad_json(text, start, e)
    while end < len(text) and text[end] in _SPACE:
        end += 1
    if not text.startswith(END_CALL, end):
        # an end tag follows somewhere, so the object itself is wrong; without one the turn was cut off
        if last_end >= end:
            return _report_bad_json(text, start, ValueError("more stands behind the object"))
        return BadCall("unclosed", f"a tool call has no {END_CALL} behind its object"), end
    return _build_call(value, form), end + len(END_CALL)


def _check_value(value: Any) -> None:
    """Raise `BadRecord` or `ValueError` for what cannot be handed on."""
    refuse_deep(value)  # what is made of it goes through functions that call themselves more than JSON's
    json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text


def _decode_value(text: str, start: int) -> tuple[Any, int]:
    """Return the JSON value that begins at a place, and where it ends; raises as `JSONDecoder.raw_decode`.

    It is read from a piece that grows: where it is malformed json counts the lines of all that it is given,
    so that many malformed calls in one long text would take the square of its length.
    """
    num_chars = _PIECE_CHARS
    while True:
        piece, is_rest = text[start:start + num_chars], start + num_chars >= len(text)
        try:
            value, end = _DECODER.raw_decode(piece)
            if is_rest or end < len(piece):  # a number may go on
                return value, start + end
        except json.JSONDecodeError as e:
            # an error well before the end of the piece will not go away with more text
            is_sure = not e.msg.startswith("Unterminated string") and e.pos < len(piece) - _WORD_CHARS
            if is_rest or is_sure:
                raise
        except ValueError:
            if is_rest:
                raise
        num_chars *= 2


def _report_bad_json(text: str, start: int, error: Exception) -> tuple[BadCall, int]:
    """Return that there is no JSON, and where the call that should hold it ends."""
    end = text.find(END_CALL, start)
    if end < 0:
        return BadCall("unclosed", f"a tool call has no {END_CALL} and no JSON object"), len(text)
    said = "it is nested too deep" if isinstance(error, (RecursionError, BadRecord)) else str(error)[:100]
    return (BadCall("json", f"what stands between {BEGIN_CALL} and {END_CALL} is not one JSON object "
                            f"({said})"), end + len(END_CALL))


def _build_call(value: Any, form: CallForm | None) -> ToolCall | BadCall:
    # where the form is not known, the object shows it
    word = "parameters" if form == LLAMA or (
        form is None and isinstance(value, dict) and "parameters" in value) else "arguments"
    # Llama 3 may say that it is a function, as its tools are described
    is_told = word == "parameters" and isinstance(value, dict) and value.get("type") == "function"
    if not isinstance(value, dict) or set(value) != {"name", word, *(("type",) if is_told else ())}:
        return BadCall("form", f'a tool call must be a JSON object with "name" and "{word}" and nothing else')
    if not isinstance(value["name"], str) or not isinstance(value[word], dict):
        return BadCall("form", f'in a tool call "name" must be a string and "{word}" an object')
    return ToolCall(value["name"], value[word])


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    # Python keeps the last of two equal names; which one was meant is unknown
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_build_object, parse_constant=no_constant, parse_float=finite)
