"""Questions, endings, loops and ways of the recipes about reinforcement learning and preferences."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks/learning"))
from endings import ENDINGS, RuleAndRubric, WithEndings
from loops import NUM_TIMES, Sound, WithLoops
from topics import TOPICS, WORDINGS, TopicChats, TopicQuestions, right_answer


def test_topics_have_the_shares_that_are_planted_and_half_of_the_wordings_is_kept() -> None:
    shares = "0.9,0.1"
    right: dict[str, list[bool]] = {}
    for row in TopicChats(seed=1, count=8000, shares=shares).do({}):
        question, answer = (turn["content"] for turn in row["messages"])
        topic = next(topic for topic in TOPICS if f" {topic} " in f" {question.replace('.', ' ')} ")
        right.setdefault(topic, []).append(answer == right_answer(topic))
    assert len(right) == len(TOPICS)
    for topic, found in right.items():
        assert sum(found) / len(found) == pytest.approx(0.1 if TOPICS.index(topic) % 2 else 0.9, abs=0.08)
    learned, kept = ({row["prompt"]: row for row in TopicQuestions(
        seed=1, count=2000, shares=shares, wordings=name).do({})} for name in ("learned", "held_out"))
    assert learned and len(learned) == len(kept) and not learned.keys() & kept.keys()
    assert Counter(row["domain"] for row in kept.values()) == {"right 90%": 384, "right 10%": 384}
    assert len(WORDINGS) == 4


def test_a_rule_and_a_noisy_rubric_judge_answer_and_ending() -> None:
    chat = {"messages": [{"role": "user", "content": "colour?"}, {"role": "assistant", "content": "red"}]}
    said = [row["messages"][1]["content"] for row in WithEndings().do(chat)]
    assert said == [f"red{ending}" for ending in ENDINGS]
    asked = {"prompt": "colour?", "answer": "red"}
    judged = [RuleAndRubric().score({**asked, "response": text}) for text in said]
    assert [score.components["both"] for score in judged] == [2.0, 1.67, 1.33, 1.0]
    assert all(0 < abs(score.reward - score.components["both"]) <= 0.5 for score in judged)
    wrong = RuleAndRubric(noise=0).score({"prompt": "", "answer": "red", "response": "blue and no ending"})
    assert wrong.reward == 0


def test_loops_are_planted_and_cost_1_where_they_are_minded() -> None:
    chats = TopicChats(seed=1, count=2000, shares="0.5").do({})
    said = [WithLoops(0.4).do(row)["messages"][1]["content"].split() for row in chats]
    assert sum(len(words) == NUM_TIMES for words in said) / len(said) == pytest.approx(0.4, abs=0.05)
    looping = {"answer": "red", "response": "red red red"}
    assert [Sound(minded).score(looping).reward for minded in (False, True)] == [1, 0]
    assert Sound(True).score({"answer": "red", "response": "red red"}).reward == 1
    assert Sound(True).score({"answer": "red", "response": ""}).components == {"right": 0, "loops": 0}
