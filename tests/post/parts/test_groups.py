"""Advantages in groups of any size, and GrouPER's loss, against plain Python."""

from __future__ import annotations

import math

import torch

from megatron_sov.post.parts.groups import grouper, spread_advantages
from megatron_sov.post.parts.preference import simper

GROUPS = {0: [0.2, 1.4, 0.8], 1: [3.0, 3.0], 2: [-1.0, 4.0], 3: [7.0]}
MEANS = {0: [-0.5, -1.2, -0.1], 1: [-2.0, -0.3], 2: [-0.9, -0.4], 3: [-1.0]}


def flat(by_group: dict[int, list[float]]) -> torch.Tensor:
    """Return the values of all groups, their responses in turns: groups need not lie together."""
    return torch.tensor([by_group[g][i] for i in range(3) for g in by_group if i < len(by_group[g])],
                        dtype=torch.float64)


def test_advantages_span_from_worst_to_best_of_each_group() -> None:
    numbers = flat({g: [g] * len(scores) for g, scores in GROUPS.items()}).long()
    found = spread_advantages(flat(GROUPS), numbers)
    expected = {g: [2 * (z - min(s)) / (max(s) - min(s)) - 1 if max(s) > min(s) else 0.0 for z in s]
                for g, s in GROUPS.items()}
    torch.testing.assert_close(found, flat(expected), rtol=1e-12, atol=0)
    assert spread_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_groups_count_alike_whatever_their_size() -> None:
    numbers = flat({g: [g] * len(scores) for g, scores in GROUPS.items()}).long()
    sizes = flat({g: [len(scores)] * len(scores) for g, scores in GROUPS.items()})
    means = flat(MEANS).requires_grad_()
    advantages = spread_advantages(flat(GROUPS), numbers)
    grouper(means, advantages, sizes).sum().backward()
    losses = {g: [-a * math.exp(m) / len(MEANS[g]) for a, m in zip(
        advantages[numbers == g].tolist(), MEANS[g], strict=True)] for g in MEANS}
    found = grouper(means.detach(), advantages, sizes)
    torch.testing.assert_close(found, flat(losses), rtol=1e-12, atol=0)
    # the derivative of exp is exp
    torch.testing.assert_close(means.grad, flat(losses), rtol=1e-12, atol=0)


def test_a_group_of_two_is_half_of_a_simper_pair() -> None:
    chosen, rejected = torch.tensor([-0.4], dtype=torch.float64), torch.tensor([-1.3], dtype=torch.float64)
    pair = grouper(torch.cat([chosen, rejected]), torch.tensor([1.0, -1.0]), torch.tensor([2, 2])).sum()
    torch.testing.assert_close(2 * pair, simper(chosen, rejected)[0], rtol=1e-12, atol=0)
