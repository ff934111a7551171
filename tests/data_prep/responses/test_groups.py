"""`sov-data groups` and `sov-data pairs`."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from data_prep.cli import main
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.train.data.sources import open_sources


def write(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return path


COUNTS = {"num_groups": 1, "num_responses": 3, "num_equal_rewards": 1, "num_alone": 1, "num_unfinished": 0,
          "num_passed_over": 0}
"""Manifest counts for a written group of 3 responses, a group with equal rewards, and a single response."""


def build_group(*rewards: Any, prompt: Any = "2 + 2?") -> dict[str, Any]:
    """Return a prompt with one response for each reward."""
    return {"prompt": prompt, "responses": [{"content": f"answer {i}", "reward": r}
                                            for i, r in enumerate(rewards)]}


def run_step(step: str, file: Path, *more: str) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Run `sov-data groups` or `pairs`; return its output rows, and the counts in its manifest."""
    folder = file.parent / "-".join([step, *more])
    assert main([step, "--input", str(file), "--output", str(folder), *more]) == 0
    rows = [json.loads(row) for row in (folder / f"{step}.jsonl").read_text().splitlines()]
    return rows, read_manifest(folder, "corpus").content["groups"]


def test_each_response_becomes_a_chat_with_advantage(tmp_path: Path, capsys) -> None:
    judged = {"prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}],
              "tools": [], "responses": [
                  {"content": "So.", "rewards": {"rule": 1, "rubric": 0.5}},
                  {"messages": [{"role": "assistant", "content": "Hm."}], "rewards": {"rule": 0}},
                  {"content": "Because.", "reward": 1.0}]}
    file = write(tmp_path / "in.jsonl", judged, build_group(0.5, 0.5), build_group(1))
    chats, counted = run_step("groups", file)
    assert [c["messages"][-1]["content"] for c in chats] == ["So.", "Hm.", "Because."]
    assert {len(c["messages"]) for c in chats} == {3}
    assert all(c["tools"] == [] for c in chats)
    # rewards of 1.5, 0 and 1, scaled to the range from -1 to 1
    assert [c["advantage"] for c in chats] == pytest.approx([1.0, -1.0, 1 / 3])
    assert [c["group_share"] for c in chats] == pytest.approx([1 / 3] * 3)
    assert counted == COUNTS
    assert ("6 responses read: 3 written, 3 set aside (2 equal rewards, 1 only response to its prompt)\n"
            in capsys.readouterr().out)


def test_packed_groups_learn_responses_only(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Welcome back."},
             {"role": "user", "content": "2 + 2?"}]
    file = write(tmp_path / "in.jsonl", build_group(1, 0, prompt=turns) | {"id": "q7"},
                 build_group(0, 1) | {"id": 8})
    run_step("groups", file)
    assert main(["pack", "--tokenizer", str(tokenizers["solar-open"]), "--format", "chat", "--heldout", "0",
                 "--column", "advantage", "--column", "group_share", "--workers", "1",
                 "--input", str(tmp_path / "groups/groups.jsonl"), "--output", str(tmp_path / "packed")]) == 0
    tokenizer = Tokenizer.from_file(str(tmp_path / "packed/tokenizer/tokenizer.json"))
    [source] = open_sources({str(tmp_path / "packed"): 1.0}, 10**6)
    documents = source.open_split("train")
    learned = [tokenizer.decode(documents.tokens(d, 0, n)[documents.loss_weights(d, 0, n) > 0].tolist())
               for d, n in enumerate(documents.lengths)]
    assert ["answer" in text for text in learned] == [True] * 4
    assert not any("Welcome" in text for text in learned)


@pytest.mark.each(("record", "message"), [
    ("[1]", "in.jsonl:1: is a JSON list"),
    (build_group(1, 0, prompt=3), "in.jsonl:1: prompt"),
    (build_group(1, "good"), "responses[1]: reward is 'good', must be a finite number"),
    ('{"prompt": "a", "responses": [{"content": "b", "reward": NaN}]}', "reward is 'nan'"),
    ({"prompt": "a", "responses": [{"content": "b"}]}, "needs either a number 'reward'"),
    ({"prompt": "a", "responses": [{"messages": [{"role": "user", "content": "x"}], "reward": 1}]},
     "no message of the assistant"),
    (build_group(1, 0, prompt="\ud800"), "in.jsonl:1: holds half of a surrogate pair"),
    (build_group(1, 0) | {"advantage": 3}, "has 'advantage', which this step writes"),
    (build_group(1, 1), "no group has two responses with different rewards (1 with equal rewards"),
])
def test_invalid_groups_are_named_and_write_no_output(record: Any, message: str, tmp_path: Path,
                                                      get_refusal: Any) -> None:
    file = write(tmp_path / "in.jsonl", record)
    assert message in get_refusal("groups", "--input", str(file), "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_rewards_are_summed_exactly(tmp_path: Path) -> None:
    """Sums that differ only by rounding of floats are equal rewards."""
    parts = ({"a": 0.1, "b": 0.2, "c": 0.3}, {"c": 0.3, "b": 0.2, "a": 0.1}, {"a": 0.6})
    judged = {"prompt": "p", "responses": [{"content": f"answer {i}", "rewards": rewards}
                                           for i, rewards in enumerate(parts)]}
    file = write(tmp_path / "in.jsonl", judged, build_group(0.1 + 0.2, 0.3), build_group(1, 0))
    for step in ("pairs", "groups"):
        _, counted = run_step(step, file)
        assert (counted["num_groups"], counted["num_equal_rewards"]) == (1, 2)


def format_scored_line(prompt: str, response: str, reward: float | None, **more: Any) -> dict[str, Any]:
    """Return a line as `megatron-sov score` writes it."""
    return {"prompt": prompt, "response": response, "reward": reward, "status": "scored", **more}


def test_scored_lines_become_groups_and_pairs(tmp_path: Path, capsys) -> None:
    scored = [format_scored_line("a", "so", 0.5, answer="7"), format_scored_line("a", "best", 1.0),
              format_scored_line("a", "bad", -1),
              format_scored_line("a", " ", -2), format_scored_line("a", "late", None),
              format_scored_line("b", "same", 1), format_scored_line("b", "other", 1),
              format_scored_line("c", "alone", 1)]
    file = write(tmp_path / "in.jsonl", *scored)
    pairs, counted = run_step("pairs", file)
    assert pairs == [
        {"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "best"}],
         "rejected": [{"role": "assistant", "content": "bad"}]}]
    assert counted == COUNTS
    assert ("8 responses read: 2 written, 6 set aside (2 equal rewards, 1 neither best nor worst, "
            "1 no reward, 1 no text, 1 only response to its prompt)\n") in capsys.readouterr().out
    assert [chat["advantage"] for chat in run_step("groups", file)[0]] == [0.5, 1.0, -1.0]


def test_equal_texts_with_two_rewards_give_no_pair(tmp_path: Path) -> None:
    """Two different token sequences may decode to the same text, and have different rewards."""
    file = write(tmp_path / "in.jsonl", format_scored_line("a", "x", 1), format_scored_line("a", "x", 0),
                 format_scored_line("b", "x", 1), format_scored_line("b", "y", 0))
    assert len(run_step("pairs", file)[0]) == 1


def test_a_truncated_response_is_never_preferred(tmp_path: Path, capsys) -> None:
    scored = [format_scored_line("a", "cut but best", 1, finish_reason="length"),
              format_scored_line("a", "whole", 0.5, finish_reason="stop"),
              format_scored_line("a", "cut", 0, finish_reason="length"),
              format_scored_line("b", "all cut", 1, finish_reason="length"),
              format_scored_line("b", "too", 0, finish_reason="length"),
              format_scored_line("c", "as good but cut", 1, finish_reason="length"),
              format_scored_line("c", "whole", 1),
              format_scored_line("c", "no", 0)]
    file = write(tmp_path / "in.jsonl", *scored)

    def list_pairs(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
        """Return the chosen and the rejected response of each pair."""
        return [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]

    rows, counted = run_step("pairs", file)
    assert list_pairs(rows) == [("whole", "cut"), ("whole", "no")]
    assert (counted["num_groups"], counted["num_unfinished"], counted["num_passed_over"]) == (3, 5, 2)
    assert ("3 groups of 2.7 responses, of which 5 did not end\n8 responses read: 4 written, 4 set aside "
            "(4 did not end)\n") in capsys.readouterr().out
    rows, counted = run_step("pairs", file, "--keep-unfinished")
    assert list_pairs(rows) == [("cut but best", "cut"), ("all cut", "too"), ("as good but cut", "no")]
    assert (counted["num_unfinished"], counted["num_passed_over"]) == (5, 0)

    # a truncated response counts in the mean reward of its group, but is learned only with a negative
    # advantage
    rows, counted = run_step("groups", file)
    learned = [(row["messages"][-1]["content"], row["advantage"], round(1 / row["group_share"]))
               for row in rows]
    assert learned == [("whole", 0.0, 3), ("cut", -1.0, 3), ("too", -1.0, 2), ("whole", 1.0, 3),
                       ("no", -1.0, 3)]
    assert (counted["num_responses"], counted["num_passed_over"]) == (8, 3)
    assert len(run_step("groups", file, "--keep-unfinished")[0]) == 8


@pytest.mark.each(("judged", "shown"), [
    ({"label": None}, "null"), ({"label": "good"}, '"good"'), ({"label": ""}, '""'),
    ({"label": 2}, "2"), ({"label": 0.5}, "0.5"), ({"label": []}, "[]"),
    ({"label": {"a": 1}}, '{"a": 1}'), ({"label": "좋음"}, '"좋음"'), ({"kto_tag": None}, "null"),
    ({"kto_tag": "so"}, '"so"'), ({}, "missing")])
def test_other_labels_are_refused(judged: dict[str, Any], shown: str, tmp_path: Path, capsys: Any) -> None:
    file = write(tmp_path / "in.jsonl", {"prompt": "a", "response": "x", "label": True},
                 {"prompt": "a", "response": "y", **judged})
    assert main(["pairs", "--input", str(file), "--output", str(tmp_path / "out")]) == 2
    assert (f"in.jsonl:2: the label ('label' or 'kto_tag') of the response is {shown}, must be one of true, "
            "false") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.each("name", ["label", "kto_tag"])
@pytest.mark.each(("good", "bad"), [
    (True, False), (1, 0), (1.0, 0.0), ("true", "false"), ("True", "FALSE"), ("yes", "no"), ("Yes", " no "),
    ("1", "0"), ("1.0", 0)])
def test_labelled_responses_become_pairs(good: Any, bad: Any, name: str, tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "a"}]
    better, worse = ([{"role": "assistant", "content": text}] for text in ("a1", "a2"))
    file = write(tmp_path / "in.jsonl", {"prompt": prompt, "completion": worse, name: bad},
                 {"prompt": prompt, "completion": "a1", name: good})
    assert run_step("pairs", file)[0] == [{"prompt": prompt, "chosen": better, "rejected": worse}]
