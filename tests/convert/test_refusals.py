"""What is not exactly a supported model is refused by name, and a killed conversion leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sov import convert
from megatron_sov.cli import main
from megatron_sov.errors import UserError


def copy_with(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def set_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def refused(hf_dir: Path, tmp_path: Path) -> str:
    with pytest.raises(UserError) as e:
        convert.from_hf(hf_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return str(e.value)


def test_missing_and_extra_tensors_are_named(solar_dir: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
        tensors["model.layers.1.mlp.experts.8.up_proj.weight"] = torch.ones(3)
        tensors["lm_head.weight"] = torch.ones(96, 31)

    message = refused(copy_with(solar_dir, tmp_path / "bad", change), tmp_path)
    assert "1 missing (model.layers.1.mlp.experts.3.up_proj.weight)" in message
    assert "1 unexpected (model.layers.1.mlp.experts.8.up_proj.weight)" in message
    assert "lm_head.weight [96, 31] instead of [96, 32]" in message


def test_a_prediction_layer_is_refused_where_the_family_has_none(solar_dir: Path, tmp_path: Path) -> None:
    bad = copy_with(solar_dir, tmp_path / "bad", lambda t: t.update({"mtp.norm.weight": torch.ones(32)}))
    assert "unexpected (mtp.norm.weight)" in refused(bad, tmp_path)


def test_prediction_layer_is_found_by_its_tensors_where_the_config_is_silent(exaone_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(exaone_dir, tmp_path / "silent")
    set_config(tmp_path / "silent", num_nextn_predict_layers=None)
    assert convert.open_weights(tmp_path / "silent").model.num_mtp_layers == 1


@pytest.mark.parametrize(("fields", "expected"), [
    ({"swiglu_limits": [7.0] * 5}, r"unknown fields for family 'exaone_moe': 'swiglu_limits'"),
    ({"slidin_window": 3}, r"'slidin_window'; did you mean 'sliding_window'\?"),
    ({"n_group": 2}, "n_group = 2, but only 1"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu', but only 'silu'"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings = True"),
    ({"layer_types": ["full_attention"]}, "layer_types must name"),
    ({"mlp_layer_types": ["sparse", "dense"] + ["sparse"] * 3, "first_k_dense_replace": None}, "'dense' layers first"),
    ({"first_k_dense_replace": 2}, "mlp_layer_types and first_k_dense_replace disagree"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type = 'llama3'"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "lacks 'original_max_position_embeddings'"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "factor": 2.0}}, "rope parameters factor are unknown"),
    ({"hidden_size": "wide"}, r"model\.hidden_size = 'wide'"),
    ({"model_type": "exaone_mo"}, r"did you mean 'exaone_moe'\?"),
    ({"architectures": ["ExaoneForCausalLM"]}, "make them agree"),
])
def test_config_fields_that_we_would_not_honour_are_refused(exaone_dir: Path, tmp_path: Path, fields, expected: str) -> None:
    shutil.copytree(exaone_dir, tmp_path / "bad")
    set_config(tmp_path / "bad", **fields)
    with pytest.raises(UserError, match=expected):
        convert.from_hf(tmp_path / "bad", tmp_path / "out")


def test_fields_that_transformers_ignores_are_refused_unless_harmless(solar_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(solar_dir, tmp_path / "hf")
    set_config(tmp_path / "hf", first_k_dense_replace=0, intermediate_size=10240, partial_rotary_factor=1.0, rope_scaling=None)
    assert convert.open_weights(tmp_path / "hf").model.num_dense_layers == 0
    set_config(tmp_path / "hf", first_k_dense_replace=1)
    assert "first_k_dense_replace = 1, but only 0" in refused(tmp_path / "hf", tmp_path)


def test_folders_that_are_no_models(solar_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused(tmp_path / "empty", tmp_path)
    shutil.copytree(solar_dir, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(b"")
    assert "save the model with safetensors" in refused(tmp_path / "pickled", tmp_path)
    shutil.copytree(solar_dir, tmp_path / "cut")
    os.truncate(tmp_path / "cut/model.safetensors", 5000)
    assert "not a readable safetensors file" in refused(tmp_path / "cut", tmp_path)


def test_an_index_cannot_lead_out_of_its_folder(solar_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(solar_dir, tmp_path / "hf")
    index = {"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps(index))
    assert "files in the same folder" in refused(tmp_path / "hf", tmp_path)
    index = {"weight_map": {"lm_head.weight": "model.safetensors"}}
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps(index))
    assert "disagrees with the files" in refused(tmp_path / "hf", tmp_path)


def test_experts_of_different_dtypes_are_refused(solar_dir: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.2.down_proj.weight"
    bad = copy_with(solar_dir, tmp_path / "bad", lambda t: t.update({name: t[name].float()}))
    assert f"{name} has dtype torch.float32" in refused(bad, tmp_path)


def test_output_that_exists_is_kept(solar_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("precious")
    with pytest.raises(UserError, match="already exists"):
        convert.from_hf(solar_dir, tmp_path / "out")
    with pytest.raises(UserError, match="not a 'checkpoint' artifact"):
        convert.from_hf(solar_dir, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/mine.txt").read_text() == "precious"


def test_command_says_it_in_one_line(tmp_path: Path, capsys) -> None:
    assert main(["convert", "to-hf", str(tmp_path), str(tmp_path / "hf"), "--dtype", "bfloat"]) == 2
    assert "did you mean 'bfloat16'?" in capsys.readouterr().err
    assert main(["convert", "inspect", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


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
