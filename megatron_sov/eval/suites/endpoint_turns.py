"""Turns of tool episodes from an OpenAI-compatible endpoint.

What a model said is given back to it as it said it: its calls, and its thoughts under the name that the
endpoint told them by, which models that think between calls were trained with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sov.chat.marks import BEGIN_CALL, BEGIN_THOUGHTS, END_CALL, END_THOUGHTS
from megatron_sov.chat.tool_calls import BadCall, ToolCall, parse_turn
from megatron_sov.documents.messages import REASONING
from megatron_sov.endpoints.answers import BadAnswer, only, told_tokens
from megatron_sov.endpoints.cache import EndpointCache
from megatron_sov.endpoints.recognition import CHAT_PROBES
from megatron_sov.errors import UserError
from megatron_sov.eval.lm.endpoint import endpoint_at
from megatron_sov.eval.lm.settings import EndpointSettings
from megatron_sov.eval.suites.protocol import Protocol
from megatron_sov.tools.playing import Message, NoTurn, Said

CACHE = "endpoint.sqlite"


class EndpointSpeaker:
    """A model behind an endpoint.

    Args:
        url: its address, up to `/v1`.
        settings: how it is asked.
        protocol: of the task: sampling and mode.
        cache: folder of answers.
        sleep: waits between attempts; may raise to end all waiting.
    """

    def __init__(self, url: str, settings: EndpointSettings, protocol: Protocol, cache: Path,
                 sleep: Callable[[float], object]) -> None:
        self._endpoint = endpoint_at(f"{url.rstrip('/')}/chat/completions", settings,
                                     EndpointCache(cache / CACHE), CHAT_PROBES, sleep)
        self._sampling = protocol.sampling
        self._request: dict[str, Any] = {"model": settings.model, "temperature": protocol.temperature}
        if protocol.temperature:
            self._request |= {"top_p": protocol.top_p}
            self._request |= {"top_k": protocol.top_k} if protocol.top_k else {}
        if protocol.chat_template_kwargs:  # as vLLM, SGLang and ours take it
            self._request["chat_template_kwargs"] = protocol.chat_template_kwargs

    def say(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], max_tokens: int,
            stream: int) -> Said:
        """Return the next turn, see `Speaker`."""
        payload = {**self._request, "messages": list(messages), "max_tokens": max_tokens}
        if tools:
            payload["tools"] = list(tools)
        if self._sampling.temperature:
            payload["seed"] = (self._sampling.seed + stream) % 2**31
        try:
            return self._endpoint.ask(payload, said_in)
        except (BadAnswer, TimeoutError) as e:
            raise NoTurn(str(e)) from None


def said_in(answer: Any) -> Said:
    """Return what a chat completion says.

    Raises:
        BadAnswer: it is none.
        UserError: it does not tell how many tokens there were.
    """
    choice = only(answer, "choices")
    message = choice.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    calls = message.get("tool_calls") or [] if isinstance(message, dict) else None
    if not isinstance(message, dict) or not isinstance(calls, list) or not isinstance(content or "", str):
        raise BadAnswer("the endpoint sent a choice without a message of text and calls")
    tokens = told_tokens(answer)
    if tokens is None:
        raise UserError("the endpoint does not tell the tokens of its answers (`usage`), by which an "
                        "episode's limits are counted; serve the model with one that does, such as vLLM or "
                        "`megatron-sov serve`")
    told = next((name for name in REASONING if isinstance(message.get(name), str) and message[name]), None)
    given: Message = {"role": "assistant", "content": content or ""}
    text = content or ""
    if calls:
        pieces = [_written(call) for call in calls]
        given["tool_calls"] = [_given_back(parse_turn(piece).calls[0]) for piece in pieces]
        text = text.replace(BEGIN_CALL, _broken(BEGIN_CALL)) + "".join(pieces)
    elif found := parse_turn(text).calls:  # a server without a parser of calls leaves them in the text
        thoughts, end, _ = text.rpartition(END_THOUGHTS)
        given |= {"content": f"{thoughts}{end}{parse_turn(text).content}",
                  "tool_calls": [_given_back(call) for call in found]}
    if told is not None:
        given[told] = message[told]
        thoughts = message[told].replace(END_THOUGHTS, _broken(END_THOUGHTS))
        text = f"{BEGIN_THOUGHTS}{thoughts}{END_THOUGHTS}{text}"
    return Said(text, given, choice.get("finish_reason") == "length", *tokens)


def _broken(mark: str) -> str:
    """Return a mark as text: what an endpoint has told apart already is not told apart once more."""
    return f"{mark[0]} {mark[1:]}"


def _written(call: Any) -> str:
    """Return a call as a model writes it, so that it is read as strictly as where no endpoint stands
    between."""
    function = call.get("function") if isinstance(call, Mapping) else None
    function = function if isinstance(function, Mapping) else {}
    name, said = json.dumps(function.get("name")), function.get("arguments")
    arguments = (said.strip() or "{}") if isinstance(said, str) else json.dumps(said)
    piece = f'{BEGIN_CALL}{{"name": {name}, "arguments": {arguments}}}{END_CALL}'
    try:
        json.loads(arguments)
        if len(parse_turn(piece).calls) == 1:
            return piece
    except (ValueError, RecursionError):
        pass
    # as a text, which is no object of arguments
    return f'{BEGIN_CALL}{{"name": {name}, "arguments": {json.dumps(arguments)}}}{END_CALL}'


def _given_back(call: ToolCall | BadCall) -> dict[str, Any]:
    """Return a call as it is given back: one that is none has no arguments, which templates would not read;
    its result says what was wrong."""
    name, arguments = getattr(call, "name", "unknown"), getattr(call, "arguments", {})
    return {"type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}}
