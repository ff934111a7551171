"""The best and the worst of a group become a pair, from groups or from scored lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.cli import main
from megatron_sov.artifacts import read_manifest


def line(prompt: str, response: str, reward: float | None, **more: Any) -> dict[str, Any]:
    """Return a line as `megatron-sov score` writes it."""
    return {"prompt": prompt, "response": response, "reward": reward, "status": "scored", **more}


def test_the_lines_of_one_prompt_are_a_group_and_its_best_and_worst_a_pair(tmp_path: Path, capsys) -> None:
    scored = [line("a", "so", 0.5, answer="7"), line("a", "best", 1.0), line("a", "bad", -1),
              line("a", " ", -2), line("a", "late", None),
              line("b", "same", 1), line("b", "other", 1), line("c", "alone", 1)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, scored)))
    assert main(["pairs", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out")]) == 0
    assert [json.loads(row) for row in (tmp_path / "out/pairs.jsonl").read_text().splitlines()] == [
        {"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "best"}],
         "rejected": [{"role": "assistant", "content": "bad"}]}]
    assert read_manifest(tmp_path / "out", "corpus").content["groups"] == {
        "num_groups": 1, "num_responses": 3, "num_equal_rewards": 1, "num_alone": 1,
        "num_unfinished": 0, "num_passed_over": 0}
    assert "1 with equal rewards and 1 of one response" in capsys.readouterr().out
    assert main(["groups", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "groups")]) == 0
    chats = [json.loads(row) for row in (tmp_path / "groups/groups.jsonl").read_text().splitlines()]
    assert [chat["advantage"] for chat in chats] == [0.5, 1.0, -1.0]


def test_one_text_with_two_rewards_is_no_pair(tmp_path: Path) -> None:
    """As two rows of tokens may stand for one text, and be judged by their number."""
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, [
        line("a", "x", 1), line("a", "x", 0), line("b", "x", 1), line("b", "y", 0)])))
    assert main(["pairs", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out")]) == 0
    assert len((tmp_path / "out/pairs.jsonl").read_text().splitlines()) == 1


def test_an_answer_that_was_cut_off_may_be_the_worse_one_and_never_the_better(tmp_path: Path, capsys) -> None:
    scored = [line("a", "cut but best", 1, finish_reason="length"),
              line("a", "whole", 0.5, finish_reason="stop"), line("a", "cut", 0, finish_reason="length"),
              line("b", "all cut", 1, finish_reason="length"), line("b", "too", 0, finish_reason="length"),
              line("c", "as good but cut", 1, finish_reason="length"), line("c", "whole", 1),
              line("c", "no", 0)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, scored)))

    def paired(step: str, *more: str) -> tuple[list[dict[str, Any]], dict[str, int]]:
        folder = tmp_path / "-".join([step, *more])
        assert main([step, "--input", str(tmp_path / "in.jsonl"), "--output", str(folder), *more]) == 0
        rows = [json.loads(row) for row in (folder / f"{step}.jsonl").read_text().splitlines()]
        return rows, read_manifest(folder, "corpus").content["groups"]

    def texts(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
        return [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]

    rows, counted = paired("pairs")
    assert texts(rows) == [("whole", "cut"), ("whole", "no")]
    assert (counted["num_groups"], counted["num_unfinished"], counted["num_passed_over"]) == (3, 5, 2)
    assert "5 of 8 responses did not end; 2 of them would have been learned" in capsys.readouterr().out
    rows, counted = paired("pairs", "--keep-unfinished")
    assert texts(rows) == [("cut but best", "cut"), ("all cut", "too"), ("as good but cut", "no")]
    assert (counted["num_unfinished"], counted["num_passed_over"]) == (5, 0)

    # in a group its reward has its place, and its text is learned where it is a bad one only
    rows, counted = paired("groups")
    assert [(row["messages"][-1]["content"], row["advantage"], round(1 / row["group_share"]))
            for row in rows] == [("whole", 0.0, 3), ("cut", -1.0, 3), ("too", -1.0, 2), ("whole", 1.0, 3),
                                 ("no", -1.0, 3)]
    assert (counted["num_responses"], counted["num_passed_over"]) == (8, 3)
    assert len(paired("groups", "--keep-unfinished")[0]) == 8


def test_where_every_better_answer_was_cut_off_the_user_is_told(tmp_path: Path, capsys) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, [
        line("b", "cut", 1, finish_reason="length"), line("b", "whole", 0, finish_reason="stop")])))
    assert main(["pairs", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "no response that is better than another one of its group ended (1 of 2 have" in said
    assert "--max-new-tokens" in said and not (tmp_path / "out").exists()
