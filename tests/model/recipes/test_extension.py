"""Longer contexts: scaled rotary embeddings, the length at which scaling starts, and the size of
micro-batches."""

from dataclasses import replace

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.model.config import ExtendStageConfig, OptimConfig, PhaseConfig, apply_settings
from megatron_sov.model.recipes import get
from megatron_sov.model.recipes.extension import (
    extend_model, find_micro_batch_size, length_settings, phase_setting, stage_phases)


def test_rotations_are_stretched_only_where_every_layer_is_global() -> None:
    solar, k_exaone = get("tiny-solar-open").model, get("tiny-k-exaone").model
    longer = extend_model(solar, 256, 1024)
    assert longer.yarn is not None
    assert (longer.yarn.factor, longer.yarn.original_max_position_tokens) == (4.0, 256)
    assert replace(longer, yarn=None, max_position_tokens=solar.max_position_tokens) == solar
    assert extend_model(k_exaone, 256, 1024) == k_exaone
    still = get("tiny-solar-open2").model
    assert extend_model(still, 256, 1024) == still
    assert extend_model(still, 256, 8192).max_position_tokens == 8192
    with pytest.raises(UserError, match="model rotates"):
        extend_model(still, 256, 1024, yarn_factor=2)
    assert extend_model(solar, 256, 256) == solar


def test_a_second_extension_counts_from_the_first_length() -> None:
    twice = extend_model(extend_model(get("tiny-solar-open").model, 256, 1024), 1024, 8192)
    assert twice.yarn is not None
    assert (twice.yarn.factor, twice.yarn.original_max_position_tokens) == (32.0, 256)
    assert twice.max_position_tokens == 8192
    assert extend_model(twice, 1024, 4096) == twice, "its rotations reach as far already"


def test_a_stage_may_name_the_context_that_is_stretched() -> None:
    solar = get("solar-open-102b").model
    assert extend_model(solar, 4096, 32768, yarn_factor=1) == solar
    far = extend_model(solar, 32768, 102400, yarn_factor=2, yarn_original_tokens=65536)
    assert far.yarn is not None
    assert (far.yarn.factor, far.yarn.original_max_position_tokens) == (2.0, 65536)
    assert far.max_position_tokens == 131072
    extended = extend_model(solar, 32768, 65536, yarn_original_tokens=65536)
    assert extended == solar, "reached without stretching"
    with pytest.raises(UserError, match="yarn_original_tokens = 256:"):
        extend_model(get("tiny-k-exaone").model, 256, 1024, yarn_original_tokens=256)


def test_stages_as_phases_take_all_their_steps() -> None:
    stages = (ExtendStageConfig("a", seq_len=64, steps=3, max_steps=5, global_batch_size=2, lr=1e-3),
              ExtendStageConfig("b", seq_len=128, tokens=999, global_batch_size=1))
    near, far = stage_phases(stages, OptimConfig(lr=1e-4, warmup_steps=7))
    assert near == PhaseConfig("a", tokens=640, seq_len=64, global_batch_size=2, lr=1e-3, rewarm_steps=7)
    assert (far.tokens, far.lr) == (999, 1e-4)


@pytest.mark.each(("limit_tokens", "seq_len", "per_rank", "expected"), [
    (2048, 512, 16, 4), (2048, 512, 6, 3), (2048, 1024, 7, 1), (256, 512, 8, 1), (2048, 256, 4, 4)])
def test_micro_batches_keep_their_tokens_and_divide_the_batch(limit_tokens: int, seq_len: int, per_rank: int,
                                                              expected: int) -> None:
    assert find_micro_batch_size(limit_tokens, seq_len, per_rank) == expected


def test_settings_make_a_sound_run_of_every_recipe() -> None:
    for name in ("tiny-solar-open", "tiny-k-exaone", "solar-open-102b", "k-exaone-236b"):
        recipe = get(name)
        trained = max(p.seq_len for p in recipe.data.phases)
        longer = extend_model(recipe.model, trained, 2 * trained)
        settings = length_settings(recipe, longer, trained, 2 * trained, recipe.train.global_batch_size)
        config = apply_settings(recipe,
                                ["parallel.ep=1", "train.steps=100", phase_setting(2 * trained), *settings])
        assert config.problems(1) == []
        assert [p.seq_len for p in config.data.phases] == [2 * trained]
        assert config.needle.lengths_tokens == (trained, 2 * trained)
        assert config.train.micro_batch_size == max(1, recipe.train.micro_batch_size // 2)
