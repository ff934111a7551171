"""Calls of tools: what is one, what is nearly one, what is none."""

from __future__ import annotations

import json
import time

import pytest

from megatron_sov.chat.tool_calls import BadCall, ToolCall, WrittenTurn, parse_turn


def call(text: str) -> str:
    return f"<tool_call>{text}</tool_call>"


def test_calls_are_read_in_order_and_what_is_said_around_them_stays() -> None:
    turn = parse_turn('I look.\n<tool_call>\n{"name": "search", "arguments": {"query": "가"}}\n</tool_call>\n'
                      + call('{"arguments": {}, "name": "now"}') + " Wait.")
    assert turn.calls == (ToolCall("search", {"query": "가"}), ToolCall("now", {}))
    assert turn.content == "I look.\n\n Wait."


@pytest.mark.parametrize("arguments", [{"text": "a </tool_call> b <tool_call> c"}, {"n": [1, {"x": None}]},
                                       {"text": 'quote " and \\ and \n'}, {"n": 1e308}])
def test_whatever_json_holds_comes_back(arguments: dict) -> None:
    text = json.dumps({"name": "f", "arguments": arguments})
    assert parse_turn(call(text)).calls == (ToolCall("f", arguments),)


@pytest.mark.parametrize("inside, code", [
    ("", "json"), ("f(1)", "json"), ("{'name': 'f', 'arguments': {}}", "json"),
    ('{"name": "f", "arguments": {}} {}', "json"), ('{"name": "f", "arguments": {"x": NaN}}', "json"),
    ('{"name": "f", "name": "g", "arguments": {}}', "json"), ("[" * 100_000, "json"),
    ('{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}", "json"),
    ('{"name": "f", "arguments": {"x": "\\ud800"}}', "json"),
    ('{"name": "f", "arguments": {"x": 1e999}}', "json"),
    ('{"name": "f", "arguments": {"x": ' + "[" * 700 + "]" * 700 + "}}", "json"),
    ("[]", "form"), ("1", "form"), ('{"name": "f"}', "form"), ('{"name": 1, "arguments": {}}', "form"),
    ('{"name": "f", "arguments": "{}"}', "form"), ('{"name": "f", "arguments": {}, "id": 1}', "form"),
])
def test_what_is_nearly_a_call_is_told_and_what_follows_is_read(inside: str, code: str) -> None:
    bad, good = parse_turn(call(inside) + call('{"name": "g", "arguments": {}}')).calls
    assert isinstance(bad, BadCall) and bad.code == code and len(bad.reason) < 300
    assert good == ToolCall("g", {})


@pytest.mark.parametrize("text", ['<tool_call>{"name": "f", "arguments": {}}', "<tool_call>{", "<tool_call>"])
def test_a_call_that_does_not_end_is_none(text: str) -> None:
    (bad,) = parse_turn(text).calls
    assert isinstance(bad, BadCall) and bad.code == "unclosed"


@pytest.mark.parametrize("part", [
    "<tool_call>{}", "<tool_call>x</tool_call>\n", '<tool_call>["</tool_call>', "<tool_call>{}x</tool_call>",
    '<tool_call>{"name": "f", "arguments": {"x": "' + "a" * 3000 + '\\u00e4"}}</tool_call>'])
def test_reading_takes_time_by_the_length_of_a_turn(part: str) -> None:
    """Where each of them looked at all that follows, the first three would take 2 to 8 s."""
    num_parts = 500_000 // len(part)
    began_s = time.process_time()
    calls = parse_turn(part * num_parts).calls
    assert time.process_time() - began_s < 1.5 and num_parts // 2 <= len(calls) <= num_parts


@pytest.mark.parametrize("num_chars", range(1000, 1050))
def test_a_call_of_any_length_is_read(num_chars: int) -> None:
    for value in ("a" * num_chars, "\n\\\"" * (num_chars // 4),
                  ["x" * (num_chars - 9), 1e-5, -12345, True, None]):
        arguments = {"x": value}
        assert parse_turn(call(json.dumps({"name": "f", "arguments": arguments}))).calls == (
            ToolCall("f", arguments),)


def test_thoughts_call_nothing() -> None:
    thought = call('{"name": "f", "arguments": {}}')
    assert parse_turn(f"<think>{thought}</think>so").calls == ()
    assert parse_turn(f"so <think>{thought}").content == "so"
    assert parse_turn(f"{thought}</think>{thought}").calls == (ToolCall("f", {}),)


def test_no_call_is_made_in_thoughts_without_an_end() -> None:
    made, thought = call('{"name": "f", "arguments": {}}'), call('{"name": "g", "arguments": {}}')
    assert parse_turn(thought, in_thoughts=True) == WrittenTurn("", ())
    assert parse_turn(f"a <tool_call> tag {thought}</think>b{made}", in_thoughts=True) == WrittenTurn(
        "b", (ToolCall("f", {}),))
    again = parse_turn(f"<think>a</think>b{made}<think>c{thought}")
    assert again == WrittenTurn("b", (ToolCall("f", {}),)), "it thinks again, and never ends"
    between = parse_turn(f"<think>a</think>b{made}<think>c{thought}</think>d{made}")
    assert between == WrittenTurn("bd", (ToolCall("f", {}), ToolCall("f", {})))


def test_the_first_end_of_thoughts_counts_as_where_the_model_is_served() -> None:
    made = call('{"name": "f", "arguments": {}}')
    turn = parse_turn(f"a</think>b{made}c</think>d{made}")
    assert turn == WrittenTurn("bc</think>d", (ToolCall("f", {}), ToolCall("f", {})))
    text = {"text": "<think>x</think> and </think>"}
    spelled = call(json.dumps({"name": "f", "arguments": text}))
    for turn in (f"<think>so</think>{spelled}", spelled):
        assert parse_turn(turn).calls == (ToolCall("f", text),)
