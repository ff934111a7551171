"""Build training data from a group of judged responses: best and worst as a pair, or an advantage per
response.

Files (`sov-data pairs`, `groups`) and RL rounds (`policy.method = preference`) use the same rules. A
truncated response may be a bad example but never a good one.
"""

from collections.abc import Callable, Sequence

REWARD_TOLERANCE = 1e-8
"""Rewards closer than this (relative to the largest above 1) are equal, as 0.1 + 0.2 + 0.3 and 0.6."""


def are_equal(rewards: Sequence[float]) -> bool:
    """Return whether rewards differ by no more than `REWARD_TOLERANCE`."""
    low, high = min(rewards), max(rewards)
    return bool(high - low <= REWARD_TOLERANCE * max(1.0, abs(low), abs(high)))


def choose_pair(rewards: Sequence[float], ended: Sequence[bool], is_same: Callable[[int, int], bool]
                ) -> tuple[tuple[int, int] | None, int]:
    """Choose a group's best and worst response (West-of-N, arXiv 2401.12086).

    Args:
        rewards: one reward per response; of equal rewards the first counts.
        ended: whether each response ended by itself; the best response must have.
        is_same: whether two responses (by index) have the same text in spite of different rewards.

    Returns:
        (best index, worst index) or None if there is no preference; and the number of better responses passed
        over because they were truncated.
    """
    places = range(len(rewards))

    def first_equal(reward: float, candidates: Sequence[int]) -> int:
        return next(i for i in candidates if are_equal((rewards[i], reward)))

    worst = first_equal(min(rewards), places)
    complete = [i for i in places if ended[i]]
    if not complete:
        return None, 1
    highest = max(rewards[i] for i in complete)
    best = first_equal(highest, complete)
    passed_over = int(not are_equal((highest, max(rewards))))
    if are_equal((rewards[best], rewards[worst])) or is_same(best, worst):
        return None, passed_over
    return (best, worst), passed_over


def compute_group_advantages(rewards: Sequence[float]) -> list[float]:
    """Return an advantage per response by K-EXAONE's technical report: -1 for the worst, 1 for the best.

    The formula is ``2 (z - min z) / (max z - min z) - 1`` for rewards z that are not `are_equal`.
    """
    low, high = min(rewards), max(rewards)
    return [2 * (z - low) / (high - low) - 1 for z in rewards]


def should_train(advantage: float, ended: bool) -> bool:
    """Return whether training uses a response; unused responses still count in the group."""
    return ended or advantage <= REWARD_TOLERANCE
