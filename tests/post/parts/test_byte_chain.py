"""Probabilities of the beginnings of texts, compared with those that are counted in the texts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_sov.post.parts.translation import NO_SYMBOL, Chain, spelling_table

TOKENS = [b"a", b"b", b"c", b"ab", b"abc", b"."]
TEXTS = {("a", "c", "."): 0.1, ("ab", "b", "."): 0.2, ("abc", "."): 0.3, ("b", "ab", "a", "."): 0.25,
         ("b", "abc", "c", "."): 0.15}
"""A text in its tokens, and how often it comes behind the first token, a "."."""


def chain(text: tuple[str, ...]) -> Chain:
    """Return what a model that knows the texts says beside one of them."""
    names = [token.decode() for token in TOKENS]
    masses = np.zeros((len(text) + 1, len(TOKENS)))
    for other, share in TEXTS.items():
        for i in range(len(text)):
            if other[:i] == text[:i]:
                masses[i, names.index(other[i])] += share
    masses[:-1] /= masses[:-1].sum(1, keepdims=True)
    own = [names.index(token) for token in text]
    of_next = np.append(np.log(masses[np.arange(len(text)), own]), 0.0)
    ends = np.cumsum([1, *map(len, text)])
    symbols = np.frombuffer(("." + "".join(text)).encode(), np.uint8).astype(np.int64)
    tokens = np.tile(np.arange(len(TOKENS)), (len(text) + 1, 1))
    return Chain.of(symbols, ends, tokens, masses, of_next, spelling_table(TOKENS, 3))


@pytest.mark.parametrize("text", TEXTS)
def test_every_beginning_is_as_probable_as_the_texts_that_begin_so(text: tuple[str, ...]) -> None:
    """But for what is told to be unknown: inside of "abc", "ab" may have ended, and what stands behind it is
    another context."""
    spelled, asked = "".join(text), np.zeros((len("".join(text)), 256), bool)
    asked[:, ord("b")] = True
    found = chain(text).beginnings(np.arange(1, len(spelled) + 1), asked)
    num_known = 0
    for end, (whole, on, unknown) in enumerate(zip(found.whole, found.goes_on, found.unknown, strict=True)):
        begin = {"".join(other): share for other, share in TEXTS.items()
                 if "".join(other).startswith(spelled[:end])}
        right, with_b = sum(begin.values()), sum(s for other, s in begin.items() if other[end:end + 1] == "b")
        assert math.exp(whole) <= right + 1e-9 <= math.exp(whole) * (1 + unknown) + 2e-9
        assert on >= with_b / right - 1e-9
        num_known += math.exp(whole) == pytest.approx(right) and on == pytest.approx(with_b / right)
    assert num_known >= len(spelled) - 1


def test_a_first_token_of_several_bytes_is_given_whole() -> None:
    table = spelling_table([b"xy", b"z"], 2)
    assert table.tolist() == [[120, 121], [122, NO_SYMBOL]]
    found = Chain.of(np.array([120, 121, 122]), np.array([2, 3]), np.array([[1, 0], [1, 0]]),
                     np.array([[0.75, 0.25], [0.5, 0.5]]), np.array([math.log(0.75), 0.0]), table)
    whole = found.beginnings(np.array([1, 2, 3]), np.zeros((3, 256), bool)).whole
    assert np.isnan(whole[0]) and whole[1:].tolist() == pytest.approx([0.0, math.log(0.75)])
