"""Judged responses stand beside a response to another prompt, with what was said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main
from megatron_sov.artifacts import read_manifest
from megatron_sov.documents import Reading, read_documents


def made(folder: Path, rows: list[dict[str, Any]], *more: str) -> list[dict[str, Any]]:
    """Return what the command writes for lines."""
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["unpaired", "--input", str(folder / "in.jsonl"), "--output", str(folder / "out"), *more,
                 "--overwrite"]) == 0
    return [json.loads(row) for row in (folder / "out/unpaired.jsonl").read_text().splitlines()]


def said(row: dict[str, Any]) -> tuple[str, str, str, float]:
    """Return prompt, response, mismatched response and whether it is a good one."""
    assert row["desirable"][0] == row["desirable"][1]
    return (row["prompt"][0]["content"], row["chosen"][0]["content"], row["rejected"][0]["content"],
            row["desirable"][0])


def test_each_response_is_beside_one_to_another_prompt(tmp_path: Path) -> None:
    rows = made(tmp_path, [
        {"prompt": "a", "response": "a1", "label": True}, {"prompt": "a", "response": "a2", "label": False},
        {"prompt": "b", "response": "b1", "label": True},
        {"prompt": "c", "responses": [{"content": "c1", "reward": 0.5}, {"content": "c2", "reward": 0.49}]}])
    assert list(map(said, rows)) == [("b", "b1", "a1", 1.0), ("c", "c1", "b1", 1.0), ("c", "c2", "b1", 0.0),
                                     ("a", "a1", "c1", 1.0), ("a", "a2", "c2", 0.0)]
    assert read_manifest(tmp_path / "out", "corpus").content["responses"] == {
        "num_good": 3, "num_bad": 2, "num_passed_over": 0}


@pytest.mark.parametrize("in_lines", [True, False])
def test_mismatched_responses_are_the_matched_ones(in_lines: bool, tmp_path: Path) -> None:
    """Of pairs, the good response first, the last of each prompt alone would be the bad ones."""
    rows = made(tmp_path, [line for p in "abc" for line in (
        [{"prompt": p, "response": p + sign, "label": sign == "+"} for sign in "+-"] if in_lines else
        [{"prompt": p, "responses": [{"content": p + sign, "reward": int(sign == "+")} for sign in "+-"]}])])
    matched, mismatched = ({said(row)[place] for row in rows} for place in (1, 2))
    assert matched == mismatched == {p + sign for p in "abc" for sign in "+-"}


def test_short_answers_may_be_the_same_to_two_prompts(tmp_path: Path) -> None:
    made(tmp_path, [{"prompt": p, "completion": "Yes.", "label": p == "a"} for p in "ab"])
    reading = Reading("preference", columns=("desirable",))
    found = list(read_documents([tmp_path / "out/unpaired.jsonl"], reading))
    assert [d.chosen == d.rejected for d in found] == [True, True]


def test_a_prompt_that_comes_again_is_no_other_one(tmp_path: Path) -> None:
    rows = made(tmp_path, [{"prompt": p, "responses": [{"content": f"{p}{i}", "reward": i % 2}]}
                           for i, p in enumerate("aabba")])
    assert all(row["rejected"][0]["content"][0] != row["prompt"][0]["content"] for row in rows)
    assert len(rows) == 5


def test_a_good_one_that_did_not_end_is_left_out_unless_asked_for(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "response": "cut", "reward": 1, "finish_reason": "length"},
             {"prompt": "b", "response": "cut and bad", "reward": 0, "finish_reason": "length"},
             {"prompt": "c", "response": "whole", "reward": 1, "finish_reason": "stop"}]
    assert [said(row)[1] for row in made(tmp_path, lines)] == ["cut and bad", "whole"]
    assert len(made(tmp_path, lines, "--keep-unfinished")) == 3


@pytest.mark.parametrize(("lines", "sentence"), [
    ([{"prompt": "a", "response": "x", "label": True}, {"prompt": "a", "response": "y", "label": False}],
     "all responses are to one prompt"),
    ([{"prompt": "a", "response": "x", "label": True}, {"prompt": "b", "response": "y", "label": True}],
     "2 responses are good"),
    ([{"prompt": "a", "response": "x", "label": "yes"}], "are to one prompt, or there are none"),
])
def test_what_nothing_can_be_learned_from_is_refused(lines: list[Any], sentence: str, tmp_path: Path,
                                                     capsys: Any) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["unpaired", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("good", [True, 1])
def test_rows_of_kto_are_judged_responses(good: bool | int, tmp_path: Path) -> None:
    say = [{"role": "assistant", "content": "b1"}]
    rows = made(tmp_path, [{"prompt": "a", "completion": "a1", "label": good},
                           {"prompt": [{"role": "user", "content": "b"}], "completion": say,
                            "label": not good}])
    assert sorted(map(said, rows)) == [("a", "a1", "b1", 1.0), ("b", "b1", "a1", 0.0)]
