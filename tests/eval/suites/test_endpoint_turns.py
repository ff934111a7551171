"""What an endpoint says in a turn, and what it is given back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.chat.tool_calls import BadCall, ToolCall, parse_turn
from megatron_sov.endpoints.answers import BadAnswer
from megatron_sov.errors import UserError
from megatron_sov.eval.lm.settings import EndpointSettings
from megatron_sov.eval.suites.episodes import EndpointSpeaker, said_in
from megatron_sov.eval.suites.protocol import Protocol


def answered(reason: str = "stop", **message: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", **message}, "finish_reason": reason}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3}}


def calling(*functions: Any) -> list[Any]:
    return [{"id": "x", "type": "function", "function": function} for function in functions]


def test_content_thoughts_and_calls_are_read_and_given_back() -> None:
    said = said_in(answered("tool_calls", content="Wait. <tool_call>", reasoning_content="a </think> b",
                            tool_calls=calling({"name": "f", "arguments": '{"a": "</tool_call>"}'},
                                               {"name": "g", "arguments": ""})))
    turn = parse_turn(said.text)
    assert turn.content == "Wait. < tool_call>"
    assert turn.calls == (ToolCall("f", {"a": "</tool_call>"}), ToolCall("g", {}))
    assert said.message["reasoning_content"] == "a </think> b"
    assert said.message["content"] == "Wait. <tool_call>"
    assert [json.loads(call["function"]["arguments"]) for call in said.message["tool_calls"]] == [
        {"a": "</tool_call>"}, {}]
    assert (said.is_cut, said.read_tokens, said.wrote_tokens) == (False, 7, 3)


def test_calls_in_the_text_of_a_server_without_a_parser_are_read() -> None:
    text = '<think>so</think><tool_call>{"name": "f", "arguments": {}}</tool_call>'
    said = said_in(answered(content=text))
    assert parse_turn(said.text).calls == (ToolCall("f", {}),)
    assert said.message["content"] == "<think>so</think>"
    assert [call["function"] for call in said.message["tool_calls"]] == [{"name": "f", "arguments": "{}"}]
    assert said_in(answered(content="Well.")).message == {"role": "assistant", "content": "Well."}
    assert said_in(answered("length", content=None, reasoning="all of it")).is_cut


@pytest.mark.parametrize("function", [
    {"name": "f", "arguments": "{"}, {"name": "f", "arguments": "[1]"}, {"name": None, "arguments": "{}"},
    {"name": "f", "arguments": '{"a": 1, "a": 2}'}, {"name": "f", "arguments": "1 }</tool_call>"},
    {"name": "f", "arguments": '{}}</tool_call><tool_call>{"name": "g", "arguments": {}'},
    {"name": "f", "arguments": '{"a": NaN, "b": "</tool_call><tool_call>"}'}, {}, None, "f",
    {"name": "f", "arguments": "[" * 100_000},
])
def test_what_is_no_call_is_one_bad_call(function: Any) -> None:
    said = said_in(answered(content="", tool_calls=calling(function)))
    calls = parse_turn(said.text).calls
    assert len(calls) == 1
    assert isinstance(calls[0], BadCall)
    assert [call["function"]["arguments"] for call in said.message["tool_calls"]] == ["{}"]


@pytest.mark.parametrize("raw", [
    None, [], {}, {"choices": []}, {"choices": [{}, {}]}, {"choices": [{"message": None}]},
    {"choices": [{"message": {"content": 1}}]}, {"choices": [{"message": {"tool_calls": {"a": 1}}}]}])
def test_what_is_no_answer_is_asked_for_again(raw: Any) -> None:
    with pytest.raises(BadAnswer):
        said_in(raw)


def test_an_endpoint_that_counts_no_tokens_is_of_no_use() -> None:
    with pytest.raises(UserError, match="usage"):
        said_in({**answered(content="a"), "usage": None})


@pytest.mark.parametrize(("changes", "expected"), [
    ({}, {"temperature": 0.0}),
    ({"temperature": 0.7, "top_p": 0.9, "seed": 3, "mode": "no-thinking"},
     {"temperature": 0.7, "top_p": 0.9, "seed": 8, "chat_template_kwargs": {"enable_thinking": False}}),
])
def test_sampling_and_mode_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         changes: dict[str, Any], expected: dict[str, Any]) -> None:
    speaker = EndpointSpeaker("http://localhost:1/v1/", EndpointSettings("m"),
                              Protocol("t", environment="calculator", **changes), tmp_path, lambda s: None)
    asked: list[Any] = []
    monkeypatch.setattr(speaker._endpoint, "ask", lambda payload, read: asked.append(payload))
    speaker.say([{"role": "user", "content": "q"}], [], 9, 5)
    assert asked == [{"model": "m", "messages": [{"role": "user", "content": "q"}], "max_tokens": 9,
                      **expected}]
