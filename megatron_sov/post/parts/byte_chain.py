"""How probable the beginnings of a text are to a model that writes it in tokens, byte by byte.

A text up to a byte is written in every way whose last token ends there or behind: the probability of that
beginning is the sum over all of them (covers: Vieira et al. 2024, "From language models over tokens to
language models over characters"; Phan et al. 2024, "Exact byte-level probabilities from tokenized language
models for FIM-tasks and model ensembles").  Here those are summed that leave the text's own tokens with their
last one.  Where a token of the text goes on, others may have ended inside of it, and what the model says
behind these is not known: how much that is, is told.  Probabilities of the next bytes are ratios of two such
sums, wherever tokens end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
NO_SYMBOL = -1
"""Behind the end of a token's spelling."""
CHUNK_ROWS = 256
"""Tokens, or stops, that are looked at at a time."""


@dataclass(frozen=True)
class Beginnings:
    """A text up to some of its symbols."""

    whole: Array
    """[n] log-probability of it, given the text's first token; NaN before that ends."""
    goes_on: Array
    """[n] the share of it that goes on with a symbol which was asked for, or may."""
    unknown: Array
    """[n] what may be missing of it, as a share."""


@dataclass(frozen=True)
class Chain:
    """What a model says behind each of the m tokens of a text."""

    ends: Array
    """[m] int64: symbols of the text up to the end of each of its tokens."""
    cumulative: Array
    """[m] float64: log-probability of its tokens up to each one, given the first."""
    tokens: Array
    """[m, M] int64: what may come behind each one, the text's own next token among it."""
    masses: Array
    """[m, M] float64: how probable that is."""
    table: Array
    """[tokens of the model, L] int32: the symbols of all its tokens, `NO_SYMBOL` behind their end."""
    sizes: Array
    """[m, M] int64: symbols, at most L, of what may come."""
    agrees: Array
    """[m, M] int64: symbols, at most L, in which what may come is the text."""

    @classmethod
    def of(cls, text: Array, ends: Array, tokens: Array, masses: Array, of_next: Array, table: Array
           ) -> Chain:
        """Lay what may come behind each token beside the text.

        Args:
            text: [n] its symbols: bytes, and a number beyond 255 for each special token.
            ends, tokens, masses, table: as in the class.
            of_next: [m] the log-probability of the text's own next token; anything for the last.
        """
        length = table.shape[1]
        behind = np.concatenate([text, np.full(length, NO_SYMBOL - 1)])
        agrees = np.empty(tokens.shape, np.int64)
        for first in range(0, len(ends), CHUNK_ROWS):
            rows = slice(first, first + CHUNK_ROWS)
            window = behind[ends[rows, None] + np.arange(length)]
            agrees[rows] = np.logical_and.accumulate(table[tokens[rows]] == window[:, None], axis=2).sum(2)
        sizes = (table != NO_SYMBOL).sum(1)[tokens]
        return cls(ends, np.concatenate([[0.0], np.cumsum(of_next[:-1])]), tokens, masses, table, sizes,
                   agrees)

    def beginnings(self, stops: Array, asked: Array) -> Beginnings:
        """Return how probable the text is up to some of its symbols, and that it goes on with some others.

        Args:
            stops: [n] symbols of the text, rising.
            asked: [n, symbols] bool: which symbols are asked for behind each; of those beyond, the last
                column says.
        """
        found = [self._some(stops[first:first + CHUNK_ROWS], asked[first:first + CHUNK_ROWS])
                 for first in range(0, len(stops), CHUNK_ROWS)]
        whole, goes_on, unknown = (np.concatenate(part) for part in zip(*found, strict=True))
        return Beginnings(whole, goes_on, unknown)

    def _some(self, stops: Array, asked: Array) -> tuple[Array, Array, Array]:
        stop, token = self._pairs(stops)
        length = (stops[stop] - self.ends[token])[:, None]
        last = np.searchsorted(self.ends, stops, side="right") - 1
        weight = np.exp(self.cumulative[token] - self.cumulative[last[stop]])[:, None]
        agrees, symbols = self.agrees[token], self.table.shape[1]
        mass = weight * self.masses[token]
        reaches = mass * (agrees >= length)
        symbol = self.table[self.tokens[token], np.minimum(length, symbols - 1)]
        goes_on = (length < symbols) & (symbol != NO_SYMBOL) & asked[
            stop[:, None], symbol.clip(max=asked.shape[1] - 1)]
        # tokens that are not the text's own, and end at a stop, or before it, inside of one that is
        inside = (token == last[stop])[:, None] & (length > 0)
        sizes = self.sizes[token]
        ended = inside & (agrees == sizes) & (sizes > 0)
        unknown = ended & (sizes == length) & np.asarray(asked.any(1))[stop, None]

        def over(values: Array) -> Array:
            """Return [n] sums of what is there of each stop."""
            return np.bincount(stop, values.sum(1), len(stops))

        total = over(reaches * (length > 0))
        total[stops == self.ends[0]] = 1.0  # the first token is given
        total[last < 0] = np.nan
        with np.errstate(divide="ignore", invalid="ignore"):
            return (self.cumulative[last] + np.log(total), over(reaches * goes_on + mass * unknown) / total,
                    over(mass * (ended & (sizes < length))) / total)

    def _pairs(self, stops: Array) -> tuple[Array, Array]:
        """Return each stop with all tokens of the text behind which one token may reach it."""
        first = np.searchsorted(self.ends, stops - self.table.shape[1], side="left")
        last = np.searchsorted(self.ends, stops, side="right")
        counts = last - first
        stop = np.repeat(np.arange(len(stops)), counts)
        return stop, np.arange(len(stop)) - np.repeat(counts.cumsum() - counts - first, counts)


def spelling_table(texts: Sequence[Sequence[int]], longest: int) -> Array:
    """Return [tokens, longest] int32 symbols of tokens, cut at a length, `NO_SYMBOL` behind their end."""
    table = np.full((len(texts), longest), NO_SYMBOL, np.int32)
    for row, text in zip(table, texts, strict=True):
        row[:min(len(text), longest)] = list(text[:longest])
    return table
