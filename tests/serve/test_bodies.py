"""Request bodies of the server: parsed messages, one-sentence errors, and memory bounded by their length."""

import json
import tracemalloc
from typing import Any

import pytest

from megatron_sov.base.documents import Conversation
from megatron_sov.serve.bodies import (
    CompletionRequest, RefusedRequest, parse_chat_body, parse_completion_body)

MANY = 20_000
HI = '"messages": [{"role": "user", "content": "hi"}]'
LONG_BODIES = {
    "parts": (parse_completion_body, f'{{"prompt": [{",".join(["{}"] * MANY)}]}}', "prompt is"),
    "messages": (parse_chat_body, f'{{"messages": [{",".join(["0"] * MANY)}]}}', "messages is"),
    "names": (parse_chat_body, f'{{{HI}, {",".join(f"{chr(34)}a{i}{chr(34)}:0" for i in range(MANY))}}}',
              "a0 is not known"),
    "options": (parse_chat_body, f'{{{HI}, "stream_options": {{'
                + ",".join(f'"a{i}": true' for i in range(MANY)) + "}}", "stream_options is"),
    "role": (parse_chat_body, f'{{"messages": [{{"role": "{"x" * MANY}", "content": "hi"}}]}}', "role 'xxx"),
}


@pytest.mark.each("name", LONG_BODIES)
def test_a_thoroughly_malformed_body_is_refused_cheaply(name: str) -> None:
    parse, body, message = LONG_BODIES[name]
    tracemalloc.start()
    try:
        with pytest.raises(RefusedRequest, match=message) as error:
            parse(body.encode(), "m")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert error.value.status == 400 and len(error.value.format_body()) < 3000
    assert peak_bytes < 6_000_000


@pytest.mark.each(("prompt", "prompts"), [
    ('"a"', ("a",)), ('["a", "b"]', ("a", "b")), ("[1, 2]", ((1, 2),)), ("[[1], [2, 3]]", ((1,), (2, 3)))])
def test_prompts_are_texts_or_ids(prompt: str, prompts: Any) -> None:
    assert parse_completion_body(f'{{"prompt": {prompt}}}'.encode(), "m").prompts == prompts


@pytest.mark.each(("options", "include_usage"), [
    ("", False), (', "stream_options": {}', False), (', "stream_options": {"include_usage": true}', True)])
def test_a_stream_reports_usage_on_request(options: str, include_usage: bool) -> None:
    request: CompletionRequest = parse_chat_body(f'{{{HI}, "stream": true{options}}}'.encode(), "m")
    assert request.include_usage is include_usage


@pytest.mark.each("options", ['{"include_usag": true}', '{"include_usage": 1}', "[]"])
def test_invalid_stream_options_are_refused(options: str) -> None:
    with pytest.raises(RefusedRequest, match="stream_options is"):
        parse_chat_body(f'{{{HI}, "stream_options": {options}}}'.encode(), "m")


CALL = {"id": "c1", "type": "function", "function": {"name": "get", "arguments": '{"unit": null}'}}
OPENAI_MESSAGES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "developer": ([{"role": "developer", "content": "Be short."}, {"role": "user", "content": "hi"}],
                  [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hi"}]),
    "fields of an OpenAI server's answer": (
        [{"role": "user", "content": "hi", "name": None},
         {"role": "assistant", "content": "yo", "refusal": None, "annotations": [], "audio": None,
          "function_call": None, "tool_calls": None}, {"role": "user", "content": "and?", "name": ""}],
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"},
         {"role": "user", "content": "and?"}]),
    "parts": ([{"role": "system", "content": [{"type": "text", "text": "a"}]},
               {"role": "user", "content": [{"type": "text", "text": "b\n"}, {"type": "text", "text": "c"}]}],
              [{"role": "system", "content": "a"}, {"role": "user", "content": "b\n\nc"}]),
    "a call without content": (
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [CALL],
                                            "refusal": None, "annotations": []},
         {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "r"}]}],
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [
            {**CALL, "function": {"name": "get", "arguments": {"unit": None}}}]},
         {"role": "tool", "tool_call_id": "c1", "content": "r"}]),
    "older calls": (
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "function_call": {
            "name": "get", "arguments": '{"unit": null}'}},
         {"role": "function", "name": "get", "content": "r"}],
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "get", "arguments": {"unit": None}}}]},
         {"role": "tool", "name": "get", "content": "r"}]),
}
"""Messages as OpenAI's clients send them, and as they are parsed."""


@pytest.mark.each("name", OPENAI_MESSAGES)
def test_messages_of_openais_clients_are_read(name: str) -> None:
    sent, parsed = OPENAI_MESSAGES[name]
    [chat] = parse_chat_body(json.dumps({"messages": sent}).encode(), "m").prompts
    assert isinstance(chat, Conversation) and [m.to_dict() for m in chat.messages] == parsed


@pytest.mark.each(("more", "message"), [
    ({"annotations": [{"type": "url_citation"}]}, "has 'annotations', which is not known"),
    ({"refusal": "no"}, "has 'refusal'"),
    ({"conten": "x"}, "'conten', which is not known; did you mean 'content'"),
    ({"prefix": True}, "has 'prefix'"), ({"from": "human"}, "has 'from'"),
    ({"function_call": {"name": "get"}, "tool_calls": [CALL]}, "'tool_calls' and 'function_call'"),
    ({"function_call": "auto"}, "has no function with a name")])
def test_unknown_fields_with_a_value_are_refused(more: dict[str, Any], message: str) -> None:
    sent = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", **more}]
    with pytest.raises(RefusedRequest, match=message):
        parse_chat_body(json.dumps({"messages": sent}).encode(), "m")
