"""Generators `answers` and `comparisons`: shares of right answers, and pairs in both orders."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))
from planted_cases import generator, samples_of, wrongly_judged

from data_prep.synth.generator import GeneratorItem
from megatron_sov.base.errors import UserError


def test_right_answers_are_counted_and_all_else_is_wrong() -> None:
    said: list[Any] = ["\\boxed{7}", "It is 7.", {"content": "\\boxed{7}", "finish_reason": "length"},
                       "So \\boxed{8}", "\\boxed{7}"]
    left = list(said)
    item = GeneratorItem("p", {"problem": "3 + 4?", "answer": "7", "choices": [], "domain": "sums"})
    (sample,) = samples_of(generator("answers", num_draws=5), item, lambda request: left.pop(0))
    assert sample.record == {"prompt": "3 + 4?", "answer": "7", "domain": "sums", "problem_id": "p",
                             "num_right": 2, "num_answers": 5}


def test_a_draw_that_is_of_no_use_is_a_wrong_answer_and_loses_nothing() -> None:
    """A model that says nothing, or goes round in a loop, half of the time is right half of the time: another
    draw in the place of such a one would make it as good as one that is always right."""
    asked: list[int] = []

    def replies(request: Any) -> str:
        asked.append(request["seed"])
        return ("", "\\boxed{7}", "again, " * 60, "\\boxed{7}")[len(asked) % 4]

    item = GeneratorItem("p", {"problem": "3 + 4?", "answer": "7", "choices": [], "domain": ""})
    (sample,) = samples_of(generator("answers", num_draws=4), item, replies)
    assert (sample.record["num_right"], sample.record["num_answers"], len(asked)) == (2, 4, 4)
    (none,) = samples_of(generator("answers", num_draws=2), item, lambda request: "")
    assert none.record["num_right"] == 0


def test_planted_judges_are_told_apart() -> None:
    assert wrongly_judged("comparisons") == []


def test_pairs_name_the_easier_problem() -> None:
    grade = {"easy?": {"first": 9.0, "second": 1.0}}

    def replies(request: Any) -> str:
        text = request["messages"][-1]["content"]
        return json.dumps({"score": grade["easy?"]["first" if text.index("easy?") < text.index("hard?")
                                                  else "second"]})

    item = GeneratorItem("pair", {"first_id": "e", "first": "easy?", "second_id": "h", "second": "hard?"})
    (sample,) = samples_of(generator("comparisons"), item, replies)
    assert sample.reason == "" and (sample.record["easier"], sample.record["harder"]) == ("e", "h")
    assert sample.record["lead"] == 4.0


def test_each_problem_meets_its_share_of_others(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"id": f"p{i}", "problem": f"{i}?"}) + "\n" for i in range(12)))
    items = list(generator("comparisons", per_problem=4).items([file]))
    pairs = {frozenset((item.fields["first_id"], item.fields["second_id"])) for item in items}
    assert len(pairs) == len(items) == 24 and all(len(pair) == 2 for pair in pairs)
    assert all(sum(f"p{i}" in pair for pair in pairs) == 4 for i in range(12))
    file.write_text('{"problem": "alone?"}\n')
    with pytest.raises(UserError, match="pairs need two"):
        list(generator("comparisons").items([file]))


def test_two_problems_make_one_pair(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"problem": "a?"}\n{"problem": "b?"}\n')
    assert len(list(generator("comparisons").items([tmp_path / "in.jsonl"]))) == 1
