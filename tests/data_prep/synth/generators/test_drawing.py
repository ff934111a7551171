"""Chance that follows from names: the same in every run, and even over many names."""

from __future__ import annotations

from collections import Counter

from scipy.stats import chisquare, kstest

from data_prep.synth.generators.drawing import choose, share_of, shuffled


def test_what_is_drawn_follows_from_names_alone() -> None:
    assert share_of("a", 1) == share_of("a", 1) == 0.14976907794029348
    assert share_of("a", 1) != share_of("a", "1")
    assert shuffled("abcde", "x") == shuffled("abcde", "x") != shuffled("abcde", "y")


def test_chance_is_even() -> None:
    assert kstest([share_of("even", i) for i in range(2000)], "uniform").pvalue > 0.01
    assert chisquare(list(Counter(choose("abcde", "one", i) for i in range(2000)).values())).pvalue > 0.01
    first = Counter(shuffled("abcd", "first", i)[0] for i in range(2000))
    assert chisquare(list(first.values())).pvalue > 0.01
