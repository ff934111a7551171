"""Episodes by messages: a script speaks; limits, ends, and how a killed play goes on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.errors import StopRequested, UserError
from megatron_sov.tools.episode import Episode, lines_in
from megatron_sov.tools.limits import EpisodeLimits
from megatron_sov.tools.playing import STREAMS, MessageTable, NoTurn, Said, messages_of, play_by_messages
from megatron_sov.tools.registry import order
from megatron_sov.work.folders import work_folder
from megatron_sov.work.journal import open_journal

TASKS = [{"question": f"What is {i} + 2?", "answer": str(i + 2)} for i in range(4)]
CALL = '<tool_call>{"name": "calculate", "arguments": {"expression": "1 + 2"}}</tool_call>'


class Script:
    """Calls once, and then answers; notes what it is asked."""

    def __init__(self, turns: Sequence[str] = (CALL, "3"), wrote: int = 5, fails: int = -1) -> None:
        self.turns, self.wrote, self.fails = turns, wrote, fails
        self.asked: list[tuple[int, list[Any], int]] = []
        self.lock = threading.Lock()

    def say(self, messages: Sequence[Any], tools: Sequence[Any], max_tokens: int, stream: int) -> Said:
        with self.lock:
            self.asked.append((stream, list(messages), max_tokens))
        if stream // STREAMS == self.fails:
            raise NoTurn("HTTP 500")
        text = self.turns[min(stream % STREAMS, len(self.turns) - 1)]
        return Said(text, {"role": "assistant", "content": text}, self.wrote > max_tokens,
                    100 + 20 * (len(messages) - 1), min(self.wrote, max_tokens))


def played(folder: Path, script: Script, limits: EpisodeLimits | None = None, **told: Any) -> list[Episode]:
    table = MessageTable(order("calculator", {}), limits or EpisodeLimits(), parallel=2)
    with open_journal(folder / "out", "play", {"a": 1}) as journal:
        return play_by_messages(TASKS, script, table, lines_in(journal), **told)


def test_calls_are_made_and_their_results_given_back(tmp_path: Path) -> None:
    script, ended = Script(), []
    episodes = played(tmp_path, script, ended=ended.append)
    assert [(e.end, e.answer, e.result.reward) for e in episodes if e.result] == [
        ("answered", "3", 0.0), ("answered", "3", 1.0), ("answered", "3", 0.0), ("answered", "3", 0.0)]
    assert sum(ended) == 4
    assert sorted(stream for stream, _, _ in script.asked) == [
        n * STREAMS + turn for n in range(4) for turn in (0, 1)]
    *before, said, result = messages_of(episodes[1])[:-1]
    assert before[-1]["content"] == "What is 1 + 2?"
    assert (said["role"], result) == (
        "assistant", {"role": "tool", "tool_call_id": "call00000", "content": "3"})


@pytest.mark.parametrize(("limits", "wrote", "end", "num_turns"), [
    ({"max_turns": 1}, 5, "turns", 1),
    ({"max_turn_tokens": 4}, 5, "unended", 1),
    ({"max_response_tokens": 5}, 5, "tokens", 1),  # nothing is left for another turn
    ({"max_response_tokens": 40}, 5, "tokens", 2),  # the result of the call fills the rest
    ({"max_response_tokens": 44}, 5, "unended", 2),
])
def test_limits_end_an_episode(tmp_path: Path, limits: dict[str, int], wrote: int, end: str,
                               num_turns: int) -> None:
    episodes = played(tmp_path, Script(wrote=wrote), EpisodeLimits(**limits))
    assert {(e.end, len(e.turns), e.answer) for e in episodes} == {(end, num_turns, "")}


def test_a_question_that_is_too_long_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task \d: its question and tools make 1\d\d tokens, more than max"):
        played(tmp_path, Script(), EpisodeLimits(max_prompt_tokens=50))


def test_a_model_that_does_not_answer_fails_this_time(tmp_path: Path) -> None:
    episodes = played(tmp_path, Script(fails=2))
    assert [e.end for e in episodes] == ["answered", "answered", "infrastructure", "answered"]
    assert episodes[2].result is not None
    assert (episodes[2].result.reward, episodes[2].result.reason) == (None, "HTTP 500")


@pytest.mark.parametrize("stop_at", range(1, 9))
def test_a_play_that_was_stopped_goes_on_behind_its_turns(tmp_path: Path, stop_at: int) -> None:
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) >= stop_at:
            raise StopRequested("SIGTERM")

    first, second = Script(), Script()
    with pytest.raises(StopRequested):
        played(tmp_path, first, check=check)
    episodes = played(tmp_path, second)
    assert [e.answer for e in episodes] == ["3"] * 4
    asked = [stream for stream, _, _ in first.asked + second.asked]
    assert sorted(asked) == sorted(set(asked))  # no turn was asked for twice
    assert len(asked) == 8
    assert not work_folder(tmp_path / "out").exists()
