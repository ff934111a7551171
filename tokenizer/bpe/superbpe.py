"""Byte-level BPE and SuperBPE (arXiv 2503.13423) from tables of words.

Stage 1 merges bytes within words.  Stage 2 goes on where words are no longer split: the text is split by the
finished tokenizer's pattern, each of its units is encoded with the merges of stage 1, and merging continues
over those tokens.  Both stages encode by the finished pattern, so that applying all merges in their order, in
one step, gives the same tokens as stage 1 followed by stage 2.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tokenizer.bpe.merging import JoinRule
from tokenizer.bpe.pretoken_table import WordTable
from tokenizer.bpe.trainer import BATCH_MERGES, MergeLearner, Words
from tokenizer.bpe.vocabulary import Vocabulary, byte_ids
from tokenizer.presets import Preset

MIN_COUNT = 2
"""A pair that occurs less often is not merged."""
LEARNING_BYTES_PER_BYTE = 40
"""Memory that learning takes for each byte of distinct words (benchmarks/tokenizer_train.py measures it)."""
BLOCK_WORDS = 10_000
"""Words whose tokens are held as Python numbers at a time."""
ANYTHING = r"[\s\S]+"
"""Splits nothing."""
Progress = Callable[[int], object]


def learn_words(table: WordTable, vocabulary: Vocabulary, num_tokens: int, preset: Preset,
                progress: Progress) -> None:
    """Merge bytes within words until there are `num_tokens` tokens, or no pair occurs often enough."""
    words = Words(byte_ids()[table.raw], table.lengths_bytes, table.counts)
    # A letter, or the last byte of a wide space, and then a space: learned in a run of spaces, such a merge
    # would join two words of the finished tokenizer by their bytes before either word is whole.
    rule = JoinRule(vocabulary.max_token_bytes, 0, keeps_words_apart=bool(preset.superword_pattern),
                    only_superwords=False)
    _learn(words, rule, vocabulary, num_tokens, progress)


def learn_superwords(table: WordTable, vocabulary: Vocabulary, num_tokens: int, max_words: int, only: bool,
                     progress: Progress) -> None:
    """Go on merging over units that may hold several words.

    Args:
        table: units of the finished tokenizer's pattern.
        vocabulary: what stage 1 learned.
        num_tokens: tokens to reach; fewer where no pair occurs often enough.
        max_words: most words in one token.
        only: every further token is a superword, as long as the text has any, so that there are as many as
            asked for; else merging also goes on within words, as published, and how many superwords there
            will be depends on the text.
        progress: told how many merges there are more.
    """
    for only_superwords in [True] * only + [False]:
        if len(vocabulary.tokens) < num_tokens:
            rule = JoinRule(vocabulary.max_token_bytes, max_words, False, only_superwords)
            _learn(_units(table, vocabulary), rule, vocabulary, num_tokens, progress)


def _units(table: WordTable, vocabulary: Vocabulary) -> Words:
    """Return the units as the tokens learned so far; one of a single token has nothing to join."""
    lengths, symbols = _encoded(table, vocabulary)
    several = lengths > 1
    return Words(symbols[np.repeat(several, lengths)], lengths[several], table.counts[several])


def _encoded(table: WordTable, vocabulary: Vocabulary) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return how many tokens each word has, [words], and all tokens, one word after another."""
    encode = vocabulary.as_tiktoken(ANYTHING).encode_ordinary
    lengths, symbols = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
    words = table.words()
    while block := [encode(word.decode()) for word in itertools.islice(words, BLOCK_WORDS)]:
        lengths.append(np.fromiter(map(len, block), np.int64, len(block)))
        symbols.append(np.fromiter(itertools.chain.from_iterable(block), np.int32, int(lengths[-1].sum())))
    return np.concatenate(lengths), np.concatenate(symbols)


def _learn(words: Words, rule: JoinRule, vocabulary: Vocabulary, num_tokens: int, progress: Progress) -> None:
    num_merges = max(num_tokens - len(vocabulary.tokens), 0)
    merges = MergeLearner(words, vocabulary.tokens, rule, MIN_COUNT, num_merges).learn()
    while some := list(itertools.islice(merges, BATCH_MERGES)):
        for merge in some:
            vocabulary.add(merge)
        progress(len(some))
    assert len(set(vocabulary.tokens)) == len(vocabulary.tokens), (
        "two merges gave the same bytes, which exact BPE never does")
