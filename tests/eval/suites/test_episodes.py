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

from megatron_sov.chat.turns import TurnEncoder
from megatron_sov.errors import UserError
from megatron_sov.eval.suites.catalogue import suite_tasks
from megatron_sov.eval.suites.episodes import fold_episodes, order_of, play_tasks, tasks_of
from megatron_sov.eval.suites.protocol import Folded, Protocol, changed
from megatron_sov.rewards.judge import Judge
from megatron_sov.tools.episode import Written
from megatron_sov.tools.journal import lines_in
from megatron_sov.tools.playing import STREAMS
from megatron_sov.work.journal import open_journal

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from tool_episodes import chat_encoder

TASKS = suite_tasks()


class Script:
    """Writes the same turns in each episode, or others for each."""

    def __init__(self, encoder: Any, turns: Sequence[Sequence[str]]) -> None:
        self.encoder, self.turns = encoder, turns

    def sample(self, prompts: Sequence[Any], max_new_tokens: int, streams: Sequence[int]) -> list[Written]:
        end = self.encoder.encode_text("")  # the template's own end of turn stands behind each text
        assert end == []
        return [
            Written([*self.encoder.encode_text(self._text(stream)), *self.encoder.end_ids()])
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
        episodes = play_tasks(protocol, tasks, folder, Script(chat, turns),
                              TurnEncoder(chat, "the test's model"), lines_in(journal), parallel=2)
    return protocol, fold_episodes(protocol, tasks, episodes, folder, 1)


def test_a_world_scores_its_episodes(tmp_path: Path) -> None:
    protocol, folded = played("tau2-like-files", tmp_path,
                              [[called("delete_file", path="a.txt"), "It is gone."], ["I did nothing."]])
    assert folded.items[0].scores == {"avg@2": 0.5, "pass@1": 0.5, "pass@2": 1.0}
    assert folded.items[0].sample_scores == [1.0, 0.0]
    assert folded.items[0].num_at_limit == 0
    assert folded.judge["environment"]["name"] == "files"
    assert protocol.as_json()["agent_limits"]["max_turns"] == 30


def test_functions_are_called_in_one_turn(tmp_path: Path) -> None:
    right = called("get_weather", city="seoul")
    _, folded = played(
        "bfcl-like",
        tmp_path,
        [
            [right],
            [called("get_weather", city="Busan")],
            [right + called("get_time", city="Seoul")],
            ["It is warm."],
        ],
    )
    assert folded.items[0].sample_scores == [1.0, 0.0, 0.0, 0.0]
    assert folded.items[0].num_at_limit == 0  # one turn is all that there is


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
