"""Training data from a group of judged responses: the best response against the worst, or each response
with its place in the group.  Files (`sov-data pairs`, `groups`) and RL rounds (`policy.method = preference`)
use the same rules.  A truncated response may be a bad one, and is never learned as a good one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REWARD_TOLERANCE = 1e-8
"""Rewards no farther apart are equal (times the largest, if that is above 1): 0.1 + 0.2 + 0.3 and 0.6 differ
by the rounding of floats, which is no preference."""


def are_equal(rewards: Sequence[float]) -> bool:
    """Return whether rewards differ by no more than `REWARD_TOLERANCE`."""
    low, high = min(rewards), max(rewards)
    return bool(high - low <= REWARD_TOLERANCE * max(1.0, abs(low), abs(high)))


def pair_of(rewards: Sequence[float], ended: Sequence[bool], is_same: Callable[[int, int], bool]
            ) -> tuple[tuple[int, int] | None, int]:
    """Return the indices of the best and the worst response (West-of-N, arXiv 2401.12086), and the number of
    better responses that were passed over because they are truncated.

    Args:
        rewards: of the responses. Of equal rewards the first is taken; the best has to have ended.
        ended: whether each response ended by itself.
        is_same: whether two responses, given by their indices, are the same text with different rewards.

    Returns:
        None instead of a pair if no response that ended is better than the worst, or both are the same text.
    """
    places = range(len(rewards))

    def first_equal(reward: float, candidates: Sequence[int]) -> int:
        return next(i for i in candidates if are_equal((rewards[i], reward)))

    worst = first_equal(min(rewards), places)
    whole = [i for i in places if ended[i]]
    if not whole:
        return None, 1
    highest = max(rewards[i] for i in whole)
    best = first_equal(highest, whole)
    passed_over = int(not are_equal((highest, max(rewards))))
    if are_equal((rewards[best], rewards[worst])) or is_same(best, worst):
        return None, passed_over
    return (best, worst), passed_over


def places_in_group(rewards: Sequence[float]) -> list[float]:
    """Return the advantage of each response by K-EXAONE's technical report, ``2 (z - min z) / (max z - min z)
    - 1`` for rewards z that are not `are_equal`: from -1, the worst, to 1, the best."""
    low, high = min(rewards), max(rewards)
    return [2 * (z - low) / (high - low) - 1 for z in rewards]


def is_learned(place: float, ended: bool) -> bool:
    """Return whether a response is learned with its place; its group counts it in any case."""
    return ended or place <= REWARD_TOLERANCE
