"""The generator of goals, against scripted models."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.typed_words import keys_of

sys.path += [str(Path(__file__).parents[5] / "benchmarks"), str(Path(__file__).parents[2])]
from scripted import ScriptedAsk, samples_of

from data_prep.synth.generator import GeneratorItem
from data_prep.synth.generators.tools.goals import Goals, GoalSettings, reference_of
from megatron_sov.base.errors import UserError
from megatron_sov.judge.tools.worlds.virtual import Virtual
from tests.data_prep.synth.models import goals, shops

ITEM = GeneratorItem("shop-0", {"domain": "library", "world": shops.world(0)})
UNSOLVED = GoalSettings(tasks_per_world=1, num_solvers=0)
WHATS = {"call that is refused": "reachable goal", "nothing to do": "goal not reached yet",
         "answer that no result gives": "answers from tools",
         "answer that the question gives away": "answers from tools",
         "call with what nobody told": "question tells enough", "names the tools": "question names no tools",
         "too few calls": "number of calls", "no JSON": "form", "more fields than asked for": "form"}
"""Planted fault -> the check that sees it, without a solver."""


def test_a_world_becomes_tasks_that_play_and_are_not_done_yet() -> None:
    samples = samples_of(Goals(GoalSettings(tasks_per_world=3, num_solvers=0)), ITEM, goals.reply)
    assert [sample.reason for sample in samples] == ["", "", ""]
    assert [sample.notes["changes"] for sample in samples] == [1, 1, 0]
    for sample in samples:
        world = Virtual()
        world.reset(sample.record)
        assert world.score("").reward == 0
        for call in sample.record["goal"]["calls"]:
            world.call(call["name"], call["arguments"])
        assert world.score("The answer: " + " ".join(sample.record["goal"]["answers"])).reward == 1


@pytest.mark.parametrize("what", WHATS)
def test_a_task_with_a_planted_fault_is_not_kept(what: str) -> None:
    case = goals.planted(what)
    sample, = samples_of(Goals(UNSOLVED), case.item, case.replies)
    assert sample.reason == WHATS[what], sample.verdicts


def test_a_question_of_something_else_is_seen_by_those_who_try_it() -> None:
    """What the question says is another goal than that of the calls: no rule sees it, a solver does."""
    settings = GoalSettings(tasks_per_world=1, num_solvers=1)
    case = goals.planted("question of something else")
    bad, = samples_of(Goals(settings), case.item, case.replies)
    good, = samples_of(Goals(settings), ITEM, goals.reply)
    assert (bad.reason, good.reason) == ("solved", "")
    assert (bad.notes["solved"], good.notes["solved"], good.notes["solvers"]) == (0, 1, 1)


def test_the_same_goal_twice_is_kept_once_and_later_questions_know_the_earlier() -> None:
    first = goals._bent(lambda draft: draft, 0)
    ask = ScriptedAsk(lambda request: first({**request, "messages": [*request["messages"][:-1], {
        "role": "user", "content": request["messages"][-1]["content"].replace("number 2", "number 1")}]}),
        generator=Goals)
    one, two = Goals(GoalSettings(tasks_per_world=2, num_solvers=0)).make(ITEM, ask)
    assert (one.reason, two.reason) == ("", "unlike the others")
    assert f"- {one.record['question']}" in ask.requests[1]["messages"][-1]["content"]


def task(*calls: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {"question": "?", "world": Virtual.EXAMPLES[0]["world"], "goal": {"answers": [], "calls": [
        {"name": name, "arguments": arguments} for name, arguments in calls]}}


def test_a_changing_call_that_the_goal_does_not_need_is_idle() -> None:
    extended = ("extend_loan", {"loan_id": "L1", "due": "2026-07-01"})
    later = ("extend_loan", {"loan_id": "L1", "due": "2026-07-09"})
    assert reference_of(task(extended, later)).done_by == "the goal is reached without call 1 (extend_loan)"
    assert reference_of(task(later)).done_by == ""


@pytest.mark.parametrize("record, told", [
    ({"domain": "x"}, "has no 'world'"), ({"world": {"name": "x"}}, "is not sound: world: rules is")])
def test_an_input_that_is_none_is_told(tmp_path: Path, record: dict[str, Any], told: str) -> None:
    file = tmp_path / "worlds.jsonl"
    file.write_text(json.dumps(record))
    with pytest.raises(UserError, match=told):
        list(Goals(GoalSettings()).items([file]))


def test_a_finished_synthesis_is_an_input_and_its_origin_goes_on(tmp_path: Path) -> None:
    kept = {"id": "w/0", "domain": "a library", "world": shops.world(0),
            "synthetic": {"source": "domains", "licence": "CC0-1.0"}}
    (tmp_path / "kept.jsonl").write_text(json.dumps(kept))
    item, = Goals(GoalSettings()).items([tmp_path])
    assert (item.id, item.source, item.licence, set(item.fields)) == (
        "w/0", "domains", "CC0-1.0", {"domain", "world"})


def test_all_settings_that_make_no_sense_are_told() -> None:
    assert keys_of(GoalSettings()) == []
    assert keys_of(GoalSettings(tasks_per_world=0, language="")) == ["tasks_per_world", "language"]
    assert keys_of(GoalSettings(min_calls=4, max_calls=3, num_solvers=1, min_solved=2)) == [
        "min_calls", "min_solved"]
