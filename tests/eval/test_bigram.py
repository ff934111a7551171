"""The bigram baseline against the formula written out with dictionaries."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

prepare_megatron()

from megatron_sov.data.token_shards import Source  # noqa: E402
from megatron_sov.eval import bigram  # noqa: E402
from megatron_sov.eval.heldout import KneserNeyBigram, token_blocks, train_bigram  # noqa: E402

VOCAB = 7
DOCUMENTS = [[0, 1, 0, 1, 2, 0, 1, 3], [3, 0, 1, 4, 4, 4], [5], [1, 0, 2, 2]]


class Listed:
    """Documents given as lists."""

    def __init__(self, documents: list[list[int]]) -> None:
        self.documents = documents
        self.lengths = np.array([len(d) for d in documents])

    def tokens(self, document: int, start: int, count: int) -> np.ndarray:
        return np.array(self.documents[document][start:start + count], np.int64)


def reference(context: int, target: int) -> float:
    pairs = Counter(pair for d in DOCUMENTS for pair in pairwise(d))
    before = Counter(w for _, w in pairs)
    d, e = (sum(n == 1 for n in c.values()) / (sum(n == 1 for n in c.values())
                                               + 2 * sum(n == 2 for n in c.values()))
            for c in (pairs, before))
    q = max(before[target] - e, 0) / len(pairs) + e * len(before) / len(pairs) / VOCAB
    total = sum(n for (v, _), n in pairs.items() if v == context)
    if not total:
        return q
    followers = sum(v == context for v, _ in pairs)
    return max(pairs[context, target] - d, 0) / total + d * followers / total * q


@pytest.fixture
def fitted() -> KneserNeyBigram:
    source = Source("x", None, "text", {}, {"train": 19}, 1.0, made=Listed(DOCUMENTS))
    return train_bigram([source], VOCAB, 1000)


def test_probabilities_are_those_of_the_formula_and_sum_to_one(fitted: KneserNeyBigram) -> None:
    for context in range(VOCAB):
        found = np.exp(fitted.logprobs(np.full(VOCAB, context), np.arange(VOCAB)))
        assert found == pytest.approx([reference(context, w) for w in range(VOCAB)], rel=1e-12)
        assert found.sum() == pytest.approx(1.0, rel=1e-12)
        assert found.min() > 0


def test_counting_in_blocks_changes_nothing(fitted: KneserNeyBigram, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bigram, "BLOCK_TOKENS", 5)
    blocks = list(token_blocks(Listed(DOCUMENTS), 1000))
    assert len(blocks) > 1
    assert [pair for b in blocks for pair in zip(*(x.tolist() for x in b), strict=True)] \
        == [pair for d in DOCUMENTS for pair in pairwise(d)]
    again = KneserNeyBigram(VOCAB)
    for contexts, targets in blocks:
        again.count(contexts, targets)
    again.fit()
    every = np.divmod(np.arange(VOCAB * VOCAB), VOCAB)
    assert np.array_equal(again.logprobs(*every), fitted.logprobs(*every))


def test_only_so_many_tokens_are_counted() -> None:
    (contexts, targets), = token_blocks(Listed(DOCUMENTS), 10)
    assert list(zip(contexts.tolist(), targets.tolist(), strict=True)) == [
        *pairwise(DOCUMENTS[0]), (3, 0)]


@pytest.mark.parametrize("documents", [[], [[1, 1, 1, 1, 1]]], ids=["nothing counted", "no pair occurs once"])
def test_thin_data_still_gives_probabilities(documents: list[list[int]]) -> None:
    model = KneserNeyBigram(VOCAB)
    for contexts, targets in token_blocks(Listed(documents), 1000):
        model.count(contexts, targets)
    model.fit()
    for context in range(VOCAB):
        found = np.exp(model.logprobs(np.full(VOCAB, context), np.arange(VOCAB)))
        assert found.sum() == pytest.approx(1.0)
        assert found.min() > 0
