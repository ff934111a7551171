"""Settings of learning from preferences: each rule is told by the name of its setting."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from megatron_sov.config import PreferenceConfig
from megatron_sov.config.preference import PreferenceMethod


@pytest.mark.parametrize(("settings", "said"), [
    ({"beta": 0}, "preference.beta = 0 must be a number greater than 0"),
    ({"beta": float("nan")}, "preference.beta = nan"),
    ({"label_smoothing": 0.5}, "must lie in [0, 0.5)"),
    ({"label_smoothing": 0.1, "method": "ipo"}, "belongs to dpo, dpo-norm, simpo, not to"),
    ({"simpo_gamma": -1}, "preference.simpo_gamma = -1 must be"),
    ({"chosen_coeff": 0.1, "method": "orpo"}, "orpo learns chosen responses with a weight of 1"),
    ({"chosen_coeff": -1}, "preference.chosen_coeff = -1"),
    ({"chosen_coeff": 0.5, "method": "grouper"}, "groups have no chosen response"),
])
def test_a_rule_that_is_broken_is_named(settings: dict[str, Any], said: str) -> None:
    (problem,) = PreferenceConfig(**settings).problems()
    assert said in problem


def test_what_the_papers_use_is_sound() -> None:
    assert all(PreferenceConfig(method=method).problems() == []
               for method in get_args(PreferenceMethod))
