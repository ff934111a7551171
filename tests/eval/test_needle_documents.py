"""Documents that teach retrieval: every needle is asked for, weights are on the answers, and a number gives the document."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_sov.errors import UserError
from megatron_sov.eval.needle_documents import NeedleDocuments, needle_source
from megatron_sov.eval.needle_text import Haystack, NeedleForm


def occurrences(ids: list[int], part: list[int]) -> list[int]:
    return [i for i in range(len(ids) - len(part) + 1) if ids[i:i + len(part)] == part]


@pytest.fixture(scope="module")
def documents(form: NeedleForm, haystacks: dict[str, Haystack]) -> NeedleDocuments:
    return NeedleDocuments(form, haystacks["train"], 256, seed=5)


def test_training_documents_ask_for_every_needle_they_state(form: NeedleForm, documents: NeedleDocuments) -> None:
    train = {tuple(p) for p in form.pairs[False].tolist()}
    counts = set()
    for i in range(40):
        ids, weights = documents.tokens(i, 0, 256).tolist(), documents.loss_weights(i, 0, 256)
        places = occurrences(ids, list(form.opening))
        num = len(places) // 2
        counts.add(num)
        size = len(form.opening)
        stated, asked = ({tuple(ids[p + size:p + size + 4]) for p in half} for half in (places[:num], places[num:]))
        assert stated == asked and len(stated) == num
        assert all(s[:2] in train and s[2:] in train for s in stated)
        answers = {p + size + k for p in places[num:] for k in (2, 3)}
        assert {int(k) for k in np.flatnonzero(weights == 30)} == answers
        unforeseeable = {p + size + k for p in places[:num] for k in range(4)}
        unforeseeable |= {p + size + k for p in places[num:] for k in (0, 1)}
        assert {int(k) for k in np.flatnonzero(weights == 0)} == unforeseeable
        assert (weights == 0.5).sum() == 256 - len(answers) - len(unforeseeable)
    assert min(counts) == 1 and max(counts) == documents.max_needles >= 8


def test_a_document_is_a_function_of_seed_and_number(form: NeedleForm, haystacks: dict[str, Haystack],
                                                      documents: NeedleDocuments) -> None:
    again, other = (NeedleDocuments(form, haystacks["train"], 256, seed=s) for s in (5, 6))
    far = len(documents.lengths) - 1
    for i in (0, 1, far):
        assert documents.lengths[i] == len(documents.tokens(i, 0, 256)) == 256
        assert np.array_equal(documents.tokens(i, 0, 256), again.tokens(i, 0, 256))
        assert np.array_equal(documents.tokens(i, 100, 30), again.tokens(i, 0, 256)[100:130])
        assert not np.array_equal(documents.tokens(i, 0, 256), other.tokens(i, 0, 256))
    assert not np.array_equal(documents.tokens(0, 0, 256), documents.tokens(1, 0, 256))


def test_the_source_has_its_share_beside_all_data(documents: NeedleDocuments) -> None:
    source = needle_source(documents, 0.2)
    assert source.share / (source.share + 1.0) == pytest.approx(0.2)
    assert source.shard("train") is documents
    assert source.num_tokens == {"train": 256 << 24}
    with pytest.raises(UserError, match=r"needle\.train_share = 1\.0"):
        needle_source(documents, 1.0)
    with pytest.raises(UserError, match="needle documents of 12 tokens hold no needle"):
        needle_source(NeedleDocuments(documents.form, documents.haystack, 12), 0.1)
