"""What conversion refuses of families with norms behind blocks, factors and other parts of their own: by the
tensor's or the field's name."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_sov import convert, models, recipes
from megatron_sov.config import apply_settings
from megatron_sov.errors import UserError
from megatron_sov.models.family import TokenIds

SIZES = ["model.vocab_size=16", "model.hidden_size=8", "model.num_heads=2", "model.num_kv_heads=1",
         "model.head_dim=4", "model.num_layers=2", "model.dense_ffn_dim=8"]
"""Two layers and few channels."""
POST = "model.layers.1.post_feedforward_layernorm.weight"
PERI = "model.layers.1.post_norm2.weight"


def drop(name: str) -> Callable[[dict[str, Any], dict[str, Any]], Any]:
    return lambda tensors, config: tensors.pop(name)


def add(name: str) -> Callable[[dict[str, Any], dict[str, Any]], Any]:
    return lambda tensors, config: tensors.update({name: torch.ones(8)})


def say(**fields: Any) -> Callable[[dict[str, Any], dict[str, Any]], Any]:
    return lambda tensors, config: config.update(fields)


@pytest.mark.parametrize(("recipe", "damage", "expected"), [
    ("tiny-exaone4", drop(POST), rf"1 missing \({POST}\)"),
    ("tiny-exaone4", add("model.layers.0.input_layernorm.weight"),
     r"1 unexpected \(model\.layers\.0\.input_layernorm\.weight\)"),
    ("tiny-exaone4", say(sliding_window=None),
     "sliding_window = None, but layer_types names a sliding layer"),
    ("tiny-exaone4", say(layer_types=["full_attention"] * 2),
     "sliding_window = 32, but layer_types names no sliding layer"),
    ("tiny-exaone4", say(residual_multiplier=0.5),
     "unknown fields for family 'exaone4': 'residual_multiplier'"),
    ("tiny-gemma3", drop("model.layers.0.pre_feedforward_layernorm.weight"),
     r"1 missing \(model\.layers\.0\.pre_feedforward_layernorm\.weight\)"),
    ("tiny-gemma3", say(final_logit_softcapping=30.0), r"final_logit_softcapping = 30\.0, but only None is"),
    ("tiny-gemma3", say(rope_scaling={"factor": 8.0, "rope_type": "linear"}), "only plain rotations are"),
    ("tiny-gemma3", say(rope_local_base_freq=5e3), "sliding_attention rotates by 10000.0 in rope_parameters"),
    ("tiny-glm4-moe", say(partial_rotary_factor=0.25),
     r"partial_rotary_factor = 0\.25, and 0\.5 in rope_parameters"),
    ("tiny-glm4-moe", say(n_group=2), "n_group = 2, but only 1 is supported"),
    ("tiny-hyperclovax", drop(PERI), rf"1 missing \({PERI}\)"),
    ("tiny-hyperclovax", say(use_post_norm=False), r"4 unexpected \(model\.layers\.0\.post_norm1\.weight"),
    ("tiny-hyperclovax", say(use_post_norm=None), "use_post_norm = None must be true or false"),
    ("tiny-hyperclovax", say(logits_scale=2.0), "unknown fields for family 'hyperclovax': 'logits_scale'"),
    ("tiny-hyperclovax", say(logit_scale=2.0), r"logit_scale = 2\.0, but only 1\.0 is supported"),
    ("tiny-hyperclovax", say(attention_multiplier="x"), r"attention_multiplier = 'x' cannot be understood"),
    ("tiny-hyperclovax", say(embedding_multiplier=0), r"model\.embedding_multiplier = 0(\.0)? must be pos"),
])
def test_folders_are_refused_by_name(recipe: str, damage: Callable[[dict[str, Any], dict[str, Any]], Any],
                                     expected: str, tmp_path: Path) -> None:
    model = apply_settings(recipes.get(recipe), SIZES).model
    if model.family == "gemma3_text":
        model = replace(model, embedding_multiplier=math.sqrt(model.hidden_size))
    family = models.get(model.family)
    config = family.to_hf_config(model, "float32", TokenIds())
    tensors = {name: torch.ones(shape) for link in family.links(model)
               for name, shape in link.hf_shapes().items()}
    damage(tensors, config)
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(config))
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=expected):
        convert.from_hf(hf, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_prediction_layer_that_is_not_read_is_told_of_and_left_out(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It stands behind the trunk's two layers; what stands behind it is refused."""
    model = apply_settings(recipes.get("tiny-glm4-moe"), [*SIZES, "model.expert_ffn_dim=8"]).model
    family, hf = models.get(model.family), tmp_path / "hf"
    tensors = {name: torch.ones(shape) for link in family.links(model)
               for name, shape in link.hf_shapes().items()}
    hf.mkdir()
    config = family.to_hf_config(model, "float32", TokenIds()) | {"num_nextn_predict_layers": 1}
    (hf / "config.json").write_text(json.dumps(config))
    for name, refused in (("model.layers.2.eh_proj.weight", False), ("model.layers.3.eh_proj.weight", True)):
        save_file(tensors | {name: torch.ones(8, 16)}, hf / "model.safetensors", metadata={"format": "pt"})
        if refused:
            with pytest.raises(UserError, match=r"1 unexpected \(model\.layers\.3\.eh_proj\.weight\)"):
                convert.from_hf(hf, tmp_path / "other")
        else:
            convert.from_hf(hf, tmp_path / "ckpt")
            assert f"the 1 tensors of its prediction layer ({name}, ...) are left out" in (
                capsys.readouterr().err)
    convert.to_hf(tmp_path / "ckpt", tmp_path / "back")
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert written["num_nextn_predict_layers"] == 0 and written["rope_parameters"]["rope_theta"] == 1e6


def test_other_families_refuse_what_only_some_have() -> None:
    run = recipes.get("tiny-llama")
    for setting in ("block_norms=both", "embedding_multiplier=2", "attention_multiplier=0.5",
                    "residual_multiplier=0.5", "logits_multiplier=2"):
        name = setting.partition("=")[0]
        model = apply_settings(run, [f"model.{setting}"]).model
        with pytest.raises(UserError, match=rf"model\.{name} = .*: family 'llama' only knows"):
            models.get("llama").check(model)


def test_qwen3_next_is_refused_by_what_the_library_lacks(tmp_path: Path) -> None:
    from transformers import Qwen3NextConfig

    (hf := tmp_path / "hf").mkdir()
    (hf / "config.json").write_text(json.dumps(Qwen3NextConfig().to_dict()))
    save_file({"lm_head.weight": torch.ones(8)}, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"^model family 'qwen3_next': is not supported: its gated delta net "
                                        r"is a layer of Megatron-Core that refuses packed rows and infer"):
        convert.from_hf(hf, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_librarys_gated_delta_net_does_not_serve_yet() -> None:
    """Where this fails, the library can do more than it could: see whether Qwen3-Next can be a family now
    (docs/families.md, `models.WITHOUT_LAYER`)."""
    file = Path(str(distribution("megatron-core").locate_file("megatron/core/ssm/gated_delta_net.py")))
    layer = ast.parse(file.read_text(encoding="utf-8"))
    refused = {ast.unparse(branch.test) for branch in ast.walk(layer) if isinstance(branch, ast.If)
               for line in branch.body if isinstance(line, ast.Raise) and line.exc is not None
               and ast.unparse(line.exc).startswith("NotImplementedError(")}
    assert refused == {"packed_seq_params is not None", "inference_context is not None"}
    assert not (file.parent / "gated_delta_net_context_parallel.py").exists()
    assert not any(isinstance(node, ast.Attribute) and node.attr in ("cp", "context_parallel_size", "cp_size")
                   for node in ast.walk(layer))
