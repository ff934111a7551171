"""Published FP8 weights with block scales."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sov import convert, recipes
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import LatentAttentionConfig, ModelConfig
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.family import TokenIds

RELEASED = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
            "weight_block_size": [128, 128]}
"""As DeepSeek-V3's config.json has it."""
ODD = "model.layers.0.mlp.down_proj.weight"
"""A matrix [130, 260], which no blocks fill."""


def build_small_model() -> ModelConfig:
    return replace(
        recipes.get("tiny-deepseek-v3").model, vocab_size=16, hidden_size=130, num_layers=2,
        num_dense_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, dense_ffn_dim=260, num_experts=2,
        num_expert_groups=1, num_groups_per_token=1, expert_ffn_dim=8,
        latent_attention=LatentAttentionConfig(8, 4, 4, 6))


def write_released_folder(folder: Path, quantised: dict[str, Any] | None = RELEASED) -> dict[str,
                                                                                             torch.Tensor]:
    """Write a folder in FP8, and return the values of its weights in float32."""
    model = build_small_model()
    family, expected, stored = models.get_family(model.family), {}, {}
    draw = torch.Generator().manual_seed(3)
    for name, shape in ((n, s) for link in family.links(model) for n, s in link.hf_shapes().items()):
        wide = torch.randn(shape, generator=draw)
        if "_proj." not in name or "eh_proj" in name:
            stored[name] = wide if name.endswith("correction_bias") else wide.bfloat16()
            continue
        rows, columns = (-(-n // 128) for n in shape)
        scales = torch.rand(rows, columns, generator=draw) + 0.01
        stored |= {name: wide.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
        expected[name] = stored[name].float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[
            :shape[0], :shape[1]]
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = family.to_hf_config(model, "bfloat16", TokenIds())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    return expected


def test_fp8_weights_are_scaled_per_block(tmp_path: Path) -> None:
    expected = write_released_folder(tmp_path / "hf")
    convert.from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    convert.to_hf(tmp_path / "checkpoint", tmp_path / "back")
    file = load_file(tmp_path / "back/model.safetensors")
    assert ODD in expected and not any("scale" in name for name in file)
    for name, product in expected.items():
        assert torch.equal(file[name], product.bfloat16()), name
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())


@pytest.mark.each(("quantised", "expected"), [
    ({**RELEASED, "weight_block_size": [1, 128]}, r"weight_block_size = \[1, 128\], but only"),
    ({**RELEASED, "quant_method": "awq"}, "quant_method = 'awq', but only"),
    ({"quant_method": "fp8"}, "weight_block_size = None, but only"),
    ({**RELEASED, "bits": 4}, "bits = 4, but only"),
    ("fp8", "must be an object"),
    (None, r"30 unexpected \(.*down_proj\.weight_scale_inv"),
])
def test_other_quantizations_are_rejected(quantised: Any, expected: str, tmp_path: Path) -> None:
    write_released_folder(tmp_path / "hf", quantised)
    with pytest.raises(UserError, match=expected):
        convert.from_hf(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.each(("change", "expected"), [
    (lambda t: t.pop(f"{ODD}_scale_inv"), rf"{ODD} has no scale"),
    (lambda t: t.update({f"{ODD}_scale_inv": torch.ones(3, 2)}), r"F32 \[3, 2\] and must be F32 \[2, 3\]"),
    (lambda t: t.update({f"{ODD}_scale_inv": torch.ones(2, 3).half()}), r"is F16 \[2, 3\] and must be F32"),
    (lambda t: t.update({"lm_head.weight_scale_inv": torch.ones(1, 2)}), "is BF16 .* and must be F8_E4M3"),
    (lambda t: t.update({f"{ODD}_scale_inv": torch.full((2, 3), float("inf"))}), "contains (infinity|NaN)"),
])
def test_invalid_scales_are_named(change: Any, expected: str, tmp_path: Path) -> None:
    write_released_folder(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=expected):
        convert.from_hf(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()

