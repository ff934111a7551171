"""What is learned of a group of judged responses, beside every pair that it has."""

from __future__ import annotations

from itertools import product

import pytest

from megatron_sov.base.documents.groups import is_learned, pair_of, places_in_group


def test_a_pair_is_of_the_best_that_ended_and_the_worst() -> None:
    texts = "abab"
    for rewards in product((0.0, 0.5, 1.0), repeat=4):
        for ended in product((True, False), repeat=4):
            pair, passed_over = pair_of(rewards, ended, lambda i, j: texts[i] == texts[j])
            worst = rewards.index(min(rewards))
            whole = [i for i in range(4) if ended[i]]
            best = max(whole, key=lambda i: (rewards[i], -i), default=worst)
            learns = rewards[best] > rewards[worst] and texts[best] != texts[worst]
            assert pair == ((best, worst) if learns else None)
            # a better one that did not end
            assert passed_over == (not any(ended[i] for i in range(4) if rewards[i] == max(rewards)))


def test_places_are_k_exaones() -> None:
    assert places_in_group([3.0, 1.0, 2.0, 1.5]) == pytest.approx([1.0, -1.0, 0.0, -0.5])
    # a good response that did not end, alone, is not learned
    assert [is_learned(place, False) for place in (1.0, 0.5, 0.0, -1.0)] == [False, False, True, True]
    assert is_learned(1.0, True)
