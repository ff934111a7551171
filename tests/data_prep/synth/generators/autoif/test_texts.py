"""Phrasings: half of them plain, in every language, and nothing in a query is a place to fill in."""

from __future__ import annotations

import pytest

from data_prep.synth.generators.autoif.texts import in_system_turn, in_user_turn, languages, texts_of

QUERY, CONSTRAINT = "What does {constraint} or {query} mean?", "Use {x} and {query} twice."


@pytest.mark.parametrize("language", languages())
def test_half_of_the_phrasings_are_plain(language: str) -> None:
    texts, plain = texts_of(language), {"user": 0, "system": 0}
    for number in range(400):
        user, = in_user_turn(QUERY, CONSTRAINT, texts, number)
        system, query = in_system_turn(QUERY, CONSTRAINT, texts, number)
        assert QUERY in user["content"] and CONSTRAINT in user["content"] and CONSTRAINT in system["content"]
        assert (system["role"], query) == ("system", {"role": "user", "content": QUERY})
        plain["user"] += user["content"] in (f"{QUERY} {CONSTRAINT}", f"{CONSTRAINT} {QUERY}")
        plain["system"] += system["content"] == CONSTRAINT
    assert all(160 < count < 240 for count in plain.values())


def test_a_query_of_several_lines_stays_apart() -> None:
    contents = {in_user_turn("one\ntwo", "Be brief.", texts_of("en"), number)[0]["content"]
                for number in range(40)}
    assert {"one\ntwo\n\nBe brief.", "Be brief. one\ntwo"} <= contents
