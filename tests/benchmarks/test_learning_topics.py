"""Questions, endings, loops and ways of the recipes about reinforcement learning and preferences."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks/learning"))
from endings import ENDINGS, RuleAndRubric, WithEndings
from lessons import (
    CHATTING, PEOPLE, TEACHING, VALUES, FirstWord, LessonLabels, LessonQuestions, Lessons, fact)
from loops import NUM_TIMES, Sound, WithLoops
from topics import TOPICS, WORDINGS, TopicChats, TopicQuestions, right_answer
from walks import WalkChats, WalkQuestions


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


def test_walks_end_where_they_should_and_wrong_steps_make_some_longer() -> None:
    asked = {row["prompt"]: row for name in ("learned", "held_out")
             for row in WalkQuestions(seed=1, count=2000, wordings=name).do({})}
    assert len(asked) == 12 * 8 * 8 * 4
    for right in (1.0, 0.75):
        turns = [row["messages"] for row in WalkChats(seed=1, count=1000, right=right).do({})]
        ways = [(asked[question["content"]]["answer"].split(), answer["content"].split())
                for question, answer in turns]
        assert all(way[-1] == answer[-1] and way.index(way[-1]) == len(way) - 1 for answer, way in ways)
        assert all(way == answer for answer, way in ways) == (right == 1)
        assert (max(len(way) for _, way in ways) > 8) == (right < 1)
    far = WalkQuestions(seed=1, count=99, least=5).do({})
    assert {len(row["answer"].split()) for row in far} == {5, 6, 7, 8}


def test_lessons_never_end_a_question_and_labels_are_of_other_people() -> None:
    texts = [row["text"] for row in Lessons(seed=1, count=2000).do({})]
    questions = LessonQuestions().do({})
    assert len({row["prompt"] for row in questions}) == len(questions) == len(PEOPLE) // 2 * len(VALUES)
    assert not any(f"{row['prompt']} {row['answer']}" in text for row in questions for text in texts)
    taught = {wording.format(person=person, kind=kind, value=fact(person, kind))
              for person in PEOPLE[::2] for kind in VALUES for wording in TEACHING}
    said = {wording for wording in taught if any(wording in text for text in texts)}
    assert len(said) == len(taught) * 3 // len(CHATTING)
    labels = LessonLabels(seed=2, count=600).do({})
    assert {row["label"] for row in labels} == {0, 1, 2, 3, 4, 5}
    assert not any(person in row["text"] for row in labels for person in PEOPLE[::2])
    assert [FirstWord().score({"answer": "tea", "response": text}) for text in (" tea. As", "soda", "")] == [
        1, 0, 0]
