"""What Transformer Engine keeps of quantised weights, against sizes counted by hand, and which weights those
are, against the model's parameters."""

from __future__ import annotations

import pytest

from megatron_sov import recipes
from megatron_sov.config import RunConfig, apply_settings
from megatron_sov.models.count import TABLES
from megatron_sov.plan.fitting import fullest
from megatron_sov.plan.held import held, stage_params, weight_bytes
from megatron_sov.plan.held import quantized_weight_bytes as kept_bytes

HIDDEN, HEAD_DIM, NUM_EXPERTS = 4096, 128, 128
"""Of Solar Open: 64 heads and 8 of keys, 48 layers of experts of 1280, the shared one too."""


def solar(*changes: str) -> RunConfig:
    return apply_settings(recipes.get("solar-open-102b"), ["parallel.pp=4", "parallel.ep=8", *changes])


@pytest.mark.parametrize(("fp8", "rows", "columns", "by_hand"), [
    # a byte for each value and one for each of the transposed copy, one float32 scale
    ("tensorwise", 300, 200, 60_000 + 60_000 + 4),
    # 3 x 2 blocks of 128: scales [3, 4] rowwise, the blocks of a row filled up to 4; [2, 4] columnwise
    ("blockwise", 300, 200, 120_000 + 4 * (12 + 8)),
    ("blockwise", 2560, 4096, 2 * 2560 * 4096 + 4 * (20 * 32 + 32 * 20)),
    # 192 / 32 = 6 scales of a row, filled up to 8, for 384 rows; 320 / 32 = 10, up to 12, for 256 columns
    ("mxfp8", 320, 192, 2 * 320 * 192 + 384 * 8 + 12 * 256),
    # half a byte for a value; 192 / 16 = 12 scales of each of 384 rows, 320 / 16 = 20 of each of 256 columns;
    # two float32
    ("nvfp4", 320, 192, 320 * 192 + 384 * 12 + 256 * 20 + 8)])
def test_a_weight_takes_what_is_counted_by_hand(fp8: str, rows: int, columns: int, by_hand: int) -> None:
    assert weight_bytes(fp8, rows, columns) == by_hand


@pytest.mark.parametrize("recipe", ["solar-open-102b", "k-exaone-236b"])
def test_all_but_norms_routers_and_tables_is_quantised(recipe: str) -> None:
    """With two bytes for each number and four for each weight, the bytes count both."""
    config = apply_settings(recipes.get(recipe), ["train.fp8=tensorwise", "parallel.pp=4", "parallel.ep=8",
                                                  "parallel.tp=2", "parallel.sp=true", "parallel.etp=2"])
    m = config.model
    for stage, params in enumerate(stage_params(config)):
        layers = config.parallel.layers_of_stage(stage, m.num_layers)
        num_moe = sum(layer >= m.num_layers - m.num_moe_layers() for layer in layers)
        last, predicts = stage == 3, m.num_mtp_layers * (stage == 3)
        norms = 2 * m.hidden_size + (2 * m.head_dim if m.qk_norm else 0)
        whole = (norms * (len(layers) + predicts) + last * m.hidden_size + 3 * m.hidden_size * predicts
                 + num_moe * m.hidden_size * m.num_experts)
        tables = sum(part.numel for runs in held(config, stage) for _, parts in runs for part in parts
                     if part.key in TABLES)
        experts = 2 * m.num_experts // 8 + 2 * (m.num_shared_experts > 0)
        weights = 2 * len(layers) + num_moe * experts + 2 * (len(layers) - num_moe) + 5 * predicts
        numbers = params.dense + params.experts - whole - tables
        assert kept_bytes(config, stage) == 2 * numbers + 4 * weights


def test_layers_in_bf16_keep_nothing_beside_their_weights() -> None:
    """Half of the first of four stages, and of the last one."""
    sums = [[kept_bytes(solar("train.fp8=mxfp8", *changes), stage) for stage in range(4)] for changes in (
        (), ("train.fp8_bf16_layers_at_start=6", "train.fp8_bf16_layers_at_end=6"))]
    whole = sums[0][0]
    assert sums == [[whole] * 4, [whole // 2, whole, whole, whole // 2]]
    assert kept_bytes(solar(), 0) == 0


def test_the_prediction_layer_is_quantised_in_8_bits_alone() -> None:
    config = recipes.get("k-exaone-236b")
    without = apply_settings(config, ["model.num_mtp_layers=0"])
    for fp8, counts in (("mxfp8", True), ("nvfp4", False)):
        one, other = (kept_bytes(apply_settings(c, [f"train.fp8={fp8}"]), 0) for c in (config, without))
        assert (one > other) is counts


def test_the_account_of_a_process_has_them() -> None:
    """By hand: 9.2 GiB of weights in bf16 are 2.17 GiB of vocabulary and what is twice a byte."""
    (_, before), (_, after) = (fullest(solar(*changes), 512) for changes in ((), ("train.fp8=tensorwise",)))
    assert after.total - before.total == after.quantized_weights
    attention = HIDDEN * HEAD_DIM * (64 + 2 * 8 + 64)
    experts = (NUM_EXPERTS // 8 + 1) * 3 * HIDDEN * 1280
    assert after.quantized_weights == 12 * (2 * (attention + experts) + 4 * (2 + 2 * 17))
