"""The generator of worlds, against scripted models, and worlds tried out by drawn calls."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from data_prep.synth.generators.drawing import Draws
from data_prep.synth.generators.tools.worlds import fitting_values, tried
from megatron_sov.judge.tools.worlds.virtual import Virtual, world_of
from tests.typed_words import keys_of

sys.path += [str(Path(__file__).parents[5] / "benchmarks"), str(Path(__file__).parents[2])]
from scripted import ScriptedAsk, samples_of

from data_prep.synth.generator import GeneratorItem
from data_prep.synth.generators.tools.worlds import Worlds, WorldSettings
from megatron_sov.base.errors import UserError
from tests.data_prep.synth.models import shops, worlds

ITEM = GeneratorItem("library-1", {"domain": "a library", "number": 1})
FEW = WorldSettings(calls_per_tool=8)
WHATS = {"row of another type": "honest types", "argument that nothing uses": "honest types",
         "fails for arguments that it allows": "honest types", "differs from call to call": "honest types",
         "never comes through": "every tool comes through", "two tools alike": "distinct tools",
         "too few tools": "size", "program that may not run": "sound", "no tools at all": "sound"}
"""Planted fault -> the check that sees it."""


def test_a_domain_becomes_a_world_that_can_be_played() -> None:
    sample, = samples_of(Worlds(FEW), ITEM, worlds.reply)
    assert sample.reason == "" and sample.notes == {"repairs": 0}
    world = Virtual()
    world.reset({"question": "?", "world": sample.record["world"], "goal": {}})
    assert world.call("find_member", {"email": "mina@example.com"})["name"]


@pytest.mark.parametrize("what", WHATS)
def test_a_world_with_a_planted_fault_is_not_kept(what: str) -> None:
    case = worlds.planted(what)
    sample, = samples_of(Worlds(FEW), case.item, case.replies)
    assert sample.reason == WHATS[what], sample.verdicts


def test_a_model_that_is_told_what_is_wrong_may_mend_it() -> None:
    bent = worlds.BENT["row of another type"]
    told: list[str] = []

    def reply(request: Mapping[str, Any]) -> str:
        if "You mend" in request["messages"][0]["content"]:
            told.append(request["messages"][-1]["content"])
            return "Here it is:\n```json\n" + json.dumps(shops.world(10)) + "\n```"
        return worlds.answer(request, bent)

    sample, = samples_of(Worlds(FEW), ITEM, reply)
    assert sample.reason == "" and sample.notes == {"repairs": 1}
    assert "- tool make_loan: its types allow" in told[0] and len(told) == 1


@pytest.mark.parametrize("text, reason", [
    ("I cannot do that.", "form"), ("[1, 2]", "form"), ("".join(f'{{"k{i}": ' for i in range(3000)), "form"),
    ('{"name": NaN}', "form"),
    ('{"name": "x", "tables": {"a": 3}}', "sound")])
def test_an_answer_that_is_no_world_is_a_rejected_sample_and_no_error(text: str, reason: str) -> None:
    sample, = samples_of(Worlds(FEW), ITEM, lambda request: text)
    assert sample.reason == reason


def test_each_domain_is_as_many_items_as_are_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "domains.jsonl"
    file.write_text('{"domain": "a library", "language": "Korean"}\n{"id": "b/2", "domain": "a bakery"}\n')
    items = list(Worlds(WorldSettings(worlds_per_domain=2)).items([file]))
    assert [item.id[-4:] for item in items][2:] == ["/2-1", "/2-2"]
    assert items[0].fields == {"domain": "a library", "language": "Korean", "number": 1}
    ask = ScriptedAsk(worlds.reply, generator=Worlds)
    list(Worlds(FEW).make(items[0], ask))
    assert "are in Korean." in ask.requests[0]["messages"][-1]["content"]


@pytest.mark.parametrize("line, told", [
    ('{"name": "a library"}', "domains.jsonl:1: has no 'domain'; each line is"),
    ("library", "is not valid JSON"),
    ('{"id": "a", "domain": "x"}\n{"id": "a", "domain": "y"}', "domains.jsonl:2: has the id 'a'")])
def test_an_input_that_is_none_is_told(tmp_path: Path, line: str, told: str) -> None:
    file = tmp_path / "domains.jsonl"
    file.write_text(line)
    with pytest.raises(UserError, match=told):
        list(Worlds(WorldSettings()).items([file]))


def test_all_settings_that_make_no_sense_are_told() -> None:
    wrong = WorldSettings(worlds_per_domain=0, calls_per_tool=0, temperature=3)
    assert len(keys_of(wrong)) == 3 and keys_of(WorldSettings()) == []
    assert keys_of(WorldSettings(language=" ")) == ["language"]


LIBRARY = Virtual.EXAMPLES[0]["world"]


def test_a_sound_world_comes_through_and_the_same_name_makes_the_same_calls() -> None:
    trial = tried(LIBRARY, "x", 8)
    assert trial.lies == [] and trial.num_calls > 5 * 8
    assert set(trial.successes) == {call["name"] for call in LIBRARY["examples"]}
    assert set(trial.changes) == {"borrow_book", "extend_loan", "return_book"}
    assert tried(LIBRARY, "x", 8) == trial != tried(LIBRARY, "y", 8)


def test_arguments_that_fit_stand_where_those_of_the_examples_do() -> None:
    spec = world_of(LIBRARY)
    tables = spec.first_tables()
    assert fitting_values(spec, "borrow_book", "member_id", tables) == ["M1", "M2"]
    assert fitting_values(spec, "borrow_book", "book_id", tables) == ["B3", "B1", "B2"]
    assert fitting_values(spec, "borrow_book", "note", tables) == []


def test_a_tool_that_cannot_do_what_its_types_allow_is_told_with_the_call() -> None:
    code = LIBRARY["code"].replace("    except ValueError:", "    except KeyError:")
    assert code != LIBRARY["code"]
    lies = tried({**LIBRARY, "code": code}, "x", 20).lies
    assert {lie.partition(": its types")[0] for lie in lies} == {"tool borrow_book", "tool extend_loan"}
    assert "ValueError: Invalid isoformat string" in lies[0]


def test_draws_follow_from_their_names_and_are_even() -> None:
    draws, again = Draws("a", 1), Draws("a", 1)
    drawn = [draws.below(4) for _ in range(400)]
    assert drawn == [again.below(4) for _ in range(400)] != [Draws("a", 2).below(4) for _ in range(400)]
    assert all(70 < drawn.count(value) < 130 for value in range(4))
