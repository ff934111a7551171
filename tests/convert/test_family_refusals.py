"""Conversion rejects unsupported tensors and fields of special families by name."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_sov import convert, recipes
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import apply_settings
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.family import TokenIds
from tests.convert.hf_folders import check_refused, edit_tensors, write_folder

SIZES = ["model.vocab_size=16", "model.hidden_size=8", "model.num_heads=2", "model.num_kv_heads=1",
         "model.head_dim=4", "model.num_layers=2", "model.dense_ffn_dim=8"]
"""Two layers and few channels."""
POST = "model.layers.1.post_feedforward_layernorm.weight"
PERI = "model.layers.1.post_norm2.weight"


def drop(name: str) -> Callable[[dict[str, Any], dict[str, Any]], Any]:
    return lambda tensors, config: tensors.pop(name)


def say(**fields: Any) -> Callable[[dict[str, Any], dict[str, Any]], Any]:
    return lambda tensors, config: config.update(fields)


@pytest.mark.each(("recipe", "damage", "expected"), [
    ("tiny-exaone4", drop(POST), rf"1 missing \({POST}\)"),
    ("tiny-exaone4",
     lambda tensors, config: tensors.update({"model.layers.0.input_layernorm.weight": torch.ones(8)}),
     r"1 unexpected \(model\.layers\.0\.input_layernorm\.weight\)"),
    ("tiny-exaone4", say(sliding_window=None),
     "sliding_window = None, but layer_types names a sliding layer"),
    ("tiny-exaone4", say(layer_types=["full_attention"] * 2),
     "sliding_window = 32, but layer_types names no sliding layer"),
    ("tiny-exaone4", say(attention_chunk_size=64), r"attention_chunk_size = 64 \(read by transformers"),
    ("tiny-gemma3", drop("model.layers.0.pre_feedforward_layernorm.weight"),
     r"1 missing \(model\.layers\.0\.pre_feedforward_layernorm\.weight\)"),
    ("tiny-gemma3", say(attn_logit_softcapping=50.0), r"attn_logit_softcapping = 50\.0, but only None is"),
    ("tiny-gemma3", say(rope_scaling={"factor": 8.0, "rope_type": "linear"}),
     "rope_scaling = .*, and rope_parameters of full_attention = "),
    ("tiny-gemma3", say(rope_scaling={"factor": 8.0, "rope_type": "dynamic"}),
     "rope_scaling = .*, but only rope_type 'default', and 'linear' with a factor, are supported"),
    ("tiny-gemma3", say(rope_parameters={"sliding_attention": {"rope_type": "linear", "factor": 8.0}}),
     "only global layers may be scaled"),
    ("tiny-gemma3", say(rope_parameters={"rope_type": "linear", "factor": 8.0}),
     "rope_parameters has rope_type, factor, and in this family only full_attention and sliding"),
    ("tiny-gemma3", say(final_logit_softcapping=0), "final_logit_softcapping = 0 must be a number greater"),
    ("tiny-gemma3", say(head_dim=0), r"model\.head_dim = 0 must be at least 1"),
    ("tiny-llama", say(rope_theta=5.0), r"rope_theta = 5\.0, and \d+\.0 in rope_parameters; make them ag"),
    ("tiny-llama", say(rope_parameters={"rope_type": "linear"}), "rope_type 'linear' lacks 'factor'"),
    ("tiny-gemma3", say(rope_local_base_freq=5e3), "rope_theta of sliding_attention is 10000.0 in"),
    ("tiny-hyperclovax", drop(PERI), rf"1 missing \({PERI}\)"),
    ("tiny-hyperclovax", say(use_post_norm=False), r"4 unexpected \(model\.layers\.0\.post_norm1\.weight"),
    ("tiny-hyperclovax", say(use_post_norm=None), "use_post_norm = None must be true or false"),
    ("tiny-hyperclovax", say(per_layer_config={"0": {}}), r"per_layer_config = .* \(read by transformers"),
    ("tiny-hyperclovax", say(logit_scale=2.0), r"logit_scale = 2\.0, but only 1\.0 is supported"),
    ("tiny-hyperclovax", say(attention_multiplier="x"), r"attention_multiplier = 'x' cannot be read"),
])
def test_unsupported_folders_name_the_tensor_or_field(recipe: str,
                                                      damage: Callable[[dict[str, Any], dict[str, Any]], Any],
                                                      expected: str, tmp_path: Path) -> None:
    model = apply_settings(recipes.get(recipe), SIZES).model
    if model.family.startswith("gemma"):
        model = replace(model, embedding_multiplier=math.sqrt(model.hidden_size))
    family = models.get_family(model.family)
    config = family.to_hf_config(model, "float32", TokenIds())
    tensors = {name: torch.ones(shape) for link in family.links(model)
               for name, shape in link.hf_shapes().items()}
    damage(tensors, config)
    check_refused(write_folder(tmp_path / "hf", tensors, config), expected)


def write_folder_without(name: str, folder: Path, **config: Any) -> Path:
    """Write a folder with two layers and a prediction layer without tensor `name` ("": complete) and a
    changed config."""
    model = apply_settings(recipes.get("tiny-deepseek-v3"), [
        "model.vocab_size=16", "model.hidden_size=8", "model.dense_ffn_dim=8", "model.num_layers=2",
        "model.num_dense_layers=1", "model.num_expert_groups=1", "model.num_groups_per_token=1",
        "model.expert_ffn_dim=8"]).model
    family = models.get_family(model.family)
    tensors = {key: torch.rand(shape, generator=torch.Generator().manual_seed(0))
               for link in family.links(model) for key, shape in link.hf_shapes().items()}
    tensors |= {copy: tensors[other].clone() for copy, other in family.find_copies(model).items()}
    tensors = {key: tensor for key, tensor in tensors.items() if not name or not key.startswith(name)}
    return write_folder(folder, tensors, family.to_hf_config(model, "float32", TokenIds()) | config)


def test_prediction_layer_round_trip_is_bit_exact(tmp_path: Path) -> None:
    """Including its copies of embedding and head, which an export writes even if the import had none."""
    hf = write_folder_without("", tmp_path / "hf")
    expected = load_file(hf / "model.safetensors")
    assert "model.layers.2.mlp.experts.7.down_proj.weight" in expected
    sources = {"all": hf} | {name: write_folder_without(f"model.layers.2.{name}", tmp_path / name)
                             for name in ("embed_tokens", "shared_head.head")}
    for name, folder in sources.items():
        convert.from_hf(folder, tmp_path / f"{name}-ckpt")
        convert.to_hf(tmp_path / f"{name}-ckpt", tmp_path / f"{name}-back")
        back = load_file(tmp_path / f"{name}-back/model.safetensors")
        assert back.keys() == expected.keys() and all(torch.equal(back[key], expected[key]) for key in back)
    written = json.loads((tmp_path / "all-back/config.json").read_text())
    assert written["num_nextn_predict_layers"] == 1 and written["mtp_mlp_layer_types"] == ["sparse"]


def test_prediction_layer_is_detected_from_tensors(tmp_path: Path) -> None:
    """transformers drops the layer, but its saved config still counts it."""
    without = write_folder_without("model.layers.2.", tmp_path / "without", num_nextn_predict_layers=1)
    assert not convert.open_weights(without).model.num_mtp_layers
    silent = write_folder_without("", tmp_path / "silent", num_nextn_predict_layers=0)
    assert convert.open_weights(silent).model.num_mtp_layers == 1


@pytest.mark.each(("missing", "config", "expected"), [
    ("model.layers.2.eh_proj", {}, r"1 missing \(model\.layers\.2\.eh_proj\.weight\)"),
    ("model.layers.2.mlp.gate.e_score", {}, r"1 missing \(model\.layers\.2\.mlp\.gate\.e_score_corr"),
    ("", {"num_hidden_layers": 1, "mlp_layer_types": ["dense"]}, "num_mtp_layers = 2 must be at most 1"),
    ("", {"mtp_mlp_layer_types": ["dense"]}, r"mtp_mlp_layer_types = \['dense'\], but only prediction"),
    ("", {"n_group": 3}, r"num_groups_per_token = 1 .*|num_expert_groups = 3 must divide"),
    ("", {"topk_group": 2}, "num_groups_per_token = 2 must be at most model.num_expert_groups = 1"),
    ("", {"n_group": 8}, "num_expert_groups = 8 must divide model.num_experts = 8 into groups of at least"),
    ("", {"n_group": 4, "num_experts_per_tok": 3}, "leaves 2 experts to choose from, fewer than model.num_"),
])
def test_unsupported_prediction_layer_is_named(missing: str, config: dict[str, Any], expected: str,
                                               tmp_path: Path) -> None:
    check_refused(write_folder_without(missing, tmp_path / "hf", **config), expected)


def test_differing_duplicate_is_rejected(tmp_path: Path) -> None:
    folder = write_folder_without("", tmp_path / "hf")
    edit_tensors(folder, lambda tensors: tensors["model.layers.2.embed_tokens.weight"][3, 4].add_(1))
    check_refused(folder, r"2\.embed_tokens\.weight differs from model\.embed_tokens\.weight")
    assert [check for check in convert.verify(folder, folder, load=False).checks
            if not check.passed and "copies that differ" in check.name]


def test_families_reject_parts_of_other_families() -> None:
    run = recipes.get("tiny-llama")
    for setting in ("block_norms=both", "embedding_multiplier=2", "attention_multiplier=0.5",
                    "residual_multiplier=0.5", "logits_multiplier=2", "logits_softcap=30"):
        name = setting.partition("=")[0]
        model = apply_settings(run, [f"model.{setting}"]).model
        with pytest.raises(UserError, match=rf"model\.{name} = .* must be .* in family 'llama'"):
            models.get_family("llama").check(model)
