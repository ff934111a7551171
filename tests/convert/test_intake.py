"""What from-hf writes, what it does not overwrite, and that a killed conversion leaves nothing under its name."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sov import convert
from megatron_sov.artifacts import read_manifest
from megatron_sov.config import from_dict
from megatron_sov.errors import UserError
from megatron_sov.mcore.tensors import TensorReader


def test_checkpoint_is_complete(exaone_dir: Path, tmp_path: Path) -> None:
    convert.from_hf(exaone_dir, tmp_path / "ckpt")
    manifest = read_manifest(tmp_path / "ckpt", "checkpoint")
    assert manifest.content == {"step": 0, "parts": ["model"], "tokens": 0}
    model = from_dict(manifest.settings).model
    assert (model.num_dense_layers, model.num_mtp_layers, model.attention_pattern, model.head_dim) == (1, 1, "LLLG", 16)
    reader = TensorReader(tmp_path / "ckpt")
    assert reader.shape("decoder.layers.1.mlp.experts.experts.linear_fc1.weight") == (8, 48, 32)
    assert reader.dtype("decoder.layers.1.mlp.router.expert_bias") == torch.float32
    assert reader.dtype("decoder.layers.1.mlp.router.weight") == torch.bfloat16
    hf = load_file(exaone_dir / "model.safetensors")
    fc1 = reader.read("decoder.layers.3.mlp.experts.experts.linear_fc1.weight")
    assert torch.equal(fc1[5, :24], hf["model.layers.3.mlp.experts.5.gate_proj.weight"])
    assert torch.equal(fc1[5, 24:], hf["model.layers.3.mlp.experts.5.up_proj.weight"])
    assert torch.equal(reader.read("mtp.layers.0.eh_proj.weight"), hf["mtp.fc.weight"])


def test_a_router_bias_saved_in_bfloat16_becomes_float32(solar_dir: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    shutil.copytree(solar_dir, tmp_path / "hf")
    tensors = load_file(solar_dir / "model.safetensors")
    save_file(tensors | {name: tensors[name].bfloat16()}, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    convert.from_hf(tmp_path / "hf", tmp_path / "ckpt")
    bias = TensorReader(tmp_path / "ckpt").read("decoder.layers.0.mlp.router.expert_bias")
    assert bias.dtype == torch.float32
    assert torch.equal(bias, tensors[name].bfloat16().float())


def test_experts_of_different_dtypes_are_refused(solar_dir: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.2.down_proj.weight"
    shutil.copytree(solar_dir, tmp_path / "bad")
    tensors = load_file(solar_dir / "model.safetensors")
    save_file(tensors | {name: tensors[name].float()}, tmp_path / "bad/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} has dtype torch.float32"):
        convert.from_hf(tmp_path / "bad", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_that_exists_is_kept(solar_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("precious")
    with pytest.raises(UserError, match="already exists"):
        convert.from_hf(solar_dir, tmp_path / "out")
    with pytest.raises(UserError, match="not a 'checkpoint' artifact"):
        convert.from_hf(solar_dir, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/mine.txt").read_text() == "precious"


KILLED = """
    import os, signal, sys
    from megatron_sov import convert
    from megatron_sov.convert import shards, intake

    def die_in(module, name, calls):
        real, count = getattr(module, name), [0]
        def counted(*args):
            count[0] += 1
            if count[0] > calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)
        setattr(module, name, counted)

    action, source, out = sys.argv[1:]
    die_in(*((intake, "_block") if action == "from_hf" else (shards, "_write_file")), 1)
    getattr(convert, action)(source, out, **({} if action == "from_hf" else {"max_shard_bytes": 20_000}))
"""


@pytest.mark.parametrize("action", ["from_hf", "to_hf"])
def test_a_killed_conversion_leaves_nothing_under_its_name(solar_dir: Path, tmp_path: Path, action: str) -> None:
    convert.from_hf(solar_dir, tmp_path / "ckpt")
    source = solar_dir if action == "from_hf" else tmp_path / "ckpt"
    command = [sys.executable, "-c", textwrap.dedent(KILLED), action, str(source), str(tmp_path / "out")]
    assert subprocess.run(command, check=False, timeout=60).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out.tmp-*"))  # it was in the middle
    getattr(convert, action)(source, tmp_path / "out")
    assert not list(tmp_path.glob(".out.tmp-*"))
