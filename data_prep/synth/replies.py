"""Replies of models: the text, thoughts and tool calls of a chat completion, and whether they are of use."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sov.base.documents.messages import BadRecord, check_depth
from megatron_sov.base.documents.rows import parse_finite, reject_constant
from megatron_sov.chat.marks import BEGIN_THOUGHTS, END_THOUGHTS, to_hermes_form, unquote_marks
from megatron_sov.chat.tool_calls import BadCall, parse_turn
from megatron_sov.judge.rewards.surface import find_final_loop
from megatron_sov.work.endpoints.answers import BadAnswer, read_model_name

MIN_LOOP_REPEATS = 8
MIN_LOOP_CHARS = 200
"""What a text must repeat at its end to count as a loop: more than any verse or table does."""


@dataclass(frozen=True)
class Reply:
    """One answer of a model."""

    text: str
    """Without thoughts."""
    thinking: str = ""
    """What it thought first, where the endpoint tells it or it stands between think tags."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """`name` and `arguments` (decoded) of each call; one that is malformed has `error` as well, a sentence
    for the model, and no arguments."""
    is_cut: bool = False
    """Whether it ended at the limit of tokens."""
    key: str = ""
    """Hash of what was asked, for provenance."""
    model: str = ""
    """Name of the model that answered, as the endpoint states it; empty: not stated."""


class NoReply(Exception):
    """A model did not answer in spite of all attempts: the item is left for a later run."""


class NoUsableReply(NoReply):
    """A model answered, and all of it was empty, a loop or no grade: a later run would get the same, so
    the item is done and has no samples."""


def read_reply(answer: Any, key: str = "", tools: Sequence[dict[str, Any]] = ()) -> Reply:
    """Return the one choice of a chat completion.

    Args:
        answer: decoded JSON.
        key: hash of what was asked.
        tools: that were offered, so that calls may stand in the text.

    Raises:
        BadAnswer: it is no chat completion of one choice.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise BadAnswer("the endpoint's answer must have one of 'choices', for one was asked for")
    message = choices[0].get("message")
    if not isinstance(message, dict):
        raise BadAnswer("the endpoint's answer has no message")
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise BadAnswer("the endpoint's message has a content that is no text")
    said = message.get("tool_calls") or []
    if not isinstance(said, list):
        raise BadAnswer("the endpoint's tool_calls are no list")
    text, thinking = _split(content or "")
    # servers name the field in two ways; thoughts that were found in the text are the fallback
    told = message.get("reasoning_content") or message.get("reasoning")
    thinking = told.strip() if isinstance(told, str) and told.strip() else thinking
    calls = [_call(one) for one in said]
    if tools and not calls:  # a server without a parser of calls leaves them in the text
        turn = parse_turn(text)
        text = turn.content
        calls = [_malformed("", call.reason) if isinstance(call, BadCall)
                 else {"name": call.name, "arguments": call.arguments} for call in turn.calls]
    return Reply(text, thinking, tuple(calls), choices[0].get("finish_reason") == "length", key,
                 read_model_name(answer))


def fault_of(reply: Reply) -> str:
    """Return why an answer is of no use to any generator, in a word; empty where it may be.

    One that was cut off in its thoughts says nothing and is no empty one: another would end there as well.
    """
    if not reply.text and not reply.tool_calls and not reply.is_cut:
        return "empty"
    try:
        json.dumps([reply.text, reply.thinking, reply.tool_calls], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "half a character"
    _, repeats = find_final_loop(reply.text, MIN_LOOP_CHARS)
    return "loop" if repeats >= MIN_LOOP_REPEATS else ""


def _split(content: str) -> tuple[str, str]:
    """Return text and thoughts: thoughts end at the first end tag; without one they reach to the end."""
    text = to_hermes_form(content).strip()
    begins = text.startswith(BEGIN_THOUGHTS)
    before, end, behind = text.partition(END_THOUGHTS)
    # The opening tag may be missing: some chat templates write it into the prompt. One that comes later in
    # the text is a quotation, and the text has no thoughts.
    if end and (begins or BEGIN_THOUGHTS not in before):
        return unquote_marks(behind).strip(), unquote_marks(before.removeprefix(BEGIN_THOUGHTS)).strip()
    if begins:
        return "", unquote_marks(text.removeprefix(BEGIN_THOUGHTS)).strip()
    return unquote_marks(text), ""


def _call(said: Any) -> dict[str, Any]:
    """Return a call's name and arguments, or what is wrong with it."""
    function = said.get("function") if isinstance(said, dict) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return _malformed("", "a tool call must have a function with a name")
    name, arguments = function["name"], function.get("arguments")
    try:
        if isinstance(arguments, str):
            arguments = json.loads(arguments or "{}", parse_constant=reject_constant,
                                   parse_float=parse_finite)
        check_depth(arguments)
    except (ValueError, RecursionError, BadRecord) as e:
        return _malformed(name, f"the arguments of a tool call are no JSON ({str(e)[:100]})")
    if not isinstance(arguments, dict):
        return _malformed(name, "the arguments of a tool call must be an object")
    return {"name": name, "arguments": arguments}


def _malformed(name: str, error: str) -> dict[str, Any]:
    return {"name": name, "arguments": {}, "error": error}
