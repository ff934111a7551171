"""Tasks that are played with tools: a script in the model's place plays them to their scores."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from suite_items import CASES, write

from megatron_sov.base.errors import UserError
from megatron_sov.bench.lm.settings import EndpointSettings
from megatron_sov.bench.suites.catalogue import suite_tasks
from megatron_sov.bench.suites.protocol import Folded, Protocol, changed
from megatron_sov.chat.encode import TurnEncoder
from megatron_sov.chat.tool_calls import BadCall, ToolCall, parse_turn
from megatron_sov.commands.evaluate.eval_play import (
    EndpointSpeaker, fold_episodes, order_of, said_in, tasks_of)
from megatron_sov.judge.rewards.judge import Judge
from megatron_sov.judge.tools.episode import GeneratedTurn, lines_in
from megatron_sov.judge.tools.playing import STREAMS, EpisodeTable, play
from megatron_sov.work.endpoints.answers import BadAnswer
from megatron_sov.work.progress.journal import open_journal

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from tool_episodes import chat_encoder

TASKS = suite_tasks()


class Script:
    """Writes the same turns in each episode, or others for each."""

    def __init__(self, encoder: Any, turns: Sequence[Sequence[str]]) -> None:
        self.encoder, self.turns = encoder, turns

    def sample(self, prompts: Sequence[Any], max_new_tokens: int,
               streams: Sequence[int]) -> list[GeneratedTurn]:
        end = self.encoder.encode_text("")  # the template's own end of turn stands behind each text
        assert end == []
        return [
            GeneratedTurn([*self.encoder.encode_text(self._text(stream)), *self.encoder.end_ids()])
            for stream in streams
        ]

    def _text(self, stream: int) -> str:
        turns = self.turns[stream // STREAMS % len(self.turns)]
        return turns[min(stream % STREAMS, len(turns) - 1)]


def called(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def played(name: str, folder: Path, turns: Sequence[Sequence[str]],
           **changes: Any) -> tuple[Protocol, Folded]:
    write(CASES[name], folder)
    protocol = TASKS[name].protocol
    assert protocol is not None
    protocol = changed(protocol, {"samples": len(turns), "temperature": 1.0, **changes})
    tasks = tasks_of(TASKS[name], folder)
    chat = chat_encoder()
    with open_journal(folder / "out", "play", {"a": 1}) as journal:
        table = EpisodeTable(order_of(protocol, folder), TurnEncoder(chat, "the test's model"),
                             protocol.episode_limits, 2)
        flat = play([task for task in tasks for _ in turns], Script(chat, turns), table, lines_in(journal))
        episodes = [flat[i:i + len(turns)] for i in range(0, len(flat), len(turns))]
    return protocol, fold_episodes(protocol, tasks, episodes, folder, 1)


def test_a_world_scores_its_episodes(tmp_path: Path) -> None:
    protocol, folded = played("tau2-like-files", tmp_path,
                              [[called("delete_file", path="a.txt"), "It is gone."], ["I did nothing."]])
    assert folded.items[0].scores == {"avg@2": 0.5, "pass@1": 0.5, "pass@2": 1.0}
    assert folded.items[0].sample_scores == [1.0, 0.0]
    assert folded.items[0].num_at_limit == 0
    assert folded.judge["environment"]["name"] == "files"
    assert protocol.as_json()["agent_limits"]["max_turns"] == 30


def test_an_answer_found_with_tools_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def ask(payload: Any, read: Any) -> tuple[float, str]:
        seen.append(payload["messages"][1]["content"])
        return (2.0 if "มาตรา 1 ที่พบ" in seen[-1] else 0.0), ""

    monkeypatch.setattr(Judge, "_asked", SimpleNamespace(ask=ask))
    _, folded = played("nitibench-agent", tmp_path,
                       [[called("search_law", query_list=["มาตรา"]), "มาตรา 1 ที่พบ"], ["ไม่รู้"]],
                       reward_settings={"endpoint": "http://localhost:1/v1", "model": "m"})
    assert folded.items[0].sample_scores == [1.0, 0.0]
    assert "KNOWN ANSWER" in seen[0]


def test_files_and_worlds_are_checked(tmp_path: Path) -> None:
    task, protocol = TASKS["tau2-like-booking"], TASKS["nitibench-agent"].protocol
    with pytest.raises(UserError, match="cannot be read"):
        tasks_of(task, tmp_path)
    write(CASES["tau2-like-booking"], tmp_path)
    assert len(tasks_of(task, tmp_path)) == 1
    assert tasks_of(task, tmp_path, limit=0) == []
    (tmp_path / "tau2-like-booking/test.jsonl").write_text('{"question": "q"}\n')
    with pytest.raises(UserError, match="line 1: has no 'goal'"):
        tasks_of(task, tmp_path)
    assert protocol is not None
    assert order_of(protocol, tmp_path).settings["corpus"] == f"{tmp_path}/nitibench/laws.jsonl"


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
