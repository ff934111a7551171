"""What lengths count, against the formulas of the papers, one response at a time."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sov.config import PolicyConfig
from megatron_sov.post.parts import advantages as parts
from megatron_sov.post.parts.advantages import advantages

GROUP = st.lists(st.tuples(st.integers(0, 4500), st.booleans()), min_size=1, max_size=9)
LONGEST = 4096


def split(group: list[tuple[int, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([n for n, _ in group]), np.array([is_right for _, is_right in group])


@given(GROUP)
def test_right_responses_near_the_middle_of_the_right_ones_get_most(group: list[tuple[int, bool]]) -> None:
    found = parts.around_right(*split(group), 100)
    of_right = sorted(n for n, is_right in group if is_right)
    for (n, is_right), bonus in zip(group, found, strict=True):
        if not is_right:
            assert bonus == 0
            continue
        low, high = (_percentile(of_right, p) for p in (0.3, 0.7))
        expected = 1.0 if low <= n <= high else max(0.0, 1 - min(abs(n - low), abs(n - high)) / 100)
        assert bonus == pytest.approx(expected, abs=1e-9)


def _percentile(values: list[int], share: float) -> float:
    place = share * (len(values) - 1)
    low = math.floor(place)
    return values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])


@given(GROUP, st.sampled_from([math.nan, 500.0]))
def test_right_responses_near_their_target_get_most(group: list[tuple[int, bool]], target: float) -> None:
    found = parts.near_target(*split(group), np.full(len(group), target), 120)
    for (n, is_right), bonus in zip(group, found, strict=True):
        wanted = statistics.median([m for m, r in group if r] or [0]) if math.isnan(target) else target
        assert bonus == pytest.approx(
            math.exp(-(n - wanted) ** 2 / (2 * 120 ** 2)) if is_right else 0.0, abs=1e-12)


@given(GROUP, st.data())
def test_a_budget_that_is_kept_gives_what_it_gives_and_less_beyond(group: list[tuple[int, bool]],
                                                                   data: st.DataObject) -> None:
    budgets = [data.draw(st.sampled_from([512, 1024, 2048, 2560])) for _ in group]
    found = parts.within_budget(*split(group), np.array(budgets), LONGEST, 4.0)
    for (n, is_right), budget, reward in zip(group, budgets, found, strict=True):
        expected = 0.0
        if is_right and n <= LONGEST:
            length = n if n > budget else budget
            expected = 4 * math.cos(math.pi * length / (2 * LONGEST)) - max(0, n - budget) / LONGEST
        assert reward == pytest.approx(expected, abs=1e-12)


def test_the_methods_put_them_together() -> None:
    rewards, lengths = np.array([1.0, 1.0, 0.0, 1.0]), np.array([100, 150, 700, 400])
    low, high = np.percentile([100, 150, 400], (30, 70))
    shaped = np.array([1 + 0.7 * (1 - (low - 100) / 100), 1.7, 0.0, 1 + 0.7 * max(0, 1 - (400 - high) / 100)])
    [group] = advantages([rewards], [lengths], PolicyConfig("lapo_d"), LONGEST)
    assert group.advantages == pytest.approx((shaped - shaped.mean()) / (shaped.std(ddof=1) + 1e-4))
    shaped = rewards + 0.8 * rewards * np.exp(-(lengths - 200.0) ** 2 / (2 * 120 ** 2))
    [group] = advantages([rewards], [lengths], PolicyConfig("lapo_i"), LONGEST, [np.full(4, 200)])
    assert group.advantages == pytest.approx((shaped - shaped.mean()) / (shaped.std(ddof=1) + 1e-4))

    budgets = np.array([512, 512, 2560, 2560])
    kept = 4 * np.cos(np.pi * budgets / (2 * LONGEST))
    given_ = np.array([kept[0], kept[1], 0.0, kept[3]])
    intra = np.array([0.0, 0.0, *[kept[3] / 2 - kept[3]] * 2])
    [group] = advantages([rewards], [lengths], PolicyConfig("hbpo"), LONGEST, [budgets])
    assert group.advantages == pytest.approx(
        (given_ - given_.mean()) / (given_.std(ddof=1) + 1e-4) + intra)


def test_a_group_that_is_all_right_still_learns_lengths() -> None:
    [group] = advantages([np.ones(3)], [np.array([10, 500, 510])], PolicyConfig("lapo_d"), LONGEST)
    assert group.reason == "" and np.argmin(group.advantages) == 0
