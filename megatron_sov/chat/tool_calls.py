"""Calls of tools in what a model wrote, in the form of its chat template: see `FORMS`.

Read strictly: what is nearly a call is told apart from a call and from a text without one, so that a model
is told what was wrong with it and a count of such turns can be kept.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_sov.base.documents.messages import BadRecord, refuse_deep
from megatron_sov.base.documents.rows import finite, no_constant
from megatron_sov.chat.marks import (
    BEGIN_CALL, BEGIN_THOUGHTS, END_CALL, END_THOUGHTS, LLAMA, CallForm, as_written, plain_form)

Fault = Literal["json", "form", "unclosed"]
QWEN3_CODER: CallForm = "qwen3-coder"
GLM: CallForm = "glm-4.5"
FORMS: dict[CallForm, str] = {
    "marked": '{"name": ..., "arguments": {...}}',
    QWEN3_CODER: "<function=NAME><parameter=NAME>value</parameter></function>",
    GLM: "NAME<arg_key>NAME</arg_key><arg_value>value</arg_value>",
    LLAMA: '{"name": ..., "parameters": {...}}'}
"""What stands between `<tool_call>` and `</tool_call>`.  marked: Hermes' form, and all that `chat.marks`
makes one of (Solar Open, gpt-oss, DeepSeek, Kimi K2).  Values of the second and third one are texts, which a
tool's schema makes values of.  Llama 3's calls have no marks: all of the turn is the call."""
_SPACE = " \t\r\n"
_MARK = re.compile(f"{BEGIN_CALL}|{BEGIN_THOUGHTS}")
_PIECE_CHARS = 1024
"""Of a text, in which its JSON is looked for first."""
_DEEPEST_CHOICE = 16
"""Of choices in choices (`anyOf`) that a schema's types are looked for in."""
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


def parse_turn(text: str, *, in_thoughts: bool = False, form: CallForm | None = None,
               tools: Sequence[Mapping[str, Any]] = ()) -> WrittenTurn:
    """Return what a model's turn says and calls; calls inside of thoughts are thoughts.

    The first `</think>` ends the thoughts that a turn begins with, as in the reasoning parsers of vLLM and
    SGLang that serve the model later; thoughts without an end reach to the end of the turn.

    Args:
        text: of the turn.
        in_thoughts: the template has opened thoughts before it.
        form: of calls; None: whichever marks and what stands between them show.
        tools: that could be called, as OpenAI describes functions: their schemas say what is a number and
            what a text, where the form does not.
    """
    # one form for all families, so that what follows knows one pair of marks
    text = plain_form(text, in_thoughts=in_thoughts, form=form)
    place, last_end = _first_place(text, in_thoughts), text.rfind(END_CALL)
    said: list[str] = []
    calls: list[ToolCall | BadCall] = []
    while mark := _MARK.search(text, place):
        said.append(text[place:mark.start()])
        if mark[0] == BEGIN_CALL:
            call, place = _call(text, mark.end(), last_end, form, tools)
            calls.append(call)
        else:
            place = _behind_thoughts(text, mark.end())
    said.append(text[place:])
    # indentation stays: an answer may be code
    return WrittenTurn(as_written("".join(said)).lstrip("\n").rstrip(), tuple(calls))


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
    def of(cls, told: Mapping[str, Any]) -> ServedTurn:
        """Return a turn out of plain values, as `asdict` gives them."""
        return cls(told["thoughts"], told["content"], tuple(ToolCall(**call) for call in told["calls"]))


def whole_turn(text: str, in_thoughts: bool, tools: Sequence[Mapping[str, Any]],
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
    text = plain_form(text, in_thoughts=in_thoughts, form=form if tools else None)
    thoughts, said = split_thoughts(text, in_thoughts)
    # Text before the first call stays text.
    place = said.find(BEGIN_CALL) if tools else -1
    if place < 0:
        return served_turn(thoughts, said)
    behind = parse_turn(said[place:], form=form, tools=tools)
    calls = tuple(call for call in behind.calls if isinstance(call, ToolCall))
    if not calls or any(isinstance(call, BadCall) for call in behind.calls):
        return served_turn(thoughts, said)
    more = f"\n{behind.content}" if behind.content else ""
    return served_turn(thoughts, said[:place].rstrip(), calls, more)


def served_turn(thoughts: str, said: str, calls: tuple[ToolCall, ...] = (), more: str = "") -> ServedTurn:
    """Return a turn whose quoted marks are as the model wrote them; `more` is taken as it is."""
    return ServedTurn(as_written(thoughts), as_written(said) + more, calls)


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


def _first_place(text: str, in_thoughts: bool) -> int:
    """Return where a turn goes on behind thoughts that it does not open itself."""
    end, begin = text.find(END_THOUGHTS), text.find(BEGIN_THOUGHTS)
    if in_thoughts or (end >= 0 and not 0 <= begin < end):
        return _behind_thoughts(text, 0)
    return 0


def _behind_thoughts(text: str, start: int) -> int:
    end = text.find(END_THOUGHTS, start)
    return len(text) if end < 0 else end + len(END_THOUGHTS)


def _call(text: str, start: int, last_end: int, form: CallForm | None,
          tools: Sequence[Mapping[str, Any]]) -> tuple[ToolCall | BadCall, int]:
    """Return the call whose opening tag ends at `start`, and where the text goes on behind it.

    Args:
        text: of the turn.
        start: behind the tag.
        last_end: place of the text's last closing tag; -1: it has none.
        form: as of `parse_turn`.
        tools: as of `parse_turn`.
    """
    while start < len(text) and text[start] in _SPACE:
        start += 1
    if form is None:
        form = QWEN3_CODER if text.startswith("<function=", start) else (
            GLM if _GLM_NAME.match(text, start) else None)
    if form in (QWEN3_CODER, GLM):
        return _tagged_call(text, start, last_end, form, tools)
    try:
        value, end = _value(text, start)
        # the marks inside arguments were quoted; their value is what the model wrote
        if (inside := as_written(text[start:end])) != text[start:end]:
            value, _ = _value(inside, 0)
        _refuse_unfit(value)
    except (ValueError, RecursionError, BadRecord) as e:
        return _no_json(text, start, e)
    while end < len(text) and text[end] in _SPACE:
        end += 1
    if not text.startswith(END_CALL, end):
        # an end tag follows somewhere, so the object itself is wrong; without one the turn was cut off
        if last_end >= end:
            return _no_json(text, start, ValueError("more stands behind the object"))
        return BadCall("unclosed", f"a tool call has no {END_CALL} behind its object"), end
    return _checked(value, form), end + len(END_CALL)


def _refuse_unfit(value: Any) -> None:
    """Raise `BadRecord` or `ValueError` for what cannot be handed on."""
    refuse_deep(value)  # what is made of it goes through functions that call themselves more than JSON's
    json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text


_GLM_NAME = re.compile(r"([^<>\s{}\[\]\"]{1,200})\s*<arg_key>")
_FUNCTION = re.compile(r"<function=([^<>\n]{1,200})>\s*")
_PARAMETER = re.compile(r"<parameter=([^<>\n]{1,200})>\n?(.*?)\n?</parameter>\s*(?=<parameter=|</function>)",
                        re.DOTALL)
_ARGUMENT = re.compile(r"<arg_key>([^<]{1,200})</arg_key>\s*<arg_value>(.*?)</arg_value>\s*(?=<arg_key>|\Z)",
                       re.DOTALL)


def _tagged_call(text: str, start: int, last_end: int, form: CallForm,
                 tools: Sequence[Mapping[str, Any]]) -> tuple[ToolCall | BadCall, int]:
    """Return a call whose arguments stand in tags of their own; arguments and value as of `_call`."""
    # looked at before the search: many calls without an end must not take the square of the text's length
    if last_end < start:
        return BadCall("unclosed", f"a tool call has no {END_CALL}"), len(text)
    end = text.find(END_CALL, start)
    body, behind = text[start:end].rstrip(), end + len(END_CALL)
    bad = BadCall("form", f"a tool call must be {BEGIN_CALL}{FORMS[form]}{END_CALL} and nothing else")
    name, place = "", 0
    if form == QWEN3_CODER:
        head = _FUNCTION.match(body)
        if head is None or not body.endswith("</function>"):
            return bad, behind
        name, place = head[1], head.end()
    else:
        place = len(body) if "<arg_key>" not in body else body.index("<arg_key>")
        name = body[:place]
    part = _PARAMETER if form == QWEN3_CODER else _ARGUMENT
    kinds, arguments = _kinds_of(as_written(name.strip()), tools), {}
    while found := part.match(body, place):
        key, value = as_written(found[1].strip()), as_written(found[2])
        if key in arguments:
            return BadCall("form", f"a tool call has {key[:60]!r} twice"), behind
        arguments[key], place = _value_of(value, kinds.get(key)), found.end()
    rest = "</function>" if form == QWEN3_CODER else ""
    if body[place:] != rest or not re.fullmatch(r"\S+", name.strip()):
        return bad, behind
    call = ToolCall(as_written(name.strip()), arguments)
    try:
        _refuse_unfit(arguments)
    except (ValueError, RecursionError, BadRecord):
        return BadCall("json", "an argument of a tool call is nested too deep, or no text"), behind
    return call, behind


def _kinds_of(name: str, tools: Sequence[Mapping[str, Any]]) -> dict[str, frozenset[str]]:
    """Return parameter -> JSON types that a tool's schema gives it; none where it is not known.  Schemas are
    a server's or a client's: what is no schema in them says nothing."""
    for tool in tools:
        function = _object_in(tool, "function") or tool
        if function.get("name") == name:
            properties = _object_in(_object_in(function, "parameters"), "properties")
            return {key: kinds for key, schema in properties.items() if (kinds := _kinds_in(schema))}
    return {}


def _object_in(schema: Mapping[str, Any], word: str) -> Mapping[str, Any]:
    return found if isinstance(found := schema.get(word), Mapping) else {}


def _list_in(schema: Mapping[str, Any], word: str) -> Sequence[Any]:
    return found if isinstance(found := schema.get(word), list) else []


def _kinds_in(schema: Any, deepest: int = _DEEPEST_CHOICE) -> frozenset[str]:
    if not isinstance(schema, Mapping) or not deepest:
        return frozenset()
    own, values = _list_in(schema, "type") or [schema.get("type")], _list_in(schema, "enum")
    kinds = {kind for kind in own if isinstance(kind, str)}
    if not kinds and values and all(isinstance(value, str) for value in values):
        kinds = {"string"}
    for one in (*_list_in(schema, "anyOf"), *_list_in(schema, "oneOf")):
        kinds |= _kinds_in(one, deepest - 1)
    return frozenset(kinds)


_WORDS = {"true": True, "false": False, "null": None, "none": None}
_KIND_OF: dict[type, str] = {bool: "boolean", int: "integer", float: "number", type(None): "null",
                             list: "array", dict: "object", str: "string"}


def _value_of(text: str, kinds: frozenset[str] | None) -> Any:
    """Return the value that a text stands for; a text that is none of its types stays one, for the tool to
    refuse.

    Args:
        text: of an argument.
        kinds: JSON types that it may have; None: not known, JSON is meant where it is some.
    """
    if kinds == frozenset(["string"]):
        return text
    value: Any = text
    try:
        value = _DECODER.decode(text.strip())
    except (ValueError, RecursionError):
        # templates write what is no text as Python shows it: True, None, {'a': 1}
        if text.strip().lower() in _WORDS:
            value = _WORDS[text.strip().lower()]
        elif kinds and kinds & {"array", "object"}:
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
                value = json.loads(json.dumps(ast.literal_eval(text.strip()), allow_nan=False))
    kind = _KIND_OF[type(value)]
    if kinds is None or kind in kinds or (kind == "integer" and "number" in kinds):
        return value
    return text


def _value(text: str, start: int) -> tuple[Any, int]:
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


def _no_json(text: str, start: int, error: Exception) -> tuple[BadCall, int]:
    """Return that there is no JSON, and where the call that should hold it ends."""
    end = text.find(END_CALL, start)
    if end < 0:
        return BadCall("unclosed", f"a tool call has no {END_CALL} and no JSON object"), len(text)
    said = "it is nested too deep" if isinstance(error, (RecursionError, BadRecord)) else str(error)[:100]
    return (BadCall("json", f"what stands between {BEGIN_CALL} and {END_CALL} is not one JSON object "
                            f"({said})"), end + len(END_CALL))


def _checked(value: Any, form: CallForm | None) -> ToolCall | BadCall:
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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    # Python keeps the last of two equal names; which one was meant is unknown
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=no_constant, parse_float=finite)
