"""What from-hf writes, in which dtype, and what it does not overwrite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_sov import convert
from megatron_sov.artifacts import read_manifest
from megatron_sov.config import from_dict
from megatron_sov.errors import UserError
from megatron_sov.mcore.checkpoint.sharded_tensors import TensorReader


def test_checkpoint_is_complete(exaone_dir: Path, tmp_path: Path) -> None:
    convert.from_hf(exaone_dir, tmp_path / "ckpt")
    manifest = read_manifest(tmp_path / "ckpt", "checkpoint")
    assert manifest.content == {"step": 0, "parts": ["model"], "tokens": 0, "imported_from": exaone_dir.name}
    model = from_dict(manifest.settings).model
    assert ((model.num_dense_layers, model.num_mtp_layers, model.attention_pattern, model.head_dim)
            == (1, 1, "LLLG", 16))
    reader = TensorReader(tmp_path / "ckpt")
    assert reader.shape("decoder.layers.1.mlp.experts.experts.linear_fc1.weight") == (8, 48, 32)
    assert reader.dtype("decoder.layers.1.mlp.router.expert_bias") == torch.float32
    assert reader.dtype("decoder.layers.1.mlp.router.weight") == torch.bfloat16
    hf = load_file(exaone_dir / "model.safetensors")
    fc1 = reader.read("decoder.layers.3.mlp.experts.experts.linear_fc1.weight")
    assert torch.equal(fc1[5, :24], hf["model.layers.3.mlp.experts.5.gate_proj.weight"])
    assert torch.equal(fc1[5, 24:], hf["model.layers.3.mlp.experts.5.up_proj.weight"])
    assert torch.equal(reader.read("mtp.layers.0.eh_proj.weight"), hf["mtp.fc.weight"])


def test_output_that_exists_is_kept(solar_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("precious")
    with pytest.raises(UserError, match="already exists"):
        convert.from_hf(solar_dir, tmp_path / "out")
    with pytest.raises(UserError, match="not a 'checkpoint' artifact"):
        convert.from_hf(solar_dir, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/mine.txt").read_text() == "precious"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtype_is_cast_and_router_biases_stay_float32(hf_dir: Path, tmp_path: Path,
                                                      dtype: torch.dtype) -> None:
    convert.from_hf(hf_dir, tmp_path / "ckpt", str(dtype).removeprefix("torch."))
    convert.to_hf(tmp_path / "ckpt", tmp_path / "hf")
    found, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", hf_dir))
    assert found.keys() == before.keys()
    for name, tensor in before.items():
        assert found[name].equal(tensor if "correction" in name else tensor.to(dtype)), name
