"""Figures of routing against their formulas, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_sov.runs.obs.routing import count_dead_experts, load_entropy, max_violation


def test_load_statistics_of_layers() -> None:
    load = np.array([[2.0, 2.0, 2.0, 2.0], [8.0, 0.0, 0.0, 0.0], [4.0, 2.0, 2.0, 0.0]])
    assert max_violation(load) == pytest.approx([0, 8 / 2 - 1, 4 / 2 - 1])
    assert count_dead_experts(load).tolist() == [0, 3, 1]
    third = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25)) / math.log(4)
    assert load_entropy(load) == pytest.approx([1, 0, third])
    assert load_entropy(10 * load) == pytest.approx([1, 0, third]), "shares or counts"


def test_single_expert_is_balanced() -> None:
    assert load_entropy(np.array([[5.0]])) == 1 and max_violation(np.array([[5.0]])) == 0
