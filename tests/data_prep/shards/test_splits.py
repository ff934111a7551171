"""Held-out documents: a stable share, decided by content alone."""

from __future__ import annotations

import unicodedata

import numpy as np
from hypothesis import given, strategies as st

from data_prep.shards.token_artifact import HeldoutRule, document_hash
from megatron_sov.base.documents import Conversation, Document, Message


def heldout(share: float, count: int = 4000) -> set[int]:
    rule = HeldoutRule(share)
    hashes = np.array([document_hash(Document("", f"document {i}")) for i in range(count)], np.uint64)
    return set(np.flatnonzero(rule.is_heldout(hashes)).tolist())


def test_the_share_is_met_and_a_larger_share_holds_out_more_of_the_same() -> None:
    two, ten = heldout(0.02), heldout(0.10)
    assert two < ten
    assert 50 <= len(two) <= 115 and 330 <= len(ten) <= 470  # binomial, 4 standard deviations
    assert heldout(0.0) == set()


@given(st.text(), st.text())
def test_equal_content_gives_equal_hashes_wherever_it_stands(a: str, b: str) -> None:
    assert document_hash(Document("x.txt", a)) == document_hash(
        Document("y.jsonl:7", unicodedata.normalize("NFD", a)))
    same = unicodedata.normalize("NFC", a) == unicodedata.normalize("NFC", b)
    assert (document_hash(Document("", a)) == document_hash(Document("", b))) == same


def test_chats_differ_by_roles_and_by_where_messages_end() -> None:
    chats = [(("user", "ab"), ("assistant", "c")), (("user", "a"), ("assistant", "bc")),
             (("system", "ab"), ("assistant", "c"))]
    assert len({document_hash(Document("", messages=Conversation.of(*chat).messages)) for chat in chats}) == 3


def test_answers_to_one_prompt_stay_together() -> None:
    prompt = (Message("user", "2 + 2?"),)
    pairs = [Document("", messages=prompt, chosen=(Message("assistant", c),),
                      rejected=(Message("assistant", "5"),))
             for c in ("4", "four")]
    asked = Document("", messages=prompt, awaits_response=True, extra='{"answer": 4}')
    of_a_group = [Document("", messages=(*prompt, Message("assistant", a)), num_prompt=1) for a in "45"]
    assert len({document_hash(d) for d in (*pairs, asked, *of_a_group)}) == 1
    alone = [Document("", messages=d.messages) for d in of_a_group]
    assert len({document_hash(d) for d in (asked, *alone)}) == 3


def split_of(rule: HeldoutRule, hash_: int) -> bool:
    return bool(rule.is_heldout(np.array([hash_], np.uint64))[0])


def test_a_small_source_gives_up_its_smallest_hash() -> None:
    rule = HeldoutRule(1e-9)
    rule.learn_source(1 << 60, (1 << 64) - 1)
    assert split_of(rule, 1 << 60) and not split_of(rule, (1 << 64) - 1)
    rule.learn_source(1 << 61, 1 << 61)  # one document, however often: it is needed for training
    assert not split_of(rule, 1 << 61)
    assert not rule.keep_one((1 << 64) - 1), "it is trained on anyway"
    assert rule.keep_one(1 << 60) and not split_of(rule, 1 << 60), "a twin elsewhere was chosen"
    assert rule.keep_one(5) and not split_of(rule, 5) and split_of(rule, 4)
    none = HeldoutRule(0.0)
    none.learn_source(1, 2)
    assert not split_of(none, 1)
