"""Recall and mean rank of retrieval, against sorting and against counting orders."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from megatron_sov.eval.media import Group, Rank, Row, grouped, rank_figures, ranks
from megatron_sov.eval.statistics import mean_interval, wilson_interval


def rows(*answers: str) -> list[Row]:
    return [Row([{"type": "image", "path": f"{n}.png"}], answer) for n, answer in enumerate(answers)]


def test_groups_are_even_and_hold_every_row_once() -> None:
    found = grouped(rows(*"abcdeabcdef"), 4, 0)
    assert [len(group.rows) for group in found] == [3, 4, 4]
    assert sorted(n for group in found for n in group.rows) == list(range(11))
    assert all(len(set(group.answers)) == len(group.answers) for group in found)
    assert found == grouped(rows(*"abcdeabcdef"), 4, 0) != grouped(rows(*"abcdeabcdef"), 4, 1)


def test_ranks_are_those_of_sorting() -> None:
    """Texts behind media, and media for texts; of several right ones the best counts."""
    of, random = rows(*"abcabd"), np.random.default_rng(0)
    group = Group([5, 3, 1, 0, 2, 4], list("dbac"))
    table = random.normal(size=(6, 4))
    texts, media = ranks(of, [group], [table.tolist()])
    for place, number in enumerate(group.rows):
        order = [group.answers[i] for i in np.argsort(-table[place])]
        assert texts[place] == Rank(1 + order.index(of[number].answer), 4, 1)
    for place, answer in enumerate(group.answers):
        order = [of[group.rows[i]].answer for i in np.argsort(-table[:, place])]
        assert media[place] == Rank(1 + order.index(answer), 6, "abcabd".count(answer))


@pytest.mark.parametrize("wrong", [-1.0, float("nan")])
def test_what_is_as_good_or_no_number_stands_before(wrong: float) -> None:
    (first, second), _ = ranks(rows("a", "b"), [Group([0, 1], ["a", "b"])], [[[-1.0, wrong], [-2.0, -1.0]]])
    assert (first.rank, second.rank) == (2, 1)


def test_figures_and_chance() -> None:
    """Chance by counting all orders of candidates."""
    found = [Rank(1, 6, 2), Rank(4, 6, 1), Rank(6, 6, 1)]
    told = rank_figures(found)
    assert (told["num_questions"], told["num_candidates"], told["ranks"]) == (3, 6, [1, 4, 6])
    assert (told["recall_at_1"], told["recall_at_5"], told["mean_rank"]) == (1 / 3, 2 / 3, 11 / 3)
    assert told["recall_at_1_interval"] == list(wilson_interval(1, 3))
    low, high = mean_interval([0, 3 / 5, 1])
    assert told["mean_rank_interval"] == pytest.approx([1 + 5 * low, 1 + 5 * high])
    firsts = {r: [1 + min(order.index(i) for i in range(r)) for order in permutations(range(6))]
              for r in (1, 2)}
    for k in (1, 5):
        by_counting = [np.mean(np.array(firsts[one.num_right]) <= k) for one in found]
        assert told[f"chance_at_{k}"] == pytest.approx(np.mean(by_counting))
    assert told["chance_mean_rank"] == pytest.approx(np.mean([np.mean(firsts[r]) for r in (2, 1, 1)]))
    assert rank_figures([Rank(1, 2, 1)])["recall_at_5"] == rank_figures([Rank(1, 2, 1)])["chance_at_5"] == 1
