"""Rules of sources, phases and skipped steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from megatron_sov.config import DataConfig, PhaseConfig, RunConfig, TrainConfig

Small = Callable[..., RunConfig]


@pytest.mark.parametrize(("data", "sentence"), [
    ({"phases": ()}, "data.phases = () must hold at least one phase"),
    ({"phases": (PhaseConfig("a", tokens=9), PhaseConfig("b"))},
     "data.phases: some phases have a budget in tokens and some"),
    ({"phases": (PhaseConfig("a", tokens=-9),)}, "data.phases.0 (a).tokens = -9 must not be negative"),
    ({"phases": (PhaseConfig("a", global_batch_size=-8),)},
     "data.phases.0 (a).global_batch_size = -8 must not be negative"),
    ({"phases": (PhaseConfig("a"), PhaseConfig("b", seq_len=10**6))},
     "data.phases.1 (b).seq_len = 1000000 exceeds"),
    ({"phases": (PhaseConfig("a", blend={"web": 0.0}),)}, "data.phases.0 (a).blend has only zero weights"),
    ({"skip_steps": ((0, 3),)},
     "data.skip_steps has [0, 3]; a stretch is [first, last] with 1 <= first <= last"),
    ({"skip_steps": ((5, 4),)}, "data.skip_steps has [5, 4]"),
    ({"prefetch_steps": -1}, "data.prefetch_steps = -1 must not be negative"),
    ({"max_epochs": -1.0}, "data.max_epochs = -1.0 must not be negative"),
])
def test_rules_of_the_data(data: dict[str, Any], sentence: str, small: Small) -> None:
    (problem,) = replace(small(), data=DataConfig(**data)).problems()
    assert problem.startswith(sentence)


@pytest.mark.parametrize(("train", "sentence"), [
    ({"ramp_from_batch_size": 4},
     "train.ramp_from_batch_size = 4 needs train.ramp_increment and train.ramp_steps above 0"),
    ({"ramp_from_batch_size": 9, "ramp_increment": 1, "ramp_steps": 5},
     "train.ramp_from_batch_size = 9 must lie between 0 and train.global_batch_size = 8"),
    ({"tokens": -1}, "train.tokens = -1 must not be negative"),
])
def test_rules_of_ramp_and_budget(train: dict[str, int], sentence: str, small: Small) -> None:
    (problem,) = replace(small(), train=TrainConfig(steps=10, **{"global_batch_size": 8, **train})).problems()
    assert problem.startswith(sentence)


def test_a_phases_budget_serves_where_the_run_has_none(small: Small) -> None:
    config = replace(small(), train=TrainConfig(global_batch_size=8),
                     data=DataConfig(phases=(PhaseConfig("a", tokens=128 * 80, seq_len=128),)))
    assert config.problems() == [] and config.num_steps() == 10


def test_every_batch_size_of_ramp_and_phases_must_split_over_the_ranks(small: Small) -> None:
    """Sizes 4, 6 and 8 by the ramp and 10 of the second phase: on 4 processes 6 and 10 do not fit."""
    config = replace(
        small(), train=TrainConfig(steps=10, global_batch_size=8, ramp_from_batch_size=4, ramp_increment=2,
                                   ramp_steps=4),
        data=DataConfig(phases=(PhaseConfig("a", seq_len=128),
                                PhaseConfig("b", seq_len=128, global_batch_size=10))))
    assert config.problems(2) == []
    assert [p.partition(" must")[0] for p in config.problems(4)] \
        == ["global_batch_size = 6 (phase a)", "global_batch_size = 10 (phase b)"]
