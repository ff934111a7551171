"""Published weights in eight and four bits, with the scales of their blocks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sov import convert, recipes
from megatron_sov.base.errors import UserError
from megatron_sov.convert.low_bit import unpacked
from megatron_sov.model.config import LatentAttentionConfig, ModelConfig, apply_settings
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.family import TokenIds

RELEASED = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
            "weight_block_size": [128, 128]}
"""As DeepSeek-V3's config.json has it."""
ODD = "model.layers.0.mlp.down_proj.weight"
"""A matrix [130, 260], which no blocks fill."""


def small() -> ModelConfig:
    return replace(
        recipes.get("tiny-deepseek-v3").model, vocab_size=16, hidden_size=130, num_layers=2,
        num_dense_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, dense_ffn_dim=260, num_experts=2,
        num_expert_groups=1, num_groups_per_token=1, expert_ffn_dim=8,
        latent_attention=LatentAttentionConfig(8, 4, 4, 6))


def released(folder: Path, quantised: dict[str, Any] | None = RELEASED) -> dict[str, torch.Tensor]:
    """Write a folder in 8 bits, and return the values that its weights stand for, in float32."""
    model = small()
    family, expected, stored = models.get(model.family), {}, {}
    draw = torch.Generator().manual_seed(3)
    for name, shape in ((n, s) for link in family.links(model) for n, s in link.hf_shapes().items()):
        wide = torch.randn(shape, generator=draw)
        if "_proj." not in name or "eh_proj" in name:
            stored[name] = wide if name.endswith("correction_bias") else wide.bfloat16()
            continue
        rows, columns = (-(-n // 128) for n in shape)
        scales = torch.rand(rows, columns, generator=draw) + 0.01
        stored |= {name: wide.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
        expected[name] = stored[name].float() * torch.tensor(
            [[float(scales[i // 128, j // 128]) for j in range(shape[1])] for i in range(shape[0])])
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = family.to_hf_config(model, "bfloat16", TokenIds())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    return expected


def test_weights_are_products_with_the_scales_of_their_blocks(tmp_path: Path) -> None:
    expected = released(tmp_path / "hf")
    convert.from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    convert.to_hf(tmp_path / "checkpoint", tmp_path / "back")
    found = load_file(tmp_path / "back/model.safetensors")
    assert ODD in expected and not any("scale" in name for name in found)
    for name, product in expected.items():
        assert torch.equal(found[name], product.bfloat16()), name
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())


@pytest.mark.parametrize(("quantised", "expected"), [
    ({**RELEASED, "weight_block_size": [1, 128]}, r"weight_block_size = \[1, 128\], but only"),
    ({**RELEASED, "quant_method": "awq"}, "quant_method = 'awq', but only"),
    ({"quant_method": "fp8"}, "weight_block_size = None, but only"),
    ({**RELEASED, "bits": 4}, "bits = 4, but only"),
    ("fp8", "must be an object"),
    (None, r"30 unexpected \(.*down_proj\.weight_scale_inv"),
])
def test_other_quantisations_are_refused(quantised: Any, expected: str, tmp_path: Path) -> None:
    released(tmp_path / "hf", quantised)
    with pytest.raises(UserError, match=expected):
        convert.from_hf(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("change", "expected"), [
    (lambda t: t.pop(f"{ODD}_scale_inv"), rf"{ODD} has no scale"),
    (lambda t: t.update({f"{ODD}_scale_inv": torch.ones(3, 2)}), r"F32 \[3, 2\] and must be F32 \[2, 3\]"),
    (lambda t: t.update({f"{ODD}_scale_inv": torch.ones(2, 3).half()}), r"is F16 \[2, 3\] and must be F32"),
    (lambda t: t.update({"lm_head.weight_scale_inv": torch.ones(1, 2)}), "is the scale of no tensor"),
    (lambda t: t.update({f"{ODD}_scale_inv": torch.full((2, 3), float("inf"))}), "holds infinity|holds NaN"),
])
def test_scales_that_do_not_fit_are_refused_by_name(change: Any, expected: str, tmp_path: Path) -> None:
    released(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=expected):
        convert.from_hf(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# MXFP4 weights: every byte under every scale as transformers unpacks them, a folder of them, and what is
# refused.


EXPERT = "model.layers.1.mlp.experts.down_proj"


def theirs(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks, scales)


def test_every_byte_under_every_scale_is_what_transformers_makes_of_it() -> None:
    """Infinities at the upper end included, which conversion refuses."""
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(255, 1, 16, 16)
    scales = torch.arange(255, dtype=torch.uint8).reshape(255, 1, 1).expand(255, 1, 16)
    ours = unpacked(blocks, scales).transpose(1, 2)
    assert torch.equal(ours.contiguous().view(torch.int16), theirs(blocks, scales).view(torch.int16))


def folder(path: Path) -> dict[str, torch.Tensor]:
    """Write a model of two layers whose experts are packed; its tensors."""
    model = apply_settings(recipes.get("tiny-gpt-oss"), [
        "model.vocab_size=16", "model.hidden_size=64", "model.num_layers=2", "model.num_experts=3",
        "model.expert_ffn_dim=32"]).model
    family = models.get(model.family)
    config = family.to_hf_config(model, "bfloat16", TokenIds()) | {"quantization_config": {
        "quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}}
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, shape in ((n, s) for link in family.links(model) for n, s in link.hf_shapes().items()):
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = shape
            tensors[f"{name}_blocks"] = torch.randint(
                256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator)
            tensors[f"{name}_scales"] = torch.randint(
                118, 124, (experts, outputs, inputs // 32), dtype=torch.uint8, generator=generator)
        else:
            tensors[name] = torch.randn(shape, generator=generator).bfloat16()
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return tensors


def test_a_packed_folder_comes_back_in_bfloat16(tmp_path: Path) -> None:
    packed = folder(tmp_path / "hf")
    convert.from_hf(tmp_path / "hf", tmp_path / "ckpt")
    convert.to_hf(tmp_path / "ckpt", tmp_path / "back")
    written = load_file(tmp_path / "back/model.safetensors")
    expected = {name: tensor for name, tensor in packed.items() if not name.endswith(("_blocks", "_scales"))}
    for name in (n.removesuffix("_blocks") for n in packed if n.endswith("_blocks")):
        expected[name] = theirs(packed[f"{name}_blocks"], packed[f"{name}_scales"])
    assert written.keys() == expected.keys() and len(expected) == 2 * 17 + 3
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config


@pytest.mark.parametrize(("damage", "expected"), [
    (lambda t: t.pop(f"{EXPERT}_scales"), f"{EXPERT}_blocks stands without {EXPERT}_scales"),
    (lambda t: t.pop(f"{EXPERT}_blocks"), f"{EXPERT}_scales"),
    (lambda t: t.update({EXPERT: torch.ones(1)}), f"holds {EXPERT}, which {EXPERT}_blocks holds as well"),
    (lambda t: t.update({f"{EXPERT}_scales": t[f"{EXPERT}_scales"][..., :0]}), "and MXFP4 is U8"),
    (lambda t: t.update({f"{EXPERT}_blocks": t[f"{EXPERT}_blocks"].int()}), "is I32"),
    (lambda t: t[f"{EXPERT}_scales"][0, 0].fill_(255), "holds 255, which is no number in E8M0"),
    (lambda t: t[f"{EXPERT}_scales"][0, 0].fill_(254), f"{EXPERT} holds (infinity|NaN)"),
    (lambda t: t.update({f"{EXPERT}_{part}": t[f"{EXPERT}_{part}"][:2] for part in ("blocks", "scales")}),
     r"of another shape \(model.layers.1.mlp.experts.down_proj \[2, 32, 64\] instead of \[3, 32, 64\]\)"),
])
def test_what_is_no_whole_mxfp4_weight_is_refused_by_name(damage: Any, expected: str,
                                                          tmp_path: Path) -> None:
    tensors = folder(tmp_path / "hf")
    damage(tensors)
    save_file(tensors, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=expected):
        convert.from_hf(tmp_path / "hf", tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()
