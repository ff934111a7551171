"""Sizes are reached, and the structure of a recipe stays what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.config import apply_settings, from_dict
from megatron_sov.errors import UserError
from megatron_sov.ladder.family import TOLERANCE, family, parse_size, parse_sizes, size_of
from megatron_sov.ladder.members import members
from megatron_sov.ladder.results import FILE, read
from megatron_sov.models.count import num_params


@pytest.mark.parametrize(("text", "size"), [("250K", 250_000), ("1.5m", 1_500_000), ("2B", 2 * 10**9),
                                            (" 77 ", 77)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text, "--predict") == size


@pytest.mark.parametrize("text", ["", "0", "-1M", "1MM", "M", "1e6", "NaN", "1_000", "9" * 40, "99999999B"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--predict .*must be a number of parameters"):
        parse_size(text, "--predict")


def test_sizes_are_sorted_and_each_stands_once() -> None:
    assert parse_sizes("2M,500K,1M", "--sizes") == [500_000, 1_000_000, 2_000_000]
    with pytest.raises(UserError, match="names a size twice"):
        parse_sizes("1M,1000K", "--sizes")


@pytest.mark.parametrize(("recipe", "sizes"), [
    ("tiny-solar-open", [12_000, 48_000, 192_000, 800_000]),
    ("tiny-qwen3", [12_000, 48_000, 192_000, 800_000]),
    ("tiny-k-exaone", [100_000, 400_000, 1_600_000]),
    ("solar-open-102b", [10**8, 4 * 10**8, 16 * 10**8]),
    ("k-exaone-236b", [10**8, 4 * 10**8, 16 * 10**8]),
    ("qwen3-8b", [10**7, 10**8, 10**9])])
def test_models_have_their_size_and_the_recipes_proportions(recipe: str, sizes: list[int]) -> None:
    base = recipes.get(recipe).model
    found = family(base, sizes[:-1], sizes[-1])
    for model, size in zip(found, sizes, strict=True):
        assert model.problems() == []
        assert size_of(model) == pytest.approx(size, rel=TOLERANCE)
        aspect = (model.hidden_size / model.num_layers) / (base.hidden_size / base.num_layers)
        heads = (model.num_heads * model.head_dim / model.hidden_size) / (
            base.num_heads * base.head_dim / base.hidden_size)
        assert 0.3 < aspect < 2.5 and heads == pytest.approx(1, abs=0.35)
        assert model.num_heads // model.num_kv_heads == base.num_heads // base.num_kv_heads
        for name in ("vocab_size", "num_experts", "num_experts_per_token", "num_dense_layers",
                     "attention_pattern", "family", "tied_embeddings"):
            assert getattr(model, name) == getattr(base, name)
        assert set(model.layer_types()) == set(base.layer_types())
    assert len({model.head_dim for model in found}) == 1
    assert [m.hidden_size for m in found] == sorted(m.hidden_size for m in found)


def test_embeddings_and_resting_experts_are_no_part_of_the_size() -> None:
    model = recipes.get("tiny-solar-open").model
    assert size_of(model) == num_params(model).active - 2 * 2048 * 128
    dense = recipes.get("tiny-qwen2").model
    assert dense.tied_embeddings and size_of(dense) == num_params(dense).total - 2048 * 128


def test_a_structure_that_does_not_come_so_small_is_named() -> None:
    with pytest.raises(UserError, match=r"--sizes: 100 parameters cannot be had .* the nearest size is"):
        family(recipes.get("tiny-k-exaone").model, [100], 4000)


def test_factors_of_one_width_are_refused() -> None:
    with pytest.raises(UserError, match=r"embedding_multiplier = 10\.0, .*logits_multiplier = 0\.125: "):
        family(recipes.get("tiny-hyperclovax").model, [100_000], 200_000)


# The settings of each run of a ladder follow from the recipe's and its size.


BASE = apply_settings(recipes.get("tiny-solar-open"), ["train.global_batch_size=8", "parallel.zero1=true"])
SIZES = [50_000, 200_000]


def test_tokens_steps_and_rates_follow_from_the_size() -> None:
    small, large = members(BASE, SIZES[:1], SIZES[1], [20.0], "mup", keeps_layout=False)
    assert (small.name, large.name) == ("50K", "200K")
    for m in (small, large):
        assert m.num_tokens == 20 * m.num_params == m.config.train.tokens
        assert m.config.num_steps() == pytest.approx(m.num_tokens / (8 * 256), abs=3)
        assert m.config.problems() == [] and from_dict(m.config.to_dict()) == m.config
        assert m.config.train.checkpoint_every_steps * 4 >= m.config.num_steps()
    rates = [m.config.optim.lr * m.config.optim.groups[0].lr_scale * m.config.model.hidden_size
             for m in (small, large)]
    assert rates == pytest.approx([BASE.optim.lr * BASE.model.hidden_size] * 2)


def test_a_layout_is_kept_where_it_is_asked_for() -> None:
    assert not members(BASE, SIZES[:1], SIZES[1], [20.0], "mup", keeps_layout=False)[0].config.parallel.zero1
    assert members(BASE, SIZES[:1], SIZES[1], [20.0], "mup", keeps_layout=True)[0].config.parallel.zero1


def test_fitted_rates_bring_their_batch_size() -> None:
    for m in members(BASE, [200_000], 800_000, [20.0], "step-law", keeps_layout=False):
        t = m.config.train
        assert t.global_batch_size * 256 == pytest.approx(0.58 * m.num_tokens**0.571, rel=0.1)
        assert t.global_batch_size % t.micro_batch_size == 0 and m.config.problems() == []
        assert m.config.optim.groups == ()


def test_several_proportions_are_runs_of_their_own() -> None:
    found = members(BASE, SIZES[:1], SIZES[1], [10.0, 40.0], "mup", keeps_layout=False)
    assert [m.name for m in found] == ["50K-10", "50K-40", "200K-10", "200K-40"]


def test_runs_of_too_few_steps_are_refused() -> None:
    with pytest.raises(UserError, match=r"50K: .* tokens make \d steps of train\.global_batch_size = 4096"):
        members(apply_settings(BASE, ["train.global_batch_size=4096"]), SIZES[:1], SIZES[1], [20.0],
                "mup", keeps_layout=False)


# A ladder's file that somebody has changed is told as damaged.


SOUND = {"name": "50K", "predicted": {"loss": 1.0}, "made_s": 3.0}


@pytest.mark.parametrize("predictions", [5, [5], {"a": 1}, ["50K"], [{"name": "50K"}],
                                         [{**SOUND, "made_s": "soon"}], [{**SOUND, "made_s": None}]])
def test_predictions_of_another_kind_are_refused(predictions: Any, tmp_path: Path) -> None:
    file = tmp_path / FILE
    file.write_text(json.dumps({"format_version": 1, "predictions": predictions}))
    with pytest.raises(UserError, match=r"ladder\.json: is damaged .*; delete it"):
        read(tmp_path)
    file.write_text(json.dumps({"format_version": 1, "predictions": [SOUND]}))
    assert read(tmp_path)["predictions"] == [SOUND]
