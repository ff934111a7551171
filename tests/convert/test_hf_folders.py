"""Files and dtypes that from-hf and to-hf write, and outputs that they do not overwrite."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_sov import convert, recipes
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint.sharded_tensors import TensorReader
from megatron_sov.model.config import LatentAttentionConfig, from_dict
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.family import TokenIds
from tests.convert.hf_folders import round_trip, write_folder


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read all shards with the safetensors library."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors"))
            for name, tensor in load_file(file).items()}


def assert_same_bits(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_shards_are_bounded_and_load_in_transformers(exaone_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    convert.from_hf(exaone_dir, tmp_path / "ckpt")
    convert.to_hf(tmp_path / "ckpt", tmp_path / "hf", max_shard_bytes=20_000)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 5
    sizes = [sum(t.nbytes for t in load_file(f).values()) for f in files]
    assert max(sizes) <= 20_000 and sum(sizes) == index["metadata"]["total_size"]
    assert_same_bits(read_tensors(tmp_path / "hf"), read_tensors(exaone_dir))
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert {index["weight_map"][name] for name in opened.keys()} == {file.name}  # noqa: SIM118
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    convert.from_hf(tmp_path / "hf", tmp_path / "again")
    assert convert.verify(tmp_path / "ckpt", tmp_path / "again").passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtype_is_cast_and_router_biases_stay_float32(hf_dir: Path, tmp_path: Path,
                                                      dtype: torch.dtype) -> None:
    expected = {name: t if "correction" in name else t.to(dtype) for name, t in read_tensors(hf_dir).items()}
    assert sum("correction" in name for name in expected) >= 2
    dtype_name = str(dtype).removeprefix("torch.")
    for number, (imported, exported) in enumerate(((dtype_name, "keep"), ("keep", dtype_name))):
        convert.from_hf(hf_dir, checkpoint := tmp_path / f"checkpoint-{number}", imported)
        convert.to_hf(checkpoint, hf := tmp_path / f"hf-{number}", exported)
        assert_same_bits(read_tensors(hf), expected)
        assert json.loads((hf / "config.json").read_text())["dtype"] == dtype_name


# Files that from-hf writes, their dtype, and files that it does not overwrite.


def test_checkpoint_is_complete(exaone_dir: Path, tmp_path: Path) -> None:
    convert.from_hf(exaone_dir, tmp_path / "ckpt")
    manifest = read_manifest(tmp_path / "ckpt", "checkpoint")
    assert manifest.content == {"step": 0, "parts": ["model"], "tokens": 0, "imported_from": exaone_dir.name}
    model = from_dict(manifest.settings).model
    assert ((model.num_dense_layers, model.num_mtp_layers, model.attention_pattern, model.head_dim)
            == (1, 1, "LLLG", 16))
    reader = TensorReader(tmp_path / "ckpt")
    assert reader.get_shape("decoder.layers.1.mlp.experts.experts.linear_fc1.weight") == (8, 48, 32)
    assert reader.get_dtype("decoder.layers.1.mlp.router.expert_bias") == torch.float32
    assert reader.get_dtype("decoder.layers.1.mlp.router.weight") == torch.bfloat16
    hf = load_file(exaone_dir / "model.safetensors")
    fc1 = reader.read("decoder.layers.3.mlp.experts.experts.linear_fc1.weight")
    assert torch.equal(fc1[5, :24], hf["model.layers.3.mlp.experts.5.gate_proj.weight"])
    assert torch.equal(fc1[5, 24:], hf["model.layers.3.mlp.experts.5.up_proj.weight"])
    assert torch.equal(reader.read("mtp.layers.0.eh_proj.weight"), hf["mtp.fc.weight"])


def test_existing_output_is_not_overwritten(solar_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("precious")
    with pytest.raises(UserError, match="already exists"):
        convert.from_hf(solar_dir, tmp_path / "out")
    with pytest.raises(UserError, match="not a 'checkpoint' artifact"):
        convert.from_hf(solar_dir, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/mine.txt").read_text() == "precious"


def test_float32_routers_of_transformers_round_trip(solar_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    routers = [f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)]
    model = AutoModelForCausalLM.from_pretrained(solar_dir, dtype=torch.bfloat16)
    for name in routers:
        router = model.get_parameter(name)
        router.data = router.data.float() * 1.003  # numbers that bfloat16 does not hold
    model.save_pretrained(tmp_path / "saved")
    saved, exported = (read_tensors(folder) for folder in (
        tmp_path / "saved", round_trip(tmp_path / "saved", tmp_path)))
    assert_same_bits(exported, saved)
    float32_names = {name for name, tensor in saved.items() if tensor.dtype == torch.float32}
    assert float32_names == {*routers,
                             *(name.replace("weight", "e_score_correction_bias") for name in routers)}
    convert.to_hf(tmp_path / "ckpt", tmp_path / "narrow", "bfloat16")
    narrow = read_tensors(tmp_path / "narrow")
    assert_same_bits({name: narrow[name] for name in routers},
                     {name: saved[name].bfloat16() for name in routers})


def test_stacked_experts_are_split_on_import(tmp_path: Path) -> None:
    """The layout of transformers in memory."""
    model = replace(recipes.get("tiny-deepseek-v3").model, vocab_size=16, hidden_size=24, num_layers=3,
                    num_heads=2, num_kv_heads=2, head_dim=10, dense_ffn_dim=20, num_dense_layers=1,
                    num_experts=4, num_expert_groups=2, num_groups_per_token=1, expert_ffn_dim=6,
                    num_mtp_layers=0, latent_attention=LatentAttentionConfig(8, 6, 4, 6, 10))
    family = models.get_family("deepseek_v3")
    separate = {name: torch.randn(shape) / 8 for link in family.links(model)
                for name, shape in link.hf_shapes().items()}
    stacked = {name: tensor for name, tensor in separate.items() if ".experts." not in name}
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (torch.stack([separate[f"{prefix}{e}.{projection}_proj.weight"] for e in range(4)])
                          for projection in ("gate", "up", "down"))
        stacked |= {f"{prefix}gate_up_proj": torch.cat([gate, up], 1), f"{prefix}down_proj": down}
    hf = write_folder(tmp_path / "hf", stacked, family.to_hf_config(model, "float32", TokenIds()))
    assert_same_bits(read_tensors(round_trip(hf, tmp_path)), separate)
