"""FP8 weights of compressed-tensors are values times scale, and other formats are rejected."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_sov import convert
from megatron_sov.base.errors import UserError
from megatron_sov.convert.sources import HfWeights
from tests.convert.hf_folders import edit_tensors, write_folder

WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "tensor"}
FIELD = {"quant_method": "compressed-tensors", "format": "float-quantized",
         "quantization_status": "compressed", "ignore": ["lm_head"],
         "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}}}


def write_fp8_copy(source: Path, folder: Path, field: Any = FIELD) -> dict[str, torch.Tensor]:
    """Write a copy of a Hugging Face folder with FP8 projections, one scale each; return values times
    scale."""
    tensors = {name: t for file in source.glob("*.safetensors") for name, t in load_file(file).items()}
    products = {}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        scale = tensors[name].abs().max().float().reshape(1) / 448
        numbers = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        tensors |= {name: numbers, f"{name}_scale": scale}
        products[name] = (numbers.float() * scale).bfloat16()
    write_folder(folder, tensors,
                 json.loads((source / "config.json").read_text()) | {"quantization_config": field})
    return products


def test_fp8_weight_is_values_times_scale(solar_dir: Path, tmp_path: Path) -> None:
    products = write_fp8_copy(solar_dir, tmp_path / "fp8")
    weights = HfWeights(tmp_path / "fp8")
    assert len(products) > 10 and weights.list_names() == HfWeights(solar_dir).list_names()
    for name, product in products.items():
        assert torch.equal(weights.read(name), product), name
    convert.from_hf(tmp_path / "fp8", tmp_path / "checkpoint", workers=1)
    convert.to_hf(tmp_path / "checkpoint", tmp_path / "back", workers=1)
    back = HfWeights(tmp_path / "back")
    assert all(torch.equal(back.read(name), product) for name, product in products.items())
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())


@pytest.mark.each("field", [
    FIELD | {"format": "nvfp4-pack-quantized"}, FIELD | {"format": "mxfp4-pack-quantized"},
    FIELD | {"format": "pack-quantized"}, FIELD | {"format": None}, FIELD | {"config_groups": {}},
    FIELD | {"config_groups": []}, FIELD | {"transform_config": {"a": 1}},
    FIELD | {"config_groups": {"g": {"weights": WEIGHTS | {"strategy": "channel"}}}},
    FIELD | {"config_groups": {"g": {"weights": WEIGHTS | {"num_bits": 4}}}},
    FIELD | {"config_groups": {"g": {"weights": None}}}])
def test_other_compressed_tensors_formats_are_rejected(field: Any, solar_dir: Path, tmp_path: Path) -> None:
    write_fp8_copy(solar_dir, tmp_path / "other", field)
    with pytest.raises(UserError, match="only supported compressed-tensors format is float-quantized"):
        HfWeights(tmp_path / "other")


@pytest.mark.each(("change", "expected"), [
    (lambda t, name: t.pop(f"{name}_scale"), "has no scale"),
    (lambda t, name: t.pop(name), "is missing, although"),
    (lambda t, name: t.update({f"{name}_scale": torch.ones(2)}), r"_scale is F32 \[2\] and must be"),
    (lambda t, name: t.update({name: t[name].float()}), r"is F32 .* and must be"),
    (lambda t, name: t.update({name: t[name].flatten()}), "an FP8 weight is a matrix")])
def test_incomplete_fp8_weight_is_named(change: Any, expected: str, solar_dir: Path, tmp_path: Path) -> None:
    name = next(iter(write_fp8_copy(solar_dir, tmp_path / "fp8")))
    edit_tensors(tmp_path / "fp8", lambda tensors: change(tensors, name))
    with pytest.raises(UserError, match=expected) as error:
        HfWeights(tmp_path / "fp8")
    assert name in str(error.value)
