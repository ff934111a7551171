"""Worlds tried out by drawn calls."""

from __future__ import annotations

import copy

from data_prep.synth.generators.tools.draws import Draws
from data_prep.synth.generators.tools.worlds import DAYS, places_of, tried, values_of
from megatron_sov.judge.tools.virtual.spec import spec_of
from megatron_sov.judge.tools.worlds.virtual import Virtual

LIBRARY = Virtual.EXAMPLES[0]["world"]


def test_a_sound_world_comes_through_and_the_same_name_makes_the_same_calls() -> None:
    trial = tried(LIBRARY, "x", 20)
    assert trial.lies == [] and trial.num_calls == 20 * 5
    assert set(trial.successes) == {tool["name"] for tool in LIBRARY["tools"]}
    assert set(trial.changes) == {"borrow_book", "extend_loan", "return_book"}
    assert tried(LIBRARY, "x", 20) == trial != tried(LIBRARY, "y", 20)


def test_arguments_that_fit_are_read_from_the_steps() -> None:
    spec = spec_of(LIBRARY)
    fitting = values_of(spec, places_of(spec.tools["borrow_book"]), spec.first_tables())
    assert fitting["member_id"] == ["M1", "M2"] and fitting["book_id"] == ["B1", "B2", "B3"]
    assert set(DAYS) < set(fitting["due"])
    found = values_of(spec, places_of(spec.tools["find_books"]), spec.first_tables())
    assert "Four Reigns" in found["title"]


def test_a_tool_that_cannot_do_what_its_schema_allows_is_told_with_the_call() -> None:
    bent = copy.deepcopy(LIBRARY)
    bent["tools"][2]["does"].pop(2)  # nothing asks any more whether `due` is a day
    bent["tools"][2]["does"][-1] = {"return": {"loan_id": "loan.id", "due": "text(days('2026-01-01', due))"}}
    lies = tried(bent, "x", 40).lies
    assert len(lies) == 1 and lies[0].startswith("tool borrow_book: its schema allows {")
    assert "is no day written YYYY-MM-DD" in lies[0]


def test_draws_follow_from_their_names_and_are_even() -> None:
    draws, again = Draws("a", 1), Draws("a", 1)
    drawn = [draws.below(4) for _ in range(400)]
    assert drawn == [again.below(4) for _ in range(400)] != [Draws("a", 2).below(4) for _ in range(400)]
    assert all(70 < drawn.count(value) < 130 for value in range(4))
