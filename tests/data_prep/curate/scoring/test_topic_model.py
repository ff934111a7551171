"""The space of topics beside scikit-learn's own TF-IDF, projection and assignment."""

from __future__ import annotations

import random

import numpy as np
from sklearn.feature_extraction.text import TfidfTransformer

from data_prep.curate.scoring.ngram_settings import NgramSettings
from data_prep.curate.scoring.ngrams import Ngrams
from data_prep.curate.scoring.scorer import sparse_rows
from data_prep.curate.scoring.topics import TopicModel, find_topics
from tests.data_prep.curate.scoring.planted import text_of

NGRAMS = Ngrams(NgramSettings(num_buckets=1 << 10))
RNG = random.Random(0)
TEXTS = [text_of(RNG, i % 2, korean=i % 3 == 0) for i in range(90)]


def test_a_point_is_that_of_scikit_learn() -> None:
    model, places = find_topics(TEXTS, NGRAMS, 4, 0)
    counted = [NGRAMS.counts(text) for text in TEXTS]
    counts = sparse_rows(counted, NGRAMS.width)
    transformer = TfidfTransformer(sublinear_tf=True).fit(counts)
    common = model.idf == 0
    np.testing.assert_allclose(model.idf[~common], transformer.idf_[~common], rtol=1e-6)
    with_bucket = np.asarray((counts > 0).sum(axis=0))[0]
    assert common.tolist() == ((with_bucket < 2) | (with_bucket > 45)).tolist()
    rows = transformer.transform(counts).toarray() * ~common
    points = rows @ model.directions
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    for found, point, place in zip(counted, points, places, strict=True):
        np.testing.assert_allclose(model.embed(found), point, atol=1e-4)
        assert np.argmin(np.linalg.norm(model.centres - point, axis=1)) == place
    sizes = np.bincount(places, minlength=4).tolist()
    assert sizes == sorted(sizes, reverse=True)


def test_the_same_texts_give_the_same_topics() -> None:
    first, again = (find_topics(TEXTS, NGRAMS, 4, 7)[0].to_bytes() for _ in range(2))
    assert first == again
    assert find_topics(TEXTS, NGRAMS, 4, 8)[0].to_bytes() != first
    assert TopicModel.from_bytes(first).to_bytes() == first
