"""Rules of sources, phases and skipped steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megatron_sov.config import DataConfig, PhaseConfig, RunConfig, TrainConfig

Small = Callable[..., RunConfig]


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
    assert [(p.key, p.value) for p in config.problems(4)] == [
        ("train.global_batch_size", 6), ("train.global_batch_size", 10)]
