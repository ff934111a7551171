"""A longer context: which rotations are stretched, from which length on, and how large micro-batches stay."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_sov.config import apply_settings
from megatron_sov.recipes import get
from megatron_sov.recipes.extension import extended, length_settings, micro_batch_size, phase_setting


def test_rotations_are_stretched_only_where_every_layer_is_global() -> None:
    solar, k_exaone = get("tiny-solar-open").model, get("tiny-k-exaone").model
    longer = extended(solar, 256, 1024)
    assert longer.yarn is not None
    assert (longer.yarn.factor, longer.yarn.original_max_position_tokens) == (4.0, 256)
    assert replace(longer, yarn=None, max_position_tokens=solar.max_position_tokens) == solar
    assert extended(k_exaone, 256, 1024) == k_exaone
    assert extended(solar, 256, 256) == solar


def test_a_second_extension_counts_from_the_first_length() -> None:
    twice = extended(extended(get("tiny-solar-open").model, 256, 1024), 1024, 8192)
    assert twice.yarn is not None
    assert (twice.yarn.factor, twice.yarn.original_max_position_tokens) == (32.0, 256)
    assert twice.max_position_tokens == 8192
    assert extended(twice, 1024, 4096) == twice, "its rotations reach as far already"


def test_the_published_solar_has_its_rotations_from_the_start() -> None:
    solar = get("solar-open-102b").model
    assert extended(solar, 4096, 131072) == solar


@pytest.mark.parametrize(("limit_tokens", "seq_len", "per_rank", "expected"),
                         [(2048, 512, 16, 4), (2048, 512, 6, 3), (2048, 1024, 7, 1), (256, 512, 8, 1), (2048, 256, 4, 4)])
def test_micro_batches_keep_their_tokens_and_divide_the_batch(limit_tokens: int, seq_len: int, per_rank: int,
                                                             expected: int) -> None:
    assert micro_batch_size(limit_tokens, seq_len, per_rank) == expected


def test_settings_make_a_sound_run_of_every_recipe() -> None:
    for name in ("tiny-solar-open", "tiny-k-exaone", "solar-open-102b", "k-exaone-236b"):
        recipe = get(name)
        trained = max(p.seq_len for p in recipe.data.phases)
        longer = extended(recipe.model, trained, 2 * trained)
        settings = length_settings(recipe, longer, trained, 2 * trained, recipe.train.global_batch_size)
        config = apply_settings(recipe, ["parallel.ep=1", "train.steps=100", phase_setting(2 * trained), *settings])
        assert config.problems(1) == []
        assert [p.seq_len for p in config.data.phases] == [2 * trained]
        assert config.needle.lengths_tokens == (trained, 2 * trained)
        assert config.train.micro_batch_size == max(1, recipe.train.micro_batch_size // 2)
