"""Groups of settings: derived values, and the rules within each group."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from megatron_sov.base.settings import SettingsProblem
from megatron_sov.model.config import (
    AudioEncoderConfig, DataConfig, ParallelConfig, PhaseConfig, RunConfig, TrainConfig, VisionEncoderConfig,
    YarnConfig, apply_settings)
from megatron_sov.model.recipes import get


@pytest.mark.each(("settings", "message"), [
    ([], ""),
    (["model.latent_attention.kv_lora_rank=500"],
     "needs a multiple of 16, and model.latent_attention.kv_lora_rank = 500"),
    (["model.latent_attention.v_head_dim=97", "parallel.tp=32"],
     "needs a multiple of 16, and model.num_heads 128 x model.latent_attention.v_head_dim 97 / parallel.tp "
     "32 = 388"),
])
def test_quantised_sizes_are_those_of_its_weights(settings: list[str], message: str) -> None:
    problems = apply_settings(get("deepseek-v3"), ["train.fp8=tensorwise", *settings]).problems()
    rules = [problem.rule for problem in problems if problem.key == "train.fp8"]
    if message:
        assert message in rules
    else:
        assert not rules


# Settings of encoders: how many features they make, and everything that is wrong at once.


@pytest.mark.each(("encoder", "slots"), [
    (VisionEncoderConfig(image_size=392), 196), (VisionEncoderConfig(image_size=56, merge_size=4), 1),
    (VisionEncoderConfig("siglip", image_size=384, patch_size=16), 576),
    (AudioEncoderConfig(), 750), (AudioEncoderConfig("whisper"), 1500),
    (AudioEncoderConfig(compression=25), 30)])
def test_features_of_a_record(encoder: Any, slots: int) -> None:
    assert encoder.slots == slots


# Rules of a layout.


Small = Callable[..., RunConfig]


def test_shared_experts_are_split_like_attention(small: Small) -> None:
    """They are one wide feed-forward network, split over tensor-parallel ranks."""
    def problems(expert_ffn_dim: int, num_shared_experts: int) -> list[SettingsProblem]:
        model = small(num_heads=6, num_kv_heads=3, expert_ffn_dim=expert_ffn_dim,
                      num_shared_experts=num_shared_experts).model
        return ParallelConfig(tp=3, sp=True).problems(model, num_ranks=3)

    assert [problem.key for problem in problems(32, 2)] == ["parallel.tp"]
    assert problems(32, 0) == problems(32, 3) == problems(48, 1) == []


def test_yarns_table_is_cut_as_rows_are(small: Small) -> None:
    def problems(cp: int, original_max_position_tokens: int) -> list[SettingsProblem]:
        model = small(yarn=YarnConfig(original_max_position_tokens=original_max_position_tokens)).model
        return ParallelConfig(cp=cp).problems(model, num_ranks=cp)

    assert [(problem.key, problem.way_out) for problem in problems(3, 65536)] == [
        ("parallel.cp", "use one of 1, 2, 4, 8, 16, 32, 64, 128")]
    assert problems(4, 65536) == problems(3, 65538) == problems(1, 65535) == []
    assert ParallelConfig(cp=3).problems(small().model, num_ranks=3) == []


def test_layers_of_a_stage() -> None:
    """Layer runs are ordered: the first run of every stage, then the second ones."""
    assert [ParallelConfig(pp=2, vpp=2).stage_layers(stage, 8) for stage in (0, 1)] == [
        [0, 1, 4, 5], [2, 3, 6, 7]]
    uneven = ParallelConfig(pp=2, vpp=2, pipeline_layout=(3, 2, 2, 1))
    assert [uneven.stage_layers(stage, 8) for stage in (0, 1)] == [[0, 1, 2, 5, 6], [3, 4, 7]]


# Rules of sources, phases and skipped steps.


def test_phase_budgets_replace_a_missing_run_budget(small: Small) -> None:
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
        ("train.ramp_from_batch_size", 4), ("data.phases.1.global_batch_size", 10)]


@pytest.mark.each(("settings", "num_ranks", "way_out"), [
    ("train.global_batch_size=510 train.micro_batch_size=8", 2, "set train.global_batch_size=512, or "
     "train.micro_batch_size=5"),
    ("train.global_batch_size=16 train.micro_batch_size=8", 3, "set train.global_batch_size=24"),
    ("train.global_batch_size=7 train.micro_batch_size=4", 1, "set train.global_batch_size=8, or "
     "train.micro_batch_size=1"),
    ("train.global_batch_size=100 train.micro_batch_size=1", 64, "set train.global_batch_size=128"),
    ("train.global_batch_size=90 train.micro_batch_size=1", 64, "set train.global_batch_size=64"),
    ("train.global_batch_size=1 train.micro_batch_size=2", 1, "set train.global_batch_size=2, or "
     "train.micro_batch_size=1"),
    ("train.global_batch_size=16 train.ramp_from_batch_size=5 train.ramp_increment=3 train.ramp_steps=4 "
     "train.micro_batch_size=4", 1, "set train.ramp_from_batch_size=4 and train.ramp_increment=4"),
    ("train.global_batch_size=8 data.phases.0.global_batch_size=6 train.micro_batch_size=2", 2,
     "set data.phases.0.global_batch_size=8, or train.micro_batch_size=1")])
def test_a_batch_that_does_not_divide_is_refused_with_numbers_that_do(settings: str, num_ranks: int,
                                                                      way_out: str) -> None:
    config = apply_settings(get("tiny-qwen3"), ["train.global_batch_size=8", *settings.split()])
    problems = config.problems(num_ranks)
    assert problems and problems[0].way_out == way_out
    # each of the ways alone leads out
    for change in way_out.removeprefix("set ").split(", or "):
        assert apply_settings(config, change.split(" and ")).problems(num_ranks) == []
