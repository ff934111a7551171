"""Environments in processes of their own: a failed call is reported and does not change the state."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.chat.tool_calls import ToolCall
from megatron_sov.judge.tools.environment import EpisodeLimits
from megatron_sov.judge.tools.host import EnvironmentHost
from megatron_sov.judge.tools.registry import request_environment

FILE = Path(__file__).with_name("hostile_world.py")
LIMITS = EpisodeLimits(max_tool_chars=200, call_timeout_s=20, max_state_bytes=1_000_000)
TASK = {"question": "Try."}


@pytest.fixture(scope="module")
def host() -> Iterator[EnvironmentHost]:
    """A host of the hostile world. If a test ends its process, the next call starts another."""
    with EnvironmentHost(request_environment(f"{FILE}:Hostile", {}), LIMITS) as host:
        yield host


@pytest.mark.each("how, fault", [
    ("raises", "failed"), ("nan", "result"), ("object", "result"), ("deep", "result"), ("memory", "memory"),
    ("leaves", "failed"), ("dies", "ended"), ("state", "state"), ("broken", "infrastructure")])
def test_a_failed_call_does_not_change_state(host: EnvironmentHost, how: str, fault: str) -> None:
    host.reset(TASK)
    assert host.call(ToolCall("add", {})).text == "1"
    result = host.call(ToolCall("misbehave", {"how": how}))
    assert result.fault == fault and result.text.startswith("error: misbehave: "), result
    assert len(result.text) <= LIMITS.max_tool_chars, result
    assert host.call(ToolCall("add", {})).text == "2"


def test_a_long_result_is_truncated_with_a_note(host: EnvironmentHost) -> None:
    host.reset(TASK)
    result = host.call(ToolCall("misbehave", {"how": "megabytes"}))
    assert (len(result.text), result.is_cut, result.fault) == (200, True, "")
    assert result.text.endswith("[cut: 200 of 104,857,600 characters]")
    assert host.call(ToolCall("misbehave", {"how": "surrogate"})).text == "half ?"


@pytest.mark.each("call, fault, message", [
    (ToolCall("misbehaves", {}), "unknown_tool", "the tools are add, misbehave"),
    (ToolCall("_hang", {}), "unknown_tool", "the tools are"),
    (ToolCall("misbehave", {}), "arguments", "how: is missing"),
    (ToolCall("misbehave", {"how": 1}), "arguments", "how: Input should be a valid string"),
    (ToolCall("add", {"by": 2}), "arguments", "by: there is no such argument")])
def test_malformed_calls_reach_no_tool(host: EnvironmentHost, call: ToolCall, fault: str,
                                       message: str) -> None:
    host.reset(TASK)
    result = host.call(call)
    assert result.fault == fault and message in result.text, result
    assert json.loads(host.state) == {"count": 0}


@pytest.mark.each("answer", ["nan", "text", "raises"])
def test_invalid_score_is_a_failure(host: EnvironmentHost, answer: str) -> None:
    host.reset(TASK)
    result = host.score(answer)
    assert (result.reward, result.status) == (None, "failed") and result.reason


def test_invalid_tasks_are_named(host: EnvironmentHost) -> None:
    with pytest.raises(UserError, match="the task has no 'question'"):
        host.reset({"query": "Try."})
    assert host.reset(TASK).observation.user == "Try."
