"""Flat ranges are rectangles, against numpy's own order of elements."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_sov.mcore.optimizer.flat_ranges import flat_ranges

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(shape=SHAPES, data=st.data())
def test_a_range_of_elements_is_a_few_rectangles_in_the_order_of_the_elements(shape: list[int],
                                                                              data: st.DataObject) -> None:
    size = int(np.prod(shape))
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    numbers = np.arange(size).reshape(shape)
    found = list(flat_ranges(shape, start, stop))
    taken = [numbers[tuple(slice(o, o + n) for o, n in zip(place, extent, strict=True))].ravel()
             for place, extent in found]
    assert np.concatenate([*taken, np.empty(0, int)]).tolist() == list(range(start, stop))
    assert len(found) <= 2 * len(shape) - 1
    assert all(part.size for part in taken)


def test_a_range_is_cut_at_rows_and_no_finer() -> None:
    assert list(flat_ranges([4, 3], 0, 12)) == [((0, 0), (4, 3))]
    assert list(flat_ranges([4, 3], 2, 10)) == [((0, 2), (1, 1)), ((1, 0), (2, 3)), ((3, 0), (1, 1))]
    assert list(flat_ranges([4, 3], 4, 5)) == [((1, 1), (1, 1))]
    assert list(flat_ranges([7], 2, 5)) == [((2,), (3,))]
    assert list(flat_ranges([4, 3], 5, 5)) == []
