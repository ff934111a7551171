"""Words and lines that tokenizers cut differently."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tokenizer.formats.loaders import Opened
from tokenizer.report.check import cut
from tokenizer.report.texts import NamedText

SAMPLE_BYTES = 300_000
NUM_WORDS, NUM_LINES = 8, 4
MOST_FREQUENT = 3000
MIN_LINE_CHARS, MAX_LINE_CHARS = 20, 120


def different_words(tokenizers: list[Opened], text: NamedText) -> list[dict[str, Any]]:
    """Return frequent words that are not cut alike, those first where the difference costs most tokens."""
    if not text.has_words:
        return []
    counts = Counter(word for chunk in text.part(SAMPLE_BYTES) for word in chunk.split())
    frequent = [word for word, _ in counts.most_common(MOST_FREQUENT)]
    return [{"text": word, "count": counts[word], "cuts": cuts} for word, cuts, _ in _different(
        tokenizers, [f" {word}" for word in frequent], lambda text: counts[text[1:]])[:NUM_WORDS]]


def different_lines(tokenizers: list[Opened], text: NamedText) -> list[dict[str, Any]]:
    """Return lines that are not cut alike, those first where the ratio of tokens is largest."""
    lines = dict.fromkeys(line.strip() for chunk in text.part(SAMPLE_BYTES) for line in chunk.split("\n"))
    fitting = [line for line in lines if MIN_LINE_CHARS <= len(line) <= MAX_LINE_CHARS]
    return [{"text": line, "num_tokens": sizes, "cuts": cuts} for line, cuts, sizes in
            _different(tokenizers, fitting, None)[:NUM_LINES]]


def _different(tokenizers: list[Opened], samples: list[str],
               count: Any) -> list[tuple[str, list[str], list[int]]]:
    """Return (sample, cut by each, tokens of each) of those that are not cut alike,
    the largest differences first."""
    encoded = [t.encode_many(samples) for t in tokenizers]
    found = []
    for i, sample in enumerate(samples):
        pieces = [tuple(t.tokens.get(id_, b"") for id_ in ids[i])
                  for t, ids in zip(tokenizers, encoded, strict=True)]
        if len(set(pieces)) > 1:
            sizes = [len(p) for p in pieces]
            weight = count(sample) * (max(sizes) - min(sizes)) if count else max(sizes) / max(1, min(sizes))
            found.append((weight, i, sample.strip(), [cut(list(p)) for p in pieces], sizes))
    return [(sample, cuts, sizes) for _, _, sample, cuts, sizes in sorted(found, key=lambda f: (-f[0], f[1]))]
