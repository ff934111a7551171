"""The baseline that every language model must beat: interpolated Kneser-Ney over pairs of tokens.

With c(v w) how often w follows v in the training text, N(v .) the number of different tokens after v, N(. w)
that of different tokens before w, and N(. .) the number of different pairs:

    p(w | v)  = max(c(v w) - D, 0) / c(v .)  +  D N(v .) / c(v .) q(w)
    q(w)      = max(N(. w) - E, 0) / N(. .)  +  E |{w : N(. w) > 0}| / N(. .) / V

Kneser and Ney (ICASSP 1995) in the interpolated form of Chen and Goodman (Computer Speech and Language 13,
1999, eq. 25-29), with their estimate of the discounts: D = n1 / (n1 + 2 n2), where n1 and n2 pairs occur once
and twice; E the same from N(. w).  The uniform part of q gives tokens a chance that never occurred.  A
context that never occurred has p = q.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_sov.data.rows import Row
from megatron_sov.data.token_shards import Documents, Source
from megatron_sov.eval.heldout import HeldoutData, evaluate_rows
from megatron_sov.train.evaluate import HeldoutLoss

BLOCK_TOKENS = 1 << 22
"""Tokens that are counted at a time."""


class KneserNeyBigram:
    """Probabilities of a token given the one before it; memory grows with the number of different pairs."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._pairs = np.zeros(0, np.int64)
        """Sorted keys ``v * vocab_size + w`` of the pairs that occur."""
        self._counts = np.zeros(0, np.int64)

    def count(self, contexts: np.ndarray, targets: np.ndarray) -> None:
        """Add pairs of token ids [n] to the counts."""
        keys, counts = np.unique(contexts.astype(np.int64) * self.vocab_size + targets, return_counts=True)
        both = np.concatenate([self._pairs, keys])
        order = np.argsort(both, kind="stable")
        both, numbers = both[order], np.concatenate([self._counts, counts])[order]
        first = np.flatnonzero(np.diff(both, prepend=-1))
        self._pairs = both[first]
        self._counts = np.add.reduceat(numbers, first) if len(first) else numbers

    def fit(self) -> None:
        """Work out discounts and the lower-order distribution from the counts."""
        v, w = np.divmod(self._pairs, self.vocab_size)
        size = self.vocab_size
        self._context_count = np.bincount(v, weights=self._counts, minlength=size)
        self._followers = np.bincount(v, minlength=size)
        predecessors = np.bincount(w, minlength=size)
        self._discount = _discount(self._counts)
        lower = _discount(predecessors[predecessors > 0])
        num_pairs = max(len(self._pairs), 1)
        left = lower * np.count_nonzero(predecessors) if len(self._pairs) else 1.0
        self._continuation = np.maximum(predecessors - lower, 0) / num_pairs + left / num_pairs / size

    def logprobs(self, contexts: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return log p(target | context) [n] float64, after `fit`."""
        keys = contexts.astype(np.int64) * self.vocab_size + targets
        seen = np.zeros(len(keys))
        if len(self._pairs):
            place = np.minimum(np.searchsorted(self._pairs, keys), len(self._pairs) - 1)
            seen = np.where(self._pairs[place] == keys, self._counts[place] - self._discount, 0.0)
        total = self._context_count[contexts]
        known = total > 0
        weight = np.where(known, self._discount * self._followers[contexts] / np.maximum(total, 1), 1.0)
        return np.log(np.where(known, seen / np.maximum(total, 1), 0.0)
                      + weight * self._continuation[targets])


def _discount(counts: np.ndarray) -> float:
    """Return n1 / (n1 + 2 n2); 0.5 where nothing occurs once, since a discount of 0 would leave
    unseen pairs impossible."""
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return once / (once + 2 * twice) if once else 0.5


def token_blocks(documents: Documents, max_tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield neighbouring pairs (contexts, targets) inside documents, a few million at a time, from
    `max_tokens` tokens."""
    pending: list[np.ndarray] = []
    size = 0
    for document, length in enumerate(documents.lengths):
        count = min(int(length), max_tokens)
        max_tokens -= count
        if count:
            pending.append(documents.tokens(document, 0, count))
            size += count
        if size >= BLOCK_TOKENS:
            yield _pairs_inside(pending)
            pending, size = [], 0
        if max_tokens <= 0:
            break
    if pending:
        yield _pairs_inside(pending)


def _pairs_inside(documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    flat = np.concatenate(documents)
    starts = np.cumsum([len(d) for d in documents])[:-1]
    inside = np.ones(max(len(flat) - 1, 0), bool)
    inside[starts - 1] = False
    return flat[:-1][inside], flat[1:][inside]


def train_bigram(sources: list[Source], vocab_size: int, max_tokens: int) -> KneserNeyBigram:
    """Return a bigram fitted to the training splits of all sources together,
    to `max_tokens` tokens of each at most."""
    bigram = KneserNeyBigram(vocab_size)
    for source in sources:
        if source.num_tokens["train"]:
            for contexts, targets in token_blocks(source.shard("train"), max_tokens):
                bigram.count(contexts, targets)
    bigram.fit()
    return bigram


def evaluate_bigram(data: HeldoutData, max_train_tokens: int) -> dict[str, HeldoutLoss]:
    """Return the baseline's loss per source on the pairs (token,
    following token) that models are judged on."""
    bigram = train_bigram(data.sources, data.vocab_size, max_train_tokens)

    def losses_of(row: Row) -> np.ndarray:
        return -bigram.logprobs(row.tokens, row.labels)

    return evaluate_rows(data, losses_of)
