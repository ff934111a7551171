"""Episodes of tool use with fuzzed or scripted turns: tokens, limits, and resumption after a kill."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.chat.encode import TurnEncoder
from megatron_sov.judge.tools.environment import EpisodeLimits
from megatron_sov.judge.tools.episode import Episode, GeneratedTurn, build_row, open_episode_lines
from megatron_sov.judge.tools.playing import (
    STREAMS_PER_EPISODE, EpisodeSettings, ToolPolicy, play_episodes, summarize_rows)
from megatron_sov.judge.tools.registry import request_environment
from megatron_sov.work.progress.journal import RECORDS, open_journal, work_folder
from tests.judge.tools.fuzzed_episodes import (
    WORLDS, build_small_encoder, find_token_problems, play_fuzzed_episodes)

HOSTILE = Path(__file__).with_name("hostile_world.py")
TALKING = f"{Path(__file__).with_name('talking_world.py')}:Talking"


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """World -> the result of `play_fuzzed_episodes` with 40 episodes."""
    folder = tmp_path_factory.mktemp("fuzzed")
    return {world: play_fuzzed_episodes(world, 40, folder, parallel=3) for world in WORLDS}


def test_sampled_tokens_are_trained_and_tool_results_are_not(fuzzed: dict[str, Any]) -> None:
    rows = []
    for episodes, policy, encoder in fuzzed.values():
        assert [problem for episode in episodes for problem in find_token_problems(episode, policy)] == []
        rows += [build_row(episode, encoder) for episode in episodes]
    summary = summarize_rows(rows)
    assert summary["num_episodes"] == 80  # 40 in each of two worlds
    # the fuzzed turns have reached all ends and all faults that a model can cause
    assert {"answered", "turns", "tokens", "unended"} <= set(summary["ends"])
    assert {"json", "unclosed", "form", "many", "unknown_tool", "arguments", "refused"} <= set(
        summary["faults"])
    assert 0 < summary["num_turns_that_differ"] < summary["num_turns"] / 2
    assert all(len(row["logprobs"][n]) == end - start for row in rows
               for n, (start, end) in enumerate(row["spans"]))


def test_turns_that_differ_from_retokenization_are_counted(fuzzed: dict[str, Any]) -> None:
    episodes, _, encoder = fuzzed["files"]
    chat = build_small_encoder()
    for turn in (turn for episode in episodes for turn in episode.turns):
        again = chat.encode_text(chat.decode(turn.written.ids))
        assert encoder.differs(turn.written.ids) == (again != turn.written.ids)


class _Killed(BaseException):
    """Ends playing as a signal would: it is no `Exception`, so nothing handles it."""


def kill_after(num_rounds: int) -> Callable[[ToolPolicy], ToolPolicy]:
    """Return a function that wraps a policy: after `num_rounds` calls, `sample` raises `_Killed`."""
    class KillingPolicy:
        def __init__(self, policy: ToolPolicy) -> None:
            self._policy, self._num_left = policy, num_rounds

        def sample(self, *arguments: Any) -> Sequence[GeneratedTurn]:
            self._num_left -= 1
            if self._num_left < 0:
                raise _Killed
            return self._policy.sample(*arguments)

    return KillingPolicy


@pytest.mark.tier1_cases(1)
# torn: bytes at the journal's end, as a kill during a write leaves them
@pytest.mark.parametrize("num_rounds, torn", [
    (1, b"[0, 1"), (7, b"\0" * 40 + b"\n"), (15, b'[3, 9, 1]\n{"ep')])
def test_killed_episodes_resume_to_the_same_end(fuzzed: dict[str, Any], tmp_path: Path,
                                                num_rounds: int, torn: bytes) -> None:
    episodes, _, encoder = fuzzed["files"]
    expected = [build_row(episode, encoder) for episode in episodes[:12]]
    with pytest.raises(_Killed):
        play_fuzzed_episodes("files", 12, tmp_path, kill_after(num_rounds), parallel=2)
    journal = work_folder(tmp_path / "files") / RECORDS
    num_turns = sum(b'"turn"' in line for line in journal.read_bytes().splitlines())
    with open(journal, "ab") as f:
        f.write(torn)
    again, policy, _ = play_fuzzed_episodes("files", 12, tmp_path, parallel=2)
    assert [build_row(episode, encoder) for episode in again] == expected
    num_expected = sum(row["num_turns"] for row in expected)
    assert len(policy.turns) == num_expected - num_turns, "journaled turns are not sampled again"
    assert not work_folder(tmp_path / "files").exists()


def play_scripted_episode(tmp_path: Path, turns: list[str], limits: EpisodeLimits,
                          world: str = f"{HOSTILE}:Hostile") -> tuple[Episode, TurnEncoder]:
    """Return an episode in which the model writes these turns, and the encoder of turns."""
    encoder = TurnEncoder(build_small_encoder(), "tok")

    class ScriptedPolicy:
        def sample(self, prompts: Sequence[Sequence[int]], max_new_tokens: int,
                   streams: Sequence[int]) -> list[GeneratedTurn]:
            # a stream is the episode's first stream plus the number of the turn
            return [GeneratedTurn(encoder.encode(turns[stream % STREAMS_PER_EPISODE])) for stream in streams]

    with open_journal(tmp_path / "one", "play", {}) as journal:
        settings = EpisodeSettings(request_environment(world, {}), encoder, limits)
        (episode,) = play_episodes([{"question": "Try.", "answer": "1"}], ScriptedPolicy(), settings,
                                   open_episode_lines(journal))
    return episode, encoder


def format_call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def test_tool_faults_are_reported_and_counted(tmp_path: Path) -> None:
    kinds = ("raises", "nan", "dies", "hang")
    turns = [format_call("misbehave", how=kind) + format_call("add") for kind in kinds]
    episode, encoder = play_scripted_episode(tmp_path, [*turns, "so"],
                                             EpisodeLimits(call_timeout_s=5, max_tool_chars=80))
    assert episode.count_faults() == Counter(failed=1, result=1, ended=1, timeout=1)
    assert episode.result is not None and episode.result.reward == 4  # each failed call was undone
    assert (episode.end, episode.answer) == ("answered", "so")
    row = build_row(episode, encoder)
    assert row["num_calls"] == 8 and row["logprobs"] is None
    assert "error: misbehave: took longer than 5 s" in build_small_encoder().decode(row["ids"])


def test_broken_machine_has_no_reward(tmp_path: Path) -> None:
    episode, _ = play_scripted_episode(tmp_path, [format_call("misbehave", how="broken")], EpisodeLimits())
    assert episode.end == "infrastructure" and episode.result is not None
    assert (episode.result.reward, episode.result.status) == (None, "failed")
    assert "disk of the sandbox" in episode.result.reason


def test_user_answers_do_not_change_sampled_tokens(tmp_path: Path) -> None:
    turns = ["<think>hm</think>two", format_call("add", n=1) + format_call("add", n=2),
             format_call("add", n=3), "<tool_call>{", "3"]
    episode, encoder = play_scripted_episode(tmp_path, turns, EpisodeLimits(), TALKING)
    assert [turn.reply for turn in episode.turns] == ["Not two.", "And?", None, "Not <tool_call>{.", None]
    assert (episode.end, episode.answer) == ("answered", "3")
    assert episode.result is not None and episode.result.reward == 5
    # the ids contain the model's own tokens, followed by the template's rendering of the rest
    written = [episode.ids[start:end] for start, end in episode.spans]
    assert written == [encoder.encode(text) for text in turns]
    assert episode.ids[:episode.spans[1][0]] == [*episode.prompt, *encoder.encode(turns[0]),
                                                 *encoder.encode_after_turn([], user="Not two.")]
    # thoughts, text and called tools of each turn
    assert json.loads(episode.turns[1].state)["turns"] == [["hm", "two", []], ["", "", ["add", "add"]]]


def test_broken_or_truncated_conversation_ends(tmp_path: Path) -> None:
    broken, _ = play_scripted_episode(tmp_path, ["one", "break"], EpisodeLimits(), TALKING)
    assert broken.end == "infrastructure" and broken.result is not None
    assert broken.result.reward is None and "the user is gone" in broken.result.reason
    cut, _ = play_scripted_episode(tmp_path, ["one", "two"], EpisodeLimits(max_turns=2), TALKING)
    assert cut.end == "turns" and cut.result is not None and cut.result.reward == 2


def test_an_episode_ends_at_its_limits(tmp_path: Path) -> None:
    whole, _ = play_scripted_episode(tmp_path, [format_call("add")] * 9, EpisodeLimits(max_turns=3))
    assert (whole.end, len(whole.turns)) == ("turns", 3)
    assert whole.result is not None and whole.result.reward == 3
    turn_tokens = len(whole.turns[0].written.ids)
    # no room for a third turn; no room for a complete second turn
    for limit, end in ((whole.num_response_tokens - turn_tokens, "tokens"),
                       (whole.num_response_tokens - 2 * turn_tokens - 1, "unended")):
        episode, _ = play_scripted_episode(tmp_path, [format_call("add")] * 9,
                                           EpisodeLimits(max_response_tokens=limit))
        assert (episode.end, len(episode.turns)) == (end, 2)
        assert whole.ids[:len(episode.ids)] == episode.ids
        assert episode.num_response_tokens <= limit and episode.result is not None
        assert episode.result.reward == (2 if end == "tokens" else 1)
