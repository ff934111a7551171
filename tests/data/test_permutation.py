"""Shuffling by a keyed permutation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sov.data.permutation import Permutation


@given(st.integers(1, 700), st.integers(0, 2**31), st.text(max_size=5), st.integers(0, 9))
def test_every_index_occurs_once(size: int, seed: int, name: str, epoch: int) -> None:
    permutation = Permutation(size, seed, name, epoch)
    assert sorted(permutation[i] for i in range(size)) == list(range(size))


def test_the_key_decides_the_order() -> None:
    def order(*key: object) -> list[int]:
        permutation = Permutation(1000, *key)
        return [permutation[i] for i in range(1000)]

    assert order(1, "web", 0) == order(1, "web", 0)
    others = [order(2, "web", 0), order(1, "code", 0), order(1, "web", 1)]
    for other in others:
        agreeing = sum(a == b for a, b in zip(order(1, "web", 0), other, strict=True))
        assert agreeing < 10  # one place in common is what chance gives


def test_neighbours_are_scattered() -> None:
    permutation = Permutation(10_000, 7)
    steps = [abs(permutation[i + 1] - permutation[i]) for i in range(9_999)]
    assert 3_200 < sum(steps) / len(steps) < 3_470  # two uniform places are a third of the size apart: 3,333 +- 4 sigma


def test_a_permutation_of_trillions_needs_no_list() -> None:
    permutation = Permutation(10**13, 3)
    places = {permutation[i] for i in range(0, 10**13, 10**11)}
    assert len(places) == 100
    assert all(0 <= p < 10**13 for p in places)


def test_an_index_outside_is_refused() -> None:
    with pytest.raises(IndexError, match="index 5 is outside a permutation of 5"):
        Permutation(5)[5]
