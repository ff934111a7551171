"""Parse chat completions into replies: text, thoughts, tool calls, and faults."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sov.base.documents.messages import BadRecord, check_depth
from megatron_sov.base.documents.rows import parse_finite, reject_constant
from megatron_sov.chat.marks import BEGIN_THOUGHTS, END_THOUGHTS, to_hermes_form, unquote_marks
from megatron_sov.chat.tool_calls import BadCall, parse_turn, split_thoughts
from megatron_sov.judge.rewards.surface import find_final_loop
from megatron_sov.work.endpoints.answers import BadAnswer, get_single_item, read_model_name

MIN_LOOP_REPEATS, MIN_LOOP_CHARS = 8, 200
"""Repetitions and repeated characters from which the end of a text is a loop; verses and tables have less."""


@dataclass(frozen=True)
class Reply:
    """A model's answer."""

    text: str
    """Text without thoughts."""
    thinking: str = ""
    """Thoughts from the endpoint's field or between `<think>` tags."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """`name` and decoded `arguments` of each call; a malformed call has an `error` for the model instead."""
    is_cut: bool = False
    """Whether the answer ended at the token limit."""
    key: str = ""
    """Request hash, for provenance."""
    model: str = ""
    """Model name in the answer; "": not stated."""


class ReplyText(str):
    """Reply text for templates, which also read its `cut` and `thinking`."""

    cut: bool = False
    """Whether the reply ended at the token limit."""
    thinking: str = ""
    """Thoughts before the text."""

    @classmethod
    def from_reply(cls, reply: Reply) -> "ReplyText":
        text = cls(reply.text)
        text.cut, text.thinking = reply.is_cut, reply.thinking
        return text


class NoReply(Exception):
    """No answer after all attempts; unless it is a `NoUsableReply`, a later command tries the item again."""


class NoUsableReply(NoReply):
    """Every answer was empty, a loop or without a grade. The item counts as finished without samples,
    because a later command would receive the same answers."""


def read_reply(answer: Any, key: str = "", tools: Sequence[dict[str, Any]] = ()) -> Reply:
    """Parse a chat completion with a single choice.

    Args:
        answer: decoded JSON.
        key: request hash.
        tools: tools in the request; with tools, calls may stand in the text.

    Raises:
        BadAnswer: the answer is malformed.
    """
    choice = get_single_item(answer, "choices")
    message = choice.get("message")
    if not isinstance(message, dict):
        raise BadAnswer("the endpoint's answer has no message")
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise BadAnswer("the endpoint's message has a content that is no text")
    raw_calls = message.get("tool_calls") or []
    if not isinstance(raw_calls, list):
        raise BadAnswer("the endpoint's tool_calls are no list")
    text, thinking = _split_thoughts(content or "")
    # servers use two names for the field; thoughts in the text are the fallback
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(reasoning, str) and reasoning.strip():
        thinking = reasoning.strip()
    calls = [_parse_call(raw_call) for raw_call in raw_calls]
    if tools and not calls:  # a server without a call parser leaves calls in the text
        turn = parse_turn(text)
        text = turn.content
        calls = [_build_malformed_call("", call.reason) if isinstance(call, BadCall)
                 else {"name": call.name, "arguments": call.arguments} for call in turn.calls]
    is_cut = choice.get("finish_reason") == "length"
    return Reply(text, thinking, tuple(calls), is_cut, key, read_model_name(answer))


def find_reply_fault(reply: Reply) -> str:
    """Return the fault that makes a reply unusable for every generator: "empty", "half a character" or
    "loop"; "" for a usable reply.

    A reply cut off in its thoughts has no text and is not "empty": a retry would end there as well.
    """
    if not reply.text and not reply.tool_calls and not reply.is_cut:
        return "empty"
    try:
        # a lone surrogate (half of a character) cannot be encoded
        json.dumps([reply.text, reply.thinking, reply.tool_calls], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "half a character"
    _, repeats = find_final_loop(reply.text, MIN_LOOP_CHARS)
    return "loop" if repeats >= MIN_LOOP_REPEATS else ""


def _split_thoughts(content: str) -> tuple[str, str]:
    """Return (text, thoughts). Thoughts end at the first `</think>`, or extend to the end."""
    content = to_hermes_form(content).strip()
    before, end, _ = content.partition(END_THOUGHTS)
    # Some chat templates write `<think>` into the prompt, so the opening tag may be missing. A later
    # opening tag is a quotation in a text without thoughts.
    thoughts, text = split_thoughts(content, bool(end) and BEGIN_THOUGHTS not in before)
    return unquote_marks(text).strip(), unquote_marks(thoughts).strip()


def _parse_call(raw_call: Any) -> dict[str, Any]:
    """Return `name` and `arguments`, with `error` for a malformed call."""
    function = raw_call.get("function") if isinstance(raw_call, dict) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return _build_malformed_call("", "a tool call must have a function with a name")
    name, arguments = function["name"], function.get("arguments")
    try:
        if isinstance(arguments, str):
            arguments = json.loads(arguments or "{}", parse_constant=reject_constant,
                                   parse_float=parse_finite)
        check_depth(arguments)
    except (ValueError, RecursionError, BadRecord) as e:
        return _build_malformed_call(name, f"the arguments of a tool call are no JSON ({str(e)[:100]})")
    if not isinstance(arguments, dict):
        return _build_malformed_call(name, "the arguments of a tool call must be an object")
    return {"name": name, "arguments": arguments}


def _build_malformed_call(name: str, error: str) -> dict[str, Any]:
    return {"name": name, "arguments": {}, "error": error}
