"""Words of a topic: those that the others lack."""

from __future__ import annotations

import numpy as np

from data_prep.scoring.ngram_settings import NgramSettings
from data_prep.scoring.ngrams import Ngrams
from data_prep.scoring.topics import top_words

NGRAMS = Ngrams(NgramSettings())


def test_words_that_only_one_topic_has_come_first() -> None:
    texts = ["the comet and the moon", "the comet and a star of 1999", "the oven, the flour, oven",
             "the oven and some flour", "nothing of this counts"]
    found = top_words(texts, np.array([0, 0, 1, 1, -1]), 3, NGRAMS)
    assert found == [["comet", "and", "the"], ["flour", "oven", "the"], []]


def test_scripts_without_spaces_give_pairs_of_characters() -> None:
    texts = ["ダムの水", "ダムと山", "ไฟฟ้า", "ไฟฟ้า"]
    found = top_words(texts, np.array([0, 0, 1, 1]), 2, NGRAMS)
    assert found[0] == ["ダム"]
    assert "ฟฟ" in found[1]
