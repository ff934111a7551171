"""Parse tool calls in model output, in the form of the model's chat template; see `FORMS`.

Parsing is strict: malformed calls are reported separately from calls and from plain text, so that the model
can be informed and such turns counted.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_sov.base.documents.messages import BadRecord, check_depth
from megatron_sov.base.documents.rows import parse_finite, reject_constant
from megatron_sov.chat.marks import (
    BEGIN_CALL, BEGIN_THOUGHTS, END_CALL, END_THOUGHTS, LLAMA, CallForm, to_hermes_form, unquote_marks)

Fault = Literal["json", "form", "unclosed"]
FORMS: dict[CallForm, str] = {
    "marked": '{"name": ..., "arguments": {...}}', LLAMA: '{"name": ..., "parameters": {...}}'}
"""Call form -> JSON between `<tool_call>` and `</tool_call>`. marked: Hermes' form, and forms converted by
`to_hermes_form` (Solar Open, DeepSeek, Kimi K2). Llama 3 calls have no marks: the whole turn is the call."""
_SPACE = " \t\r\n"
_MARK = re.compile(f"{BEGIN_CALL}|{BEGIN_THOUGHTS}")
_PIECE_CHARS = 1024
"""Initial window in characters for parsing JSON."""
_WORD_CHARS = 16
"""More than the longest JSON word or escape: errors closer to the window's end may come from truncation."""


@dataclass(frozen=True)
class ToolCall:
    """A call by the model; the tool may not exist."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class BadCall:
    code: Fault
    """json: invalid JSON between marks; form: not exactly a name and arguments; unclosed: no end mark."""
    reason: str
    """Explanation for the model."""


@dataclass(frozen=True)
class WrittenTurn:
    content: str
    """Text without thoughts and calls."""
    calls: tuple[ToolCall | BadCall, ...]


def parse_turn(text: str, *, in_thoughts: bool = False, form: CallForm | None = None) -> WrittenTurn:
    """Parse a model's turn; calls inside thoughts are thoughts.

    The first `</think>` ends thoughts at the start, as in the reasoning parsers of vLLM and SGLang; thoughts
    without end extend to the end of the turn.

    Args:
        text: text of the turn.
        in_thoughts: the template has opened thoughts before the turn.
        form: call form; None: decided by the marks.
    """
    # convert to Hermes' form: parsing handles a single pair of marks
    text = to_hermes_form(text, in_thoughts=in_thoughts, form=form)
    index, last_end = _skip_opened_thoughts(text, in_thoughts), text.rfind(END_CALL)
    content_parts: list[str] = []
    calls: list[ToolCall | BadCall] = []
    while mark := _MARK.search(text, index):
        content_parts.append(text[index:mark.start()])
        if mark[0] == BEGIN_CALL:
            call, index = _parse_call(text, mark.end(), last_end, form)
            calls.append(call)
        else:
            index = _skip_thoughts(text, mark.end())
    content_parts.append(text[index:])
    # keep indentation: an answer may be code
    return WrittenTurn(unquote_marks("".join(content_parts)).lstrip("\n").rstrip(), tuple(calls))


@dataclass(frozen=True)
class ServedTurn:
    """A turn for API clients, complete or partial."""

    thoughts: str
    content: str
    calls: tuple[ToolCall, ...] = ()

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ServedTurn":
        return cls(fields["thoughts"], fields["content"], tuple(ToolCall(**call) for call in fields["calls"]))


def parse_served_turn(text: str, in_thoughts: bool, tools: Sequence[Mapping[str, Any]],
                      form: CallForm | None = None) -> ServedTurn:
    """Parse a finished turn for an API client.

    Thoughts lie between `<think>` at the beginning and the first `</think>`, or extend to the end. If any
    call is malformed, return no calls and leave the text as written, so that the client sees it.

    Args:
        text: text of the turn.
        in_thoughts: the template has opened thoughts before the turn.
        tools: available functions in OpenAI's format; without any, calls are not parsed.
        form: call form; None: decided by the marks.
    """
    text = to_hermes_form(text, in_thoughts=in_thoughts, form=form if tools else None)
    thoughts, content = split_thoughts(text, in_thoughts)
    # text before the first call remains content
    index = content.find(BEGIN_CALL) if tools else -1
    if index < 0:
        return build_served_turn(thoughts, content)
    parsed = parse_turn(content[index:], form=form)
    calls = tuple(call for call in parsed.calls if isinstance(call, ToolCall))
    if not calls or any(isinstance(call, BadCall) for call in parsed.calls):
        return build_served_turn(thoughts, content)
    suffix = f"\n{parsed.content}" if parsed.content else ""
    return build_served_turn(thoughts, content[:index].rstrip(), calls, suffix)


def build_served_turn(thoughts: str, content: str, calls: tuple[ToolCall, ...] = (),
                      suffix: str = "") -> ServedTurn:
    """Build a turn, restoring quoted marks; `suffix` is appended verbatim."""
    return ServedTurn(unquote_marks(thoughts), unquote_marks(content) + suffix, calls)


def split_thoughts(text: str, in_thoughts: bool) -> tuple[str, str]:
    """Split a turn into leading thoughts and content.

    Newlines around thoughts come from the template and are dropped; other white space, such as code
    indentation, is kept.
    """
    stripped = text.lstrip()
    # a model may repeat the mark that the template has opened
    if stripped.startswith(BEGIN_THOUGHTS):
        text = stripped.removeprefix(BEGIN_THOUGHTS)
    elif not in_thoughts:
        return "", text
    thoughts, _, content = text.partition(END_THOUGHTS)
    return thoughts.strip("\n"), content.lstrip("\n")


def _skip_opened_thoughts(text: str, in_thoughts: bool) -> int:
    """Return the index after thoughts that the template opened."""
    end, begin = text.find(END_THOUGHTS), text.find(BEGIN_THOUGHTS)
    if in_thoughts or (end >= 0 and not 0 <= begin < end):
        return _skip_thoughts(text, 0)
    return 0


def _skip_thoughts(text: str, start: int) -> int:
    end = text.find(END_THOUGHTS, start)
    return len(text) if end < 0 else end + len(END_THOUGHTS)


def _parse_call(text: str, start: int, last_end: int, form: CallForm | None
                ) -> tuple[ToolCall | BadCall, int]:
    """Parse the call after an opening tag at `start`; return (call, end index).

    Args:
        text: text of the turn.
        start: index after the tag.
        last_end: index of the last closing tag; -1: none.
        form: see `parse_turn`.
    """
    while start < len(text) and text[start] in _SPACE:
        start += 1
    try:
        value, end = _decode_value(text, start)
        # restore quoted marks inside arguments
        if (inside := unquote_marks(text[start:end])) != text[start:end]:
            value, _ = _decode_value(inside, 0)
        _check_value(value)
    except (ValueError, RecursionError, BadRecord) as e:
        return _report_bad_json(text, start, e)
    while end < len(text) and text[end] in _SPACE:
        end += 1
    if not text.startswith(END_CALL, end):
        # If an end tag follows anywhere, the object is wrong; otherwise the turn was cut off.
        if last_end >= end:
            return _report_bad_json(text, start, ValueError("text follows the object"))
        return BadCall("unclosed", f"a tool call has no {END_CALL} after its object"), end
    return _build_call(value, form), end + len(END_CALL)


def _check_value(value: Any) -> None:
    """Raise `BadRecord` or `ValueError` for values that cannot be processed further."""
    check_depth(value)  # later functions recurse deeper than the JSON parser
    json.dumps(value, ensure_ascii=False).encode()  # lone surrogates are invalid text


def _decode_value(text: str, start: int) -> tuple[Any, int]:
    """Decode the JSON value at `start`; return (value, end index). Raises like `JSONDecoder.raw_decode`.

    Decode a growing window: on errors json counts the lines of its whole input, so that many malformed calls
    in a long text would take quadratic time.
    """
    num_chars = _PIECE_CHARS
    while True:
        piece, is_rest = text[start:start + num_chars], start + num_chars >= len(text)
        try:
            value, end = _DECODER.raw_decode(piece)
            if is_rest or end < len(piece):  # a number at the end may continue
                return value, start + end
        except json.JSONDecodeError as e:
            # an error well before the window's end persists with more text
            is_sure = not e.msg.startswith("Unterminated string") and e.pos < len(piece) - _WORD_CHARS
            if is_rest or is_sure:
                raise
        except ValueError:
            if is_rest:
                raise
        num_chars *= 2


def _report_bad_json(text: str, start: int, error: Exception) -> tuple[BadCall, int]:
    """Return a `BadCall` for missing JSON, and the index after the call."""
    end = text.find(END_CALL, start)
    if end < 0:
        return BadCall("unclosed", f"a tool call has no {END_CALL} and no JSON object"), len(text)
    reason = "it is nested too deep" if isinstance(error, (RecursionError, BadRecord)) else str(error)[:100]
    return (BadCall("json", f"the text between {BEGIN_CALL} and {END_CALL} is not a JSON object "
                            f"({reason})"), end + len(END_CALL))


def _build_call(value: Any, form: CallForm | None) -> ToolCall | BadCall:
    # infer the key from the object if the form is unknown
    is_unknown_llama = form is None and isinstance(value, dict) and "parameters" in value
    word = "parameters" if form == LLAMA or is_unknown_llama else "arguments"
    # Llama 3 may include "type": "function"
    has_type = word == "parameters" and isinstance(value, dict) and value.get("type") == "function"
    if not isinstance(value, dict) or set(value) != {"name", word, *(("type",) if has_type else ())}:
        return BadCall("form", f'a tool call must be a JSON object with "name" and "{word}" and nothing else')
    if not isinstance(value["name"], str) or not isinstance(value[word], dict):
        return BadCall("form", f'in a tool call "name" must be a string and "{word}" an object')
    return ToolCall(value["name"], value[word])


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    object_ = dict(pairs)
    # Python keeps the last of two equal keys; the intended one is unknown
    if len(object_) != len(pairs):
        raise ValueError("an object has a key twice")
    return object_


_DECODER = json.JSONDecoder(object_pairs_hook=_build_object, parse_constant=reject_constant,
                            parse_float=parse_finite)
