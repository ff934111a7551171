"""examples/families/: each file loads as its header says, counts the parameters of the released model, and
agrees with transformers in bits and logits."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sov import convert, recipes
from megatron_sov.base.errors import UserError
from megatron_sov.base.hints import removed
from megatron_sov.cli import main
from megatron_sov.model.config import ModelConfig
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.count import count_params
from megatron_sov.model.families.family import TokenIds
from tests.layouts import test_exactness as exactness
from tests.model.families.test_family import (
    PUBLISHED, is_in_prediction_layer, list_our_tensors, list_transformers_tensors)

ROOT = Path(__file__).parents[1]
HEADER = re.compile(r"# What: .+\n# Run:  megatron-sov (convert from-hf .+ --plugin "
                    r"(examples/families/\w+\.py:\w+))\n# See:  .+\n\n")
FILES = {file.stem: file for file in sorted((ROOT / "examples/families").glob("*.py"))}
RECIPES = {"mixtral": ("mixtral_8x7b", "mistralai/Mixtral-8x7B-v0.1", 46.703e9, 0),
           # with the copies of embedding and head these are the 110 B that the hub counts of the folder
           "glm4_moe": ("glm_4_5_air", "zai-org/GLM-4.5-Air", 106.852e9, 2.3751e9),
           "kimi_linear": ("kimi_linear_48b", "moonshotai/Kimi-Linear-48B-A3B-Instruct", 49.12e9, 0)}
"""Family -> its recipe, the released model that this is, and the parameters of trunk and prediction layer."""


def load_reference(name: str) -> str:
    """Return FILE.py:NAME of a family, by the header of its file, and load it."""
    result = HEADER.match(FILES[name].read_text())
    assert result, name
    reference = str(ROOT / result[2])
    assert models.FAMILY_PLUGINS.load(reference) == name
    return reference


def odd_mixtral() -> dict[str, Any]:
    config, experts = exactness.odd_sizes("mixtral", 2)
    return {**config, "tie_word_embeddings": True, "num_local_experts": 16,
            "num_experts_per_tok": experts["num_experts_per_tok"], "sliding_window": 11}


def odd_glm4_moe() -> dict[str, Any]:
    config, experts = exactness.odd_sizes("glm4_moe", 2)
    return {**config, **experts, "head_dim": 8, "n_routed_experts": 12, "attention_bias": True,
            "use_qk_norm": True, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 1, "n_group": 3, "topk_group": 1,
            "rope_parameters": {**config["rope_parameters"], "partial_rotary_factor": 0.5}}


def odd_kimi_linear() -> dict[str, Any]:
    like = exactness.odd_config("deepseek_v3", 0)
    same = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size",
            "initializer_range", "rms_norm_eps", "moe_intermediate_size", "topk_group", "q_lora_rank",
            "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "bos_token_id",
            "eos_token_id", "pad_token_id", "first_k_dense_replace")
    return {**{name: like[name] for name in same}, "model_type": "kimi_linear", "num_hidden_layers": 4,
            "num_experts": like["n_routed_experts"], "num_shared_experts": like["n_shared_experts"],
            "num_experts_per_token": like["num_experts_per_tok"], "num_expert_group": like["n_group"],
            "routed_scaling_factor": 2.5, "linear_num_heads": 2, "linear_head_dim": 6,
            "linear_conv_kernel_dim": 4, "layer_types": ["full_attention" if letter == "G" else
                                                         "linear_attention" for letter in "DGDG"]}


ODD: dict[str, Callable[[], dict[str, Any]]] = {
    "mistral": lambda: {**exactness.odd_sizes("mistral", 0)[0], "tie_word_embeddings": True,
                        "sliding_window": 9},
    "mixtral": odd_mixtral, "glm4_moe": odd_glm4_moe, "kimi_linear": odd_kimi_linear}
"""Family -> a config.json with sizes that nothing divides neatly."""


def as_released(folder: Path, config: dict[str, Any]) -> None:
    """Give the tensors of dense layers their released names: transformers writes Kimi Linear's otherwise."""
    tensors, dense = load_file(folder / "model.safetensors"), f"{config['first_k_dense_replace']}."
    save_file({name.replace("block_sparse_moe", "mlp") if name.split("layers.")[-1] < dense else name: tensor
               for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def test_each_file_has_a_header_and_an_odd_model() -> None:
    assert [*FILES] == sorted(ODD)


@pytest.mark.tier1_cases(2)
@pytest.mark.distributed
@pytest.mark.parametrize("family", ODD)
def test_bits_and_logits_are_those_of_transformers(family: str, ranks: Any, job: Any, tmp_path: Path) -> None:
    reference, config = load_reference(family), ODD[family]()
    folder = tmp_path / f"{family}-0"
    folder.mkdir()
    exactness.make(config, folder / "hf", 0)
    if family == "kimi_linear":
        as_released(folder / "hf", config)
    assert main(["convert", "from-hf", str(folder / "hf"), str(folder / "ckpt"), "--plugin", reference]) == 0
    layouts = {name: exactness.LAYOUTS[name] for name in ("one", "TP2+SP")
               if exactness.fits(config, exactness.LAYOUTS[name][1])}
    ranks(*(job(exactness.__file__, "run", nproc, {
        "names": [folder.name], "layout": layout, "folder": str(tmp_path), "label": name,
        "plugins": [reference]}) for name, (nproc, layout) in layouts.items()))
    exactness.check_equal(folder, layouts)


def recipe_model(family: str) -> ModelConfig:
    """Return the model of the file's recipe, which has the name of the family."""
    name = recipes.RECIPE_PLUGINS.load(f"{load_reference(family).partition(':')[0]}:{RECIPES[family][0]}")
    model = recipes.get(name).model
    assert model.family == Path(FILES[family]).name + ":" + family.upper()
    return replace(model, family=family)


def names_on_disk(name: str) -> str:
    """Return Mixtral's name of a tensor that transformers has in memory."""
    old = {"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    return re.sub("mlp|gate_proj|up_proj|down_proj", lambda match: old[match[0]], name)


@pytest.mark.each("family", RECIPES)
def test_a_recipe_is_the_released_model(family: str) -> None:
    from transformers import AutoConfig

    model, declared = recipe_model(family), models.get_family(family)
    _, released, trunk, prediction = RECIPES[family]
    assert declared.from_hf_config(PUBLISHED[released]) == model
    written = declared.to_hf_config(model, "bfloat16", TokenIds(1, [2, 24, 25], 0))
    theirs = AutoConfig.for_model(**written)
    assert declared.from_hf_config(json.loads(theirs.to_json_string())) == model
    count = count_params(model)
    assert (count.total, count.mtp) == (pytest.approx(trunk, rel=1e-3), pytest.approx(prediction, rel=1e-3))


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe"])
def test_full_size_tensors_are_those_of_transformers(family: str) -> None:
    model = recipe_model(family)
    ours: dict[str, tuple[tuple[int, ...], torch.dtype]] = list_our_tensors(model)
    theirs = list_transformers_tensors(model)
    if family == "mixtral":
        theirs = {names_on_disk(name): value for name, value in theirs.items()}
    assert {name: value for name, value in ours.items() if not is_in_prediction_layer(name, model)} == theirs


def test_names_that_transformers_gives_dense_layers_are_read_too(tmp_path: Path) -> None:
    load_reference("kimi_linear")
    config = ODD["kimi_linear"]() | {"first_k_dense_replace": 1}
    exactness.make(config, tmp_path / "hf", 0)
    written = load_file(tmp_path / "hf/model.safetensors")
    assert "model.layers.0.block_sparse_moe.gate_proj.weight" in written
    convert.from_hf(tmp_path / "hf", tmp_path / "ckpt")
    convert.to_hf(tmp_path / "ckpt", tmp_path / "back")
    as_released(tmp_path / "hf", config)
    assert exactness.same_bits(tmp_path / "back", tmp_path / "hf")


def test_rotary_share_is_exported_once(tmp_path: Path) -> None:
    load_reference("glm4_moe")
    declared = models.get_family("glm4_moe")
    config = declared.to_hf_config(recipe_model("glm4_moe"), "float32", TokenIds())
    with pytest.raises(UserError, match=r"partial_rotary_factor = 0\.25, and 0\.5 in rope_parameters"):
        declared.from_hf_config(config | {"partial_rotary_factor": 0.25})
    assert declared.from_hf_config(config | {"rope_parameters": {"rope_theta": 1e6}}).rope_share == 0.5


MOVED = [name for name, instead in removed.VALUES.items() if "examples/families" in instead]


@pytest.mark.each("name", MOVED)
def test_a_name_that_moved_says_where_to(name: str) -> None:
    place = re.search(r"examples/families/(\w+\.py):(\w+)", removed.VALUES[name])
    assert place and f"\n{place[2]} = Family(" in (ROOT / "examples/families" / place[1]).read_text()
    recipe = re.search(r"its recipe is examples/families/\w+\.py:(\w+)", removed.VALUES[name])
    assert recipe is None or f"\ndef {recipe[1]}():" in (ROOT / "examples/families" / place[1]).read_text()


def test_a_folder_of_an_example_family_is_refused_with_its_plugin(tmp_path: Path, get_refusal: Any) -> None:
    for family, instead in (("gpt_oss", "train it with TRL"), ("olmo2", "is not supported")):
        assert family not in models.FAMILIES
        folder = tmp_path / family
        exactness.make(exactness.odd_config("llama", 0), folder, 0)
        config = json.loads((folder / "config.json").read_text()) | {"model_type": family}
        (folder / "config.json").write_text(json.dumps(config))
        errors = get_refusal("convert", "from-hf", str(folder), str(tmp_path / "out"))
        assert f"model family '{family}': is not supported" in errors and instead in errors
        assert not (tmp_path / "out").exists()
