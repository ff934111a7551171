"""Shuffling with a keyed permutation."""

import hashlib

import pytest
from hypothesis import given, settings, strategies as st

from megatron_sov.train.data.streams import Permutation


@settings(max_examples=40)
@given(st.integers(1, 300), st.integers(0, 2**31), st.text(max_size=5), st.integers(0, 9))
def test_every_index_occurs_once(size: int, seed: int, name: str, epoch: int) -> None:
    assert sorted(Permutation(size, seed, name, epoch).permute(0, size)) == list(range(size))


@given(st.integers(1, 10**12), st.data())
def test_any_stretch_is_the_network_walked_index_by_index(size: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, size - 1))
    last = min(size, first + 5)
    assert Permutation(size, "key").permute(first, last).tolist() == [
        compute_permutation(i, size, "key") for i in range(first, last)]


def compute_permutation(index: int, size: int, *key: object) -> int:
    """The definition in Python's own integers, one index at a time."""
    bits = max(1, ((max(size, 2) - 1).bit_length() + 1) // 2)
    digest = hashlib.blake2b(repr(key).encode(), digest_size=48).digest()
    value = index
    while True:
        left, right = value >> bits, value % 2**bits
        for i in range(6):
            x = ((right ^ int.from_bytes(digest[8 * i:8 * i + 8], "little")) + 0x9E3779B97F4A7C15) % 2**64
            x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
            left, right = right, left ^ ((x ^ x >> 31) % 2**bits)
        value = left << bits | right
        if value < size:
            return value


@pytest.mark.each("span", [(0, 6), (-1, 2), (3, 2)])
def test_indices_outside_are_refused(span: tuple[int, int]) -> None:
    with pytest.raises(IndexError, match="permutation of 5"):
        Permutation(5).permute(*span)
