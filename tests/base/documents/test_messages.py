"""Parse messages of OpenAI and ShareGPT, and refuse malformed ones."""

import json
from typing import Any

import pytest

from megatron_sov.base.documents import BadRecord, Message, RecordReading
from megatron_sov.base.documents.messages import parse_messages, parse_sharegpt, parse_tools
from megatron_sov.base.documents.records import parse_record

USER = {"role": "user", "content": "1 + 2?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
RESULT = {"role": "tool", "content": "3", "tool_call_id": "c1"}
ANSWER = {"role": "assistant", "content": "3"}


def build_call(*calls: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


def test_reasoning_calls_and_train_flags_are_parsed() -> None:
    reasoning_message = {"role": "assistant", "content": "It is 3.", "reasoning_content": "add them",
                         "train": False}
    messages = parse_messages([USER, build_call(CALL), RESULT, reasoning_message], "messages")
    assert messages[1].tool_calls[0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert messages[2].to_dict() == {"role": "tool", "content": "3", "tool_call_id": "c1"}
    assert messages[3].reasoning == "add them" and not messages[3].is_learned and messages[0].is_learned
    assert messages[3].texts() == ("add them", "It is 3.")
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, {**ANSWER, "weight": 0}]
    assert parse_messages(parts, "messages") == (Message("user", "hi"),
                                                Message("assistant", "3", is_learned=False))


def test_sharegpt_equals_openai_format() -> None:
    turns = [{"from": "human", "value": "1 + 2?"},
             {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
             {"from": "observation", "value": "3"}, {"from": "gpt", "value": "3"}]
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    openai_messages = parse_messages([{"role": "user", "content": "1 + 2?"},
                                      {"role": "assistant", "content": "", "tool_calls": [call]},
                                      {"role": "tool", "content": "3"}, ANSWER], "messages")
    assert parse_sharegpt(turns, "conversations") == openai_messages
    record = {"conversations": turns, "tools": json.dumps([{"name": "add"}]),
              "chat_template_kwargs": {"enable_thinking": False}}
    document = parse_record(record, "a.jsonl", 1, RecordReading())
    assert document.kind == "chat" and document.conversation().tools == ({"name": "add"},)
    assert document.conversation().template_kwargs == {"enable_thinking": False}
    assert document.texts()[0] == '[{"name": "add"}]'


def test_unread_message_fields_are_recorded() -> None:
    messages = parse_messages([{**USER, "id": 7, "refusal": None, "annotations": []},
                           {**ANSWER, "name": "", "logprobs": {"content": []}, "loss": 0, "audio": {}}], "m")
    assert [m.unread for m in messages] == [("id",), ("logprobs", "loss")] and messages[1].other == ()
    turns = [{"from": "human", "value": "1 + 2?", "weight": 0, "label": "x"}, {"from": "gpt", "value": "3"}]
    assert [m.unread for m in parse_sharegpt(turns, "c")] == [("label",), ()]
    assert messages == parse_messages([USER, ANSWER], "m"), "a pair's sides may differ in them"


@pytest.mark.each(("content", "text"), [
    (["a"], "a"), (["a", "b"], "a\nb"), (["a\n", "", " b"], "a\n\n\n b"), (["서울", "🐻"], "서울\n🐻")])
def test_text_parts_are_joined_by_line_feeds(content: list[str], text: str) -> None:
    parts = [{"type": "text", "text": part} for part in content]
    for role in ("system", "developer", "user", "assistant"):
        assert parse_messages([{"role": role, "content": parts}], "m")[0].content == text
    messages = parse_messages([USER, build_call(CALL), {**RESULT, "content": parts}], "m")
    assert messages[2].content == text


def test_old_openai_calls_and_roles_are_converted() -> None:
    old_messages = [{"role": "developer", "content": "Be short."}, USER, {
        "role": "assistant", "content": "I look.", "function_call": {"name": "add", "arguments": '{"a": 1}'}},
        {"role": "function", "name": "add", "content": "3"}, ANSWER]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    current_messages = [{"role": "system", "content": "Be short."}, USER,
                        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
                        {"role": "tool", "name": "add", "content": "3"}, ANSWER]
    assert parse_messages(old_messages, "m") == parse_messages(current_messages, "m")
    assert not any(m.unread for m in parse_messages(old_messages, "m"))


@pytest.mark.each("call", [
    {"id": None, "type": None, "function": {"name": "add", "arguments": None}},
    {"function": None, "name": "add", "arguments": {}}, {"function": {"name": "add"}},
    {"function": {"name": "add", "arguments": ""}}, {"function": {"name": "add", "arguments": "{}"}}])
def test_null_fields_count_as_missing(call: dict[str, Any]) -> None:
    """JSON lines keep nulls; serve is sent them too."""
    nulls = dict.fromkeys(("name", "tool_calls", "tool_call_id", "reasoning_content", "train", "weight"))
    null_call = {**nulls, "role": "assistant", "content": None, "tool_calls": [call]}
    messages = parse_messages([{**nulls, **USER}, null_call, {**nulls, **RESULT}], "messages")
    assert messages == parse_messages([USER, build_call({"function": {"name": "add"}}), RESULT], "m")
    mixed = [{"from": None, "value": None, **USER}, {"role": None, "content": None, "from": "gpt",
                                                     "value": "3"}]
    assert parse_sharegpt(mixed, "conversations") == parse_messages([USER, ANSWER], "messages")


@pytest.mark.each(("messages", "reason"), [
    ([USER, RESULT], "result without a call: m\\[1\\]"),
    ([USER, build_call(CALL), {**RESULT, "tool_call_id": "c9"}], "result of another call: .* is 'c9'"),
    ([USER, build_call(CALL), ANSWER], "1 tool calls and 0 results before m\\[2\\]"),
    ([USER, build_call({"function": {"name": "add", "arguments": "{a"}})], "is '{a', which is not JSON"),
    ([USER, build_call({"function": {"name": "add", "arguments": [1]}})], "must be a JSON object"),
    ([USER, build_call({"function": {"name": "add", "arguments": '{"a": NaN}'}})],
     r"arguments is no JSON \(Out of range"),
    ([USER, build_call({"function": {"name": "add", "arguments": '{"a":' * 70 + "1" + "}" * 70}})],
     "nested more than 64 levels"),
    ([USER, build_call({"function": {}})], "has no function with a name"),
    ([USER, {"role": "assistant", "content": " "}], "empty turn: m\\[1\\] \\(assistant\\)"),
    ([{"role": "user", "content": "a", "reasoning_content": "b"}], "which only an assistant's message has"),
    ([USER, {**ANSWER, "train": "yes"}], "m\\[1\\].train is 'yes', must be True or False"),
    ([{"role": "user", "content": [{"type": "image"}]}], "must be a string"),
    ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}], "encode-media"),
    ([{"role": "user", "content": [{"type": "text", "text": None}]}], "must be a string"),
    ([{"role": "user", "content": ["a"]}], "must be a string"),
    ([{"role": "user", "content": []}], "empty turn"), ([{"role": ["user"], "content": "a"}], "has role"),
    ([USER, {**build_call(CALL), "function_call": {"name": "add"}}], "'tool_calls' and 'function_call'"),
    ([{**USER, "function_call": {"name": "add"}}], "which only an assistant's message has"),
    ([USER, {"role": "function", "content": "3"}], "result without a call"),
])
def test_inconsistent_messages_are_refused(messages: list[Any], reason: str) -> None:
    with pytest.raises(BadRecord, match=reason):
        parse_messages(messages, "m")


def test_invalid_tools_and_speakers_are_refused() -> None:
    with pytest.raises(BadRecord, match="must be a list of objects that describe functions"):
        parse_tools({"name": "add"})
    with pytest.raises(BadRecord, match="is from 'alien', must be one of system, human"):
        parse_sharegpt([{"from": "alien", "value": "x"}], "conversations")
