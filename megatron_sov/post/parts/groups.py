"""Groups of responses to one prompt, of any sizes: advantages from their scores, and GrouPER's loss."""

from __future__ import annotations

import torch


def spread_advantages(scores: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Return ``2 (z - min z) / (max z - min z) - 1`` [R] over each response's group (K-EXAONE's report, on
    GrouPER): 1 for the best, -1 for the worst; 0 where all of a group score alike, from which nothing is
    learned.

    Args:
        scores: [R] z, e.g. the sum of rule and rubric rewards.
        groups: [R] int64: number of each response's group, from 0.
    """
    num_groups = int(groups.max()) + 1 if len(groups) else 0
    empty = scores.new_zeros(num_groups)
    least = empty.scatter_reduce(0, groups, scores, "amin", include_self=False)[groups]
    most = empty.scatter_reduce(0, groups, scores, "amax", include_self=False)[groups]
    spread = most - least
    return torch.where(spread > 0, 2 * (scores - least) / spread.where(spread > 0, 1.0) - 1, 0.0)


def grouper(means: torch.Tensor, advantages: torch.Tensor, group_sizes: torch.Tensor) -> torch.Tensor:
    """Return GrouPER's losses [R] (K-EXAONE's report): ``-A exp(mean log p) / G``.

    Their sum over responses is the sum over groups of each group's mean. A response's loss needs nothing of
    the others', so that a group may lie in several micro-batches.

    Args:
        means: [R] the policy's log-probability per token of each response.
        advantages: [R] A, as `spread_advantages` gives them.
        group_sizes: [R] G, of each response's group.
    """
    return -advantages * means.exp() / group_sizes
