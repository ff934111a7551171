"""Folders in few bits: their bytes against the library compressed-tensors, what transformers makes of them,
and the way there and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_sov import convert
from megatron_sov.base.errors import UserError
from megatron_sov.convert.low_bit import FORMATS, FP8_BLOCK
from megatron_sov.convert.sources import HfWeights

GOLDEN = Path(__file__).with_name("compressed_tensors.json")
"""What compressed-tensors 0.17.0 stores of `numbers()` for scales of ours, and what it reads, as hex."""


def numbers() -> torch.Tensor:
    return torch.tensor([[((7 * i * i + 13 * i * j + 5 * j) % 255 - 127) / 97 * 2.0 ** (j // 32 - i)
                          for j in range(64)] for i in range(3)])


def as_hex(tensor: torch.Tensor) -> str:
    return bytes(tensor.contiguous().view(torch.uint8).flatten().tolist()).hex()


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_bytes_and_what_they_stand_for_are_those_of_compressed_tensors(name: str) -> None:
    golden, form = json.loads(GOLDEN.read_text())[name], FORMATS[name]
    stored = form.pack(numbers(), float(numbers().abs().max()))
    assert {suffix: as_hex(tensor) for suffix, tensor in stored.items()} | {
        "read": as_hex(form.unpack(stored))} == golden


@pytest.mark.parametrize("name", list(FORMATS))
def test_what_is_read_has_no_rounding_in_bfloat16(name: str) -> None:
    """In float64 the product of numbers and scales is the same: scales are powers of two."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(130, 288, generator=draw) * torch.rand(130, 1, generator=draw)
    weight[5], weight[7, :32] = 0, 0
    form = FORMATS[name]
    stored = form.pack(weight, float(weight.abs().max()))
    found = form.unpack(stored)
    assert {suffix: (tuple(t.shape), t.dtype) for suffix, t in stored.items()} == form.sizes((130, 288))
    assert float((found.double() - weight.double()).norm() / weight.double().norm()) < form.largest_error
    if form is FP8_BLOCK:
        scales = stored["_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)[:130, :288]
        assert torch.equal(found.double(), stored[""].double() * scales.double())
    assert torch.equal(found[5], torch.zeros(288).bfloat16())


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_folder_holds_rounded_layers_and_comes_back_exactly(name: str, hf_dir: Path,
                                                              tmp_path: Path) -> None:
    convert.to_hf(hf_dir, tmp_path / "few", quantize=name, workers=1)
    few, whole, form = HfWeights(tmp_path / "few"), HfWeights(hf_dir), FORMATS[name]
    assert few.low_bit() == name and few.names() == whole.names()
    quantised = {n for n in few.names() if not torch.equal(few.read(n), whole.read(n))}
    assert quantised and all(n.endswith("_proj.weight") and ".layers." in n for n in quantised)
    kept = json.loads((tmp_path / "few/config.json").read_text())["quantization_config"][form.kept]
    assert {"lm_head", "model.embed_tokens", "model.layers.1.mlp.gate"} <= set(kept)
    proof = convert.verify(hf_dir, tmp_path / "few", load=False, workers=1)
    assert proof.passed and any("largest change of a weight" in check.name for check in proof.checks)
    convert.from_hf(tmp_path / "few", tmp_path / "checkpoint", workers=1)
    convert.to_hf(tmp_path / "checkpoint", tmp_path / "back", workers=1)
    back = HfWeights(tmp_path / "back")
    assert all(torch.equal(back.read(n), few.read(n)) for n in few.names())


def test_engines_may_join_weights_since_these_share_a_scale(exaone_dir: Path, tmp_path: Path) -> None:
    convert.to_hf(exaone_dir, tmp_path / "few", quantize="fp8-tensor", workers=1)
    tensors = load_file(tmp_path / "few/model.safetensors")
    scales = [tensors[f"model.layers.1.self_attn.{n}_proj.weight_scale"] for n in "qkvo"]
    assert scales[0] == scales[1] == scales[2]
    experts = [tensors[f"model.layers.1.mlp.experts.3.{n}_proj.weight_scale"] for n in ("gate", "up")]
    assert experts[0] == experts[1]


def test_transformers_makes_the_same_of_blocks(solar_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    convert.to_hf(solar_dir, tmp_path / "few", quantize="fp8-block", workers=1)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "few", dtype="bfloat16").state_dict()
    few = HfWeights(tmp_path / "few")
    same = [n for n in few.names() if n in loaded]
    assert len(same) > 10 and all(torch.equal(loaded[n], few.read(n)) for n in same)
    assert torch.equal(loaded["model.layers.1.mlp.experts.down_proj"][3],
                       few.read("model.layers.1.mlp.experts.3.down_proj.weight"))


def test_what_cannot_be_rounded_is_refused(solar_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--quantize 'fp8': does not exist.*formats: fp8-block"):
        convert.to_hf(solar_dir, tmp_path / "few", quantize="fp8")
    convert.to_hf(solar_dir, tmp_path / "few", quantize="fp8-tensor", workers=1)
    with pytest.raises(UserError, match="is in fp8-tensor already"):
        convert.to_hf(tmp_path / "few", tmp_path / "fewer", quantize="nvfp4")
    with pytest.raises(UserError, match="a checkpoint or a run"):
        convert.to_hf(solar_dir, tmp_path / "fewer")
