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
        "num_groups": 1, "num_responses": 3, "num_equal_rewards": 1, "num_alone": 1}
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
