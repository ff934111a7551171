"""Published FP8 weights with block scales."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_sov import recipes
from megatron_sov.model.config import LatentAttentionConfig, ModelConfig
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.family import TokenIds
from tests.convert.hf_folders import check_refused, edit_tensors, round_trip, write_folder

RELEASED_QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                         "weight_block_size": [128, 128]}
"""`quantization_config` in DeepSeek-V3's config.json."""
RAGGED = "model.layers.0.mlp.down_proj.weight"
"""A matrix [130, 260]: its last blocks of 128 x 128 are incomplete."""


def build_small_model() -> ModelConfig:
    return replace(
        recipes.get("tiny-deepseek-v3").model, vocab_size=16, hidden_size=130, num_layers=2,
        num_dense_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, dense_ffn_dim=260, num_experts=2,
        num_expert_groups=1, num_groups_per_token=1, expert_ffn_dim=8,
        latent_attention=LatentAttentionConfig(8, 4, 4, 6))


def write_released_folder(folder: Path,
                          quantization: dict[str, Any] | None = RELEASED_QUANTIZATION) -> dict[str,
                                                                                               torch.Tensor]:
    """Write a folder in FP8; return the float32 values of its scaled matrices."""
    model = build_small_model()
    family, expected, stored = models.get_family(model.family), {}, {}
    generator = torch.Generator().manual_seed(3)
    for name, shape in ((n, s) for link in family.links(model) for n, s in link.hf_shapes().items()):
        weight = torch.randn(shape, generator=generator)
        if "_proj." not in name or "eh_proj" in name:
            stored[name] = weight if name.endswith("correction_bias") else weight.bfloat16()
            continue
        rows, columns = (-(-n // 128) for n in shape)
        scales = torch.rand(rows, columns, generator=generator) + 0.01
        stored |= {name: weight.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
        expected[name] = stored[name].float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[
            :shape[0], :shape[1]]
    write_folder(folder, stored, family.to_hf_config(model, "bfloat16", TokenIds())
                 | {"quantization_config": quantization})
    return expected


def test_fp8_weights_are_scaled_per_block(tmp_path: Path) -> None:
    expected = write_released_folder(tmp_path / "hf")
    exported = load_file(round_trip(tmp_path / "hf", tmp_path) / "model.safetensors")
    assert RAGGED in expected and not any("scale" in name for name in exported)
    for name, expected_weight in expected.items():
        assert torch.equal(exported[name], expected_weight.bfloat16()), name
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())


@pytest.mark.each(("quantization", "expected"), [
    ({**RELEASED_QUANTIZATION, "weight_block_size": [1, 128]}, r"weight_block_size = \[1, 128\], but only"),
    ({**RELEASED_QUANTIZATION, "quant_method": "awq"}, "quant_method = 'awq', but only"),
    ({"quant_method": "fp8"}, "weight_block_size = None, but only"),
    ({**RELEASED_QUANTIZATION, "bits": 4}, "bits = 4, but only"),
    ("fp8", "must be an object"),
    (None, r"30 unexpected \(.*down_proj\.weight_scale_inv"),
])
def test_other_quantizations_are_rejected(quantization: Any, expected: str, tmp_path: Path) -> None:
    write_released_folder(tmp_path / "hf", quantization)
    check_refused(tmp_path / "hf", expected)


@pytest.mark.each(("change", "expected"), [
    (lambda t: t.pop(f"{RAGGED}_scale_inv"), rf"{RAGGED} has no scale"),
    (lambda t: t.update({f"{RAGGED}_scale_inv": torch.ones(3, 2)}), r"F32 \[3, 2\] and must be F32 \[2, 3\]"),
    (lambda t: t.update({f"{RAGGED}_scale_inv": torch.ones(2, 3).half()}),
     r"is F16 \[2, 3\] and must be F32"),
    (lambda t: t.update({"lm_head.weight_scale_inv": torch.ones(1, 2)}), "is BF16 .* and must be F8_E4M3"),
    (lambda t: t.update({f"{RAGGED}_scale_inv": torch.full((2, 3), float("inf"))}),
     "contains (infinity|NaN)"),
])
def test_invalid_scales_are_named(change: Any, expected: str, tmp_path: Path) -> None:
    write_released_folder(tmp_path / "hf")
    check_refused(edit_tensors(tmp_path / "hf", change), expected)

