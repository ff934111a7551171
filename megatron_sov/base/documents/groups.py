"""What is learned of a group of judged responses: its best against its worst, or each by its place in
it.  The same of files (`sov-data pairs`, `groups`) and of rounds (`policy.method = preference`).  A
response that did not end may be a bad one, and is never learned as a good one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def pair_of(rewards: Sequence[float], ended: Sequence[bool], is_same: Callable[[int, int], bool]
            ) -> tuple[tuple[int, int] | None, int]:
    """Return the best and the worst of a group (West-of-N, arXiv 2401.12086), and how many better responses
    were passed over because they did not end.

    Args:
        rewards: of the responses; of equal ones the first is taken, and as the best one that ended.
        ended: whether each ended by itself.
        is_same: whether two of them say the same, which a reward may have judged in two ways.

    Returns:
        None in the pair's place where no response that ended is better than the worst, or both say the same.
    """
    places, passed_over = range(len(rewards)), 0
    worst = min(places, key=lambda i: rewards[i])
    best = max(places, key=lambda i: (rewards[i], ended[i]))
    if not ended[best]:
        passed_over = 1
        best = max((i for i in places if ended[i]), key=lambda i: rewards[i], default=worst)
    if rewards[best] > rewards[worst] and not is_same(best, worst):
        return (best, worst), passed_over
    return None, passed_over


def places_in_group(rewards: Sequence[float]) -> list[float]:
    """Return each response's advantage by K-EXAONE's technical report, ``2 (z - min z) / (max z - min z) -
    1``, of rewards z that are not all equal: from -1, the worst, to 1, the best."""
    low, high = min(rewards), max(rewards)
    return [2 * (z - low) / (high - low) - 1 for z in rewards]


def is_learned(place: float, ended: bool) -> bool:
    """Return whether a response is learned by its place; its group counts it in any case."""
    return ended or place <= 0
