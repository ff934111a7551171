"""Held-out documents: a stable share, decided by content alone."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from data_prep.splits import HELDOUT, TRAIN, HeldoutRule, document_hash
from megatron_sov.documents import Document


def heldout(share: float, count: int = 4000) -> set[int]:
    rule = HeldoutRule(share)
    return {i for i in range(count) if rule.split_of(document_hash(Document("", f"document {i}"))) == HELDOUT}


def test_the_share_is_met_and_a_larger_share_holds_out_more_of_the_same() -> None:
    two, ten = heldout(0.02), heldout(0.10)
    assert two < ten
    assert 50 <= len(two) <= 115 and 330 <= len(ten) <= 470  # binomial, 4 standard deviations
    assert heldout(0.0) == set()


@given(st.text(), st.text())
def test_equal_content_gives_equal_hashes_wherever_it_stands(a: str, b: str) -> None:
    assert document_hash(Document("x.txt", a)) == document_hash(Document("y.jsonl:7", unicodedata.normalize("NFD", a)))
    same = unicodedata.normalize("NFC", a) == unicodedata.normalize("NFC", b)
    assert (document_hash(Document("", a)) == document_hash(Document("", b))) == same


def test_chats_differ_by_roles_and_by_where_messages_end() -> None:
    chats = [(("user", "ab"), ("assistant", "c")), (("user", "a"), ("assistant", "bc")), (("system", "ab"), ("assistant", "c"))]
    assert len({document_hash(Document("", messages=chat)) for chat in chats}) == 3


def test_a_small_source_gives_up_its_smallest_hash() -> None:
    rule = HeldoutRule(1e-9)
    rule.learn_source(1 << 60, 1 << 62)
    assert rule.split_of(1 << 60) == HELDOUT and rule.split_of(1 << 62) == TRAIN
    rule.learn_source(1 << 61, 1 << 61)  # one document, however often: it is needed for training
    assert rule.split_of(1 << 61) == TRAIN
    none = HeldoutRule(0.0)
    none.learn_source(1, 2)
    assert none.split_of(1) == TRAIN
