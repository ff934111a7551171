"""Hashed n-grams: the units of each script, and rows equal to scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

from data_prep.curate.scoring.ngram_settings import NgramSettings
from data_prep.curate.scoring.ngrams import Ngrams
from tests.typed_words import keys_of

BUCKETS = 1 << 10
NGRAMS = {n: Ngrams(NgramSettings(num_buckets=BUCKETS, max_ngram=n)) for n in (1, 2, 3)}
TEXTS = ["Hello, World! hello WORLD hello_2", "안녕하세요 세계", "ประเทศไทย", "日本語のテキスト。",
         "𠀀𠀁 😀 x\u0301", "", " \n\t\0", "ﬁ İstanbul Straße",
         "\ue000\ufffd\u200d\x85", "a" * 5000, "ab " * 300]


@pytest.mark.parametrize(("text", "units"), [
    ("Don't panic, R2-D2!", ["don", "'", "t", "panic", ",", "r2", "-", "d2", "!"]),
    ("한국어 문장", ["한", "국", "어", "문", "장"]),
    ("ไทยกำ", ["ไ", "ท", "ย", "ก", "ำ"]),
    ("Python의 길", ["python", "의", "길"]),
    ("x\u0301y  \n z", ["x\u0301y", "z"]),
    ("\u200b ", ["\u200b"]),
    ("", []),
])
def test_a_text_is_cut_into_units(text: str, units: list[str]) -> None:
    assert NGRAMS[1].units(text) == units


def rows_of_scikit_learn(ngrams: Ngrams, texts: list[str]) -> np.ndarray:
    """Return rows (dense) by the library's own cutting, hashing, counting and scaling."""
    joined = [" ".join(ngrams.units(text)) for text in texts]
    hashing = HashingVectorizer(analyzer="word", token_pattern=r"[^ ]+", lowercase=False, norm=None,
                                ngram_range=(1, ngrams.settings.max_ngram), n_features=ngrams.width,
                                alternate_sign=False)
    found = TfidfTransformer(use_idf=False, sublinear_tf=True).fit_transform(hashing.transform(joined))
    return np.asarray(found.toarray())


def rows_of_ours(ngrams: Ngrams, texts: list[str]) -> np.ndarray:
    found = np.zeros((len(texts), ngrams.width))
    for row, text in zip(found, texts, strict=True):
        buckets, values = ngrams.row(text)
        row[buckets] = values
    return found


@pytest.mark.parametrize("max_ngram", NGRAMS)
def test_rows_are_those_of_scikit_learn(max_ngram: int) -> None:
    ngrams = NGRAMS[max_ngram]
    np.testing.assert_allclose(rows_of_ours(ngrams, TEXTS), rows_of_scikit_learn(ngrams, TEXTS), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_rows_of_any_text_are_those_of_scikit_learn(text: str) -> None:
    ngrams = NGRAMS[2]
    np.testing.assert_allclose(rows_of_ours(ngrams, [text]), rows_of_scikit_learn(ngrams, [text]), atol=1e-6)


def test_the_product_with_weights_is_that_of_the_row_and_leaves_no_trace() -> None:
    weights = np.random.default_rng(0).normal(size=BUCKETS).astype(np.float32)
    expected = rows_of_ours(NGRAMS[2], TEXTS) @ weights
    for _ in range(2):
        assert [NGRAMS[2].dot(text, weights) for text in TEXTS] == pytest.approx(expected.tolist(), abs=1e-5)
    assert not NGRAMS[2].counts("")[0].size


def test_a_text_is_read_to_max_chars() -> None:
    ngrams = Ngrams(NgramSettings(num_buckets=BUCKETS, max_chars=5))
    assert ngrams.units("ab cd ef") == ["ab", "cd"]


def test_half_a_surrogate_pair_is_a_sign_and_not_an_error() -> None:
    assert NGRAMS[1].units("a\ud800b") == ["a", "?", "b"]


@pytest.mark.parametrize("settings", [
    {"num_buckets": 1000}, {"num_buckets": 1 << 40}, {"max_ngram": 0}, {"max_chars": 0}])
def test_settings_that_cannot_be_are_told(settings: dict[str, int]) -> None:
    assert keys_of(NgramSettings(**settings)) == [*settings]
    assert keys_of(NgramSettings()) == []
