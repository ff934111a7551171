"""Groups of judged responses become chats with an advantage each; what says nothing is left out."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from data_prep.cli import main
from megatron_sov.artifacts import read_manifest
from megatron_sov.data.token_shards import open_sources


def write(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return path


def group(*rewards: Any, prompt: Any = "2 + 2?") -> dict[str, Any]:
    return {"prompt": prompt, "responses": [{"content": f"answer {i}", "reward": r}
                                            for i, r in enumerate(rewards)]}


def test_each_response_is_a_chat_with_its_place_in_the_group(tmp_path: Path, capsys) -> None:
    judged = {"prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}],
              "tools": [], "responses": [
                  {"content": "So.", "rewards": {"rule": 1, "rubric": 0.5}},
                  {"messages": [{"role": "assistant", "content": "Hm."}], "rewards": {"rule": 0}},
                  {"content": "Because.", "reward": 1.0}]}
    file = write(tmp_path / "in.jsonl", judged, group(0.5, 0.5), group(1))
    assert main(["groups", "--input", str(file), "--output", str(tmp_path / "out")]) == 0
    chats = [json.loads(line) for line in (tmp_path / "out/groups.jsonl").read_text().splitlines()]
    assert [c["messages"][-1]["content"] for c in chats] == ["So.", "Hm.", "Because."]
    assert {len(c["messages"]) for c in chats} == {3}
    assert all(c["tools"] == [] for c in chats)
    assert [c["advantage"] for c in chats] == pytest.approx([1.0, -1.0, 1 / 3])
    assert [c["group_share"] for c in chats] == pytest.approx([1 / 3] * 3)
    assert read_manifest(tmp_path / "out", "corpus").content["groups"] == {
        "num_groups": 1, "num_responses": 3, "num_equal_rewards": 1, "num_alone": 1,
        "num_unfinished": 0, "num_passed_over": 0}
    assert "1 with equal rewards and 1 of one response" in capsys.readouterr().out


def test_the_responses_of_one_prompt_are_packed_and_what_came_before_them_is_not_learned(
        tokenizers: dict[str, Path], tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Welcome back."},
             {"role": "user", "content": "2 + 2?"}]
    file = write(tmp_path / "in.jsonl", group(1, 0, prompt=turns) | {"id": "q7"}, group(0, 1) | {"id": 8})
    assert main(["groups", "--input", str(file), "--output", str(tmp_path / "out")]) == 0
    assert main(["pack", "--tokenizer", str(tokenizers["solar-open"]), "--format", "chat", "--heldout", "0",
                 "--column", "advantage", "--column", "group_share", "--workers", "1",
                 "--input", str(tmp_path / "out/groups.jsonl"), "--output", str(tmp_path / "packed")]) == 0
    tokenizer = Tokenizer.from_file(str(tmp_path / "packed/tokenizer/tokenizer.json"))
    [source] = open_sources({str(tmp_path / "packed"): 1.0}, 10**6)
    documents = source.shard("train")
    learned = [tokenizer.decode(documents.tokens(d, 0, n)[documents.loss_weights(d, 0, n) > 0].tolist())
               for d, n in enumerate(documents.lengths)]
    assert ["answer" in text for text in learned] == [True] * 4
    assert not any("Welcome" in text for text in learned)


def test_a_group_is_held_out_as_a_whole_and_with_every_other_group_of_its_prompt(
        tokenizers: dict[str, Path], tmp_path: Path) -> None:
    groups = [group(*rewards, prompt=f"{i % 30} + 2?") for i in range(60) for rewards in [(1, 0, 0.5)]]
    file = write(tmp_path / "in.jsonl", *groups)
    assert main(["groups", "--input", str(file), "--output", str(tmp_path / "out")]) == 0
    assert main(["pack", "--tokenizer", str(tokenizers["solar-open"]), "--format", "chat", "--heldout", "0.3",
                 "--workers", "1", "--input", str(tmp_path / "out/groups.jsonl"), "--output",
                 str(tmp_path / "packed")]) == 0
    tokenizer = Tokenizer.from_file(str(tmp_path / "packed/tokenizer/tokenizer.json"))
    [source] = open_sources({str(tmp_path / "packed"): 1.0}, 10**6)
    prompts = {}
    for split in ("train", "heldout"):
        documents = source.shard(split)
        answers = Counter(re.findall(r"\d+ \+ 2", tokenizer.decode(documents.tokens(d, 0, n).tolist()))[0]
                          for d, n in enumerate(documents.lengths))
        assert set(answers.values()) == {6}  # both groups of three
        prompts[split] = set(answers)
    assert len(prompts["heldout"]) >= 3 and not prompts["train"] & prompts["heldout"]


@pytest.mark.parametrize(("record", "said"), [
    ("[1]", "in.jsonl:1: is a JSON list"),
    ("{", "in.jsonl:1: is not valid JSON"),
    ({"prompt": "a"}, "needs a 'prompt' and a list 'responses'"),
    (group(1, 0, prompt=3), "in.jsonl:1: prompt"),
    (group(1, "good"), "responses[1]: reward is 'good', must be a finite number"),
    (group(1, True), "responses[1]: reward is 'True'"),
    ('{"prompt": "a", "responses": [{"content": "b", "reward": NaN}]}', "reward is 'nan'"),
    ({"prompt": "a", "responses": [{"content": "b"}]}, "needs either a number 'reward'"),
    ({"prompt": "a", "responses": [{"reward": 1}]}, "either 'content' or 'messages'"),
    ({"prompt": "a", "responses": [{"messages": [{"role": "user", "content": "x"}], "reward": 1}]},
     "no message of the assistant"),
    (group(1, 10**400), "responses[1]: reward is '1000"),
    (group(1, 0, prompt="\ud800"), "in.jsonl:1: holds half of a surrogate pair"),
    (group(1, 0) | {"advantage": 3}, "has 'advantage', which this step writes"),
    (group(1, 1), "no group has two responses with different rewards (1 with equal rewards"),
])
def test_what_is_wrong_is_named_and_nothing_is_written(record: Any, said: str, tmp_path: Path,
                                                       capsys) -> None:
    file = write(tmp_path / "in.jsonl", record)
    assert main(["groups", "--input", str(file), "--output", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
