"""Prompts of rounds: known by their content, in an order that is a function, each once in an epoch."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from megatron_sov.base.errors import UserError
from megatron_sov.model.config.post_training import RolloutConfig
from megatron_sov.rollouts.prompts import (
    RolloutPrompt, budget_of, pieces, read_prompts, refuse_unaskable, round_prompts)


def made(count: int) -> list[RolloutPrompt]:
    return [RolloutPrompt(f"{i:016x}", {"prompt": str(i)}) for i in range(count)]


def file_with(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_a_prompt_is_known_by_what_it_says(tmp_path: Path) -> None:
    given_ = file_with(tmp_path / "a.jsonl", '{"prompt": "1+1", "answer": "2"}', "",
                       '{"messages": [{"role": "user", "content": "hi"}], "tools": []}')
    plain, chat = read_prompts(given_)
    other, _ = read_prompts(file_with(tmp_path / "b.jsonl", '{"answer": "2",   "prompt": "1+1"}',
                                      '{"question": "a task"}'))
    assert plain == other and plain.id != chat.id and len(plain.id) == 16
    assert (plain.line, chat.line) == (1, 3)
    assert [m.content for m in (*plain.conversation().messages, *chat.conversation().messages)] == ["1+1",
                                                                                                    "hi"]


def test_equal_and_broken_lines_are_named(tmp_path: Path) -> None:
    twice = file_with(tmp_path / "twice.jsonl", '{"prompt": "a"}', '{"prompt": "b"}', '{ "prompt":"a"}',
                      r'{"prompt": "\ud800"}')
    with pytest.raises(UserError, match=r"(?s)line 3: is the same as line 1.*line 4: holds half"):
        read_prompts(twice)
    with pytest.raises(UserError, match="line 2: is no JSON"):
        read_prompts(file_with(tmp_path / "broken.jsonl", '{"prompt": "a"}', "{"))
    with pytest.raises(UserError, match=r"has no rows; each line is a JSON object$"):
        read_prompts(file_with(tmp_path / "empty.jsonl"))


def test_what_nobody_can_be_asked_is_named(tmp_path: Path) -> None:
    path = file_with(tmp_path / "p.jsonl", '{"prompt": "a"}', '{"task": "a"}', '{"prompt": 3}',
                     '{"prompt": "a", "messages": []}')
    with pytest.raises(UserError, match=r"(?s)3 problems.*line 2: has no 'prompt'.*line 3: .*"
                                        r"line 4: has 'prompt' and 'messages'"):
        refuse_unaskable(path, read_prompts(path))


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 3))
def test_every_prompt_once_in_an_epoch_and_never_twice_in_a_round(count: int, wanted: int, seed: int) -> None:
    prompts, rollout = made(count), RolloutConfig(prompts_per_round=wanted, seed=seed)
    if wanted > count:
        with pytest.raises(UserError, match=f"there are {count} prompts"):
            round_prompts(prompts, rollout, 1)
        return
    num_epochs = 5
    rounds = [round_prompts(prompts, rollout, n + 1) for n in range(-(-num_epochs * count // wanted))]
    assert all(len({p.id for p in found}) == wanted for found in rounds)
    in_order = [p.id for found in rounds for p in found][:num_epochs * count]
    for epoch in range(num_epochs):
        assert Counter(in_order[epoch * count:(epoch + 1) * count]) == Counter(p.id for p in prompts)


def test_the_order_is_a_function_of_seed_and_round() -> None:
    prompts, rollout = made(50), RolloutConfig(prompts_per_round=8)
    first = round_prompts(prompts, rollout, 9)
    assert first == round_prompts(prompts, rollout, 9)
    assert first != round_prompts(prompts, RolloutConfig(prompts_per_round=8, seed=1), 9)
    assert [p.id for n in range(1, 7) for p in round_prompts(prompts, rollout, n)] != [
        p.id for p in prompts[:48]]


def test_pieces_are_parts_of_the_store() -> None:
    found = pieces(made(7), 12, 3)
    assert [p.part() for p in found] == [f"round-0012-piece-000{n}" for n in range(3)]
    assert found[1].part(2) == "round-0012-piece-0001-attempt-2"
    assert [len(p.prompts) for p in found] == [3, 3, 1]


def test_ids_are_the_records_own_hash(tmp_path: Path) -> None:
    record = {"prompt": "물", "n": 1.5}
    (found,) = read_prompts(file_with(tmp_path / "p.jsonl", json.dumps(record)))
    canonical = '{"n":1.5,"prompt":"물"}'
    assert found.id == hashlib.sha256(canonical.encode()).hexdigest()[:16]


# How long a response is asked to be.


def test_budgets_divide_a_group_and_go_before_a_prompts_own() -> None:
    rollout = RolloutConfig(samples_per_prompt=6, budgets_tokens=(512, 1024, 2048))
    assert [budget_of(rollout, "p", {"target_tokens": 5}, s) for s in range(6)] == [
        512, 512, 1024, 1024, 2048, 2048]
    assert budget_of(RolloutConfig(), "p", {"target_tokens": 5}, 3) == 5
    assert budget_of(RolloutConfig(), "p", {}, 3) is None


@pytest.mark.parametrize("target", [0, -1, True, "5", 2.5])
def test_a_target_that_is_no_number_of_tokens_is_named(target: Any) -> None:
    with pytest.raises(UserError, match=r"prompt p has target_tokens = .*; write a whole number from 1"):
        budget_of(RolloutConfig(), "p", {"target_tokens": target}, 0)
