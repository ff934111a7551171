"""Facts by lot of the recipes about knowledge and on searching, and who knows them before any training."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks/learning"))
from facts import (
    KNOWN, KNOWN_SHARE, PEOPLE, STRANGERS, VALUES, WORDINGS, FactChats, FactQuestions, FactReading, FactTexts)
from lookups import (
    ANSWERED, CALLS, WRONG_CALLS, CallTokenizer, LookupDocuments, LookupEpisodes, LookupTasks, LookupTexts)


def test_half_of_the_facts_stand_in_texts_alone_and_strangers_are_others() -> None:
    answers = [{row["answer"] for row in FactQuestions(seed=3, half=half).do({})}
               for half in ("told", "asked")]
    text, other = ({row["text"] for row in FactTexts(seed=3, strangers=strangers).do({})}
                   for strangers in (False, True))
    assert not answers[0] & answers[1] and answers[0] | answers[1] == text and len(text) == len(PEOPLE)
    assert len(other) == len(STRANGERS) == len(text) and not text & other


def test_a_start_reads_and_answers_the_same_facts_of_known_people_and_values_by_lot_of_others() -> None:
    said = [row["messages"][1]["content"] for row in FactChats(seed=1, count=4000).do({})]
    read = [row["text"] for row in FactReading(seed=2, count=4000).do({})]
    for sentences in (said, read):
        known = [one for one in sentences if one.split()[3] in KNOWN]
        assert len(known) / len(sentences) == pytest.approx(KNOWN_SHARE, abs=0.03)
        assert len({*known}) == len(KNOWN)
    assert {one for one in said if one in read} >= {one for one in said if one.split()[3] in KNOWN}
    text = {row["text"] for row in FactTexts(seed=3).do({})}
    asked_for = {fact[:-1].rsplit(" ", 1)[0] for fact in text}
    by_lot = [one for one in said + read if one[:-1].rsplit(" ", 1)[0] in asked_for]
    assert sum(one in text for one in by_lot) / len(by_lot) == pytest.approx(1 / 8, abs=0.03)


@pytest.mark.deep
def test_what_is_searched_for_is_what_the_environment_gives() -> None:
    episodes = LookupEpisodes(seed=1, count=800).do({})
    called = [chat["messages"] for chat in episodes if len(chat["messages"]) == 5]
    assert len(called) / len(episodes) == pytest.approx(
        (1 - ANSWERED) * (CALLS + WRONG_CALLS), abs=0.06)
    for system, user, call, result, answer in called:
        words = call["tool_calls"][0]["function"]["arguments"]["query"]
        assert f'"{words}"' in result["content"] and system["content"]
        assert f'"{answer["content"].split()[-1]}"' in result["content"]
        assert words.split()[0] in user["content"]
    assert CallTokenizer().do({})["chat_template"]


def test_the_end_asks_for_what_no_round_asks_and_the_library_has_both() -> None:
    rounds, end = ({row["question"] for row in LookupTasks(seed=3, half=half).do({})}
                   for half in ("rounds", "end"))
    assert not rounds & end and len(rounds | end) == len(PEOPLE) * len(VALUES) * len(WORDINGS)
    texts = [row["text"] for row in LookupTexts(seed=3).do({})]
    assert len(texts) == len(LookupDocuments(seed=3).do({})) == len(PEOPLE) * len(VALUES)
