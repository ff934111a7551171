"""Ignored fields of a config.json: fields that transformers neither declares nor reads, and base-class
fields at their neutral value."""

import json
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.family import ANY_VALUE, HARMLESS_FIELDS, TokenIds, load_transformers_fields
from tests.freeze_fields import OF_EXAMPLES, TABLE, find_fields

READ_BY_FAMILIES = {"_attn_implementation"}
"""Fields of `HARMLESS_FIELDS` that transformers' models for our families read too."""


def build_config(recipe: str, **fields: Any) -> dict[str, Any]:
    model = recipes.get(recipe).model
    return models.get_family(model.family).to_hf_config(model, "bfloat16", TokenIds(1, 2, 0)) | fields


def test_field_table_equals_transformers_source() -> None:
    """Fails if a transformers release changes a field: regenerate the table and inspect the difference."""
    table = json.loads(TABLE.read_text())
    assert find_fields() == table, "run python tests/freeze_fields.py"
    # transformers lacks solar_open2
    assert {*table} - {"shared"} == {*models.FAMILIES, *OF_EXAMPLES} - {"solar_open2"}


def test_the_table_knows_every_field_that_transformers_adds() -> None:
    """The table is read from transformers' source; here it is compared with its config objects."""
    from transformers import AutoConfig

    for name in ("tiny-llama", "tiny-qwen3-moe", "tiny-deepseek-v3", "tiny-gemma3", "tiny-exaone4"):
        written = build_config(name)
        config = AutoConfig.for_model(**written)
        known = load_transformers_fields()["shared"] | load_transformers_fields()[written["model_type"]]
        theirs = {field for field in config.to_dict() if field not in written}
        assert theirs <= known, theirs - known


def test_neutral_fields_are_fields_of_the_base_class() -> None:
    table = load_transformers_fields()
    assert {*HARMLESS_FIELDS} <= table["shared"]
    read = {name for family, names in table.items() if family != "shared" for name in names}
    assert not {*HARMLESS_FIELDS} & read - READ_BY_FAMILIES


# Recipe, and fields that change no computation.
PASSED: list[tuple[str, dict[str, Any]]] = [
    ("tiny-llama", {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {}}),
    ("tiny-llama", {"unsloth_fixed": True, "unsloth_version": "2025.3.1"}),
    ("tiny-llama", {"_attn_implementation_autoset": True, "neftune_noise_alpha": 5.0, "_commit_hash": "0a"}),
    ("tiny-llama", {"unk_token_id": 0, "bos_token": "<s>", "max_sequence_length": 2048, "name_or_path": "a"}),
    ("tiny-llama", {"output_attentions": False, "return_dict": True, "torchscript": False,
                    "id2label": {"0": "LABEL_0"}, "is_encoder_decoder": False, "pruned_heads": {}}),
    ("tiny-llama", {"use_sliding_window": False, "hidden_activation": "silu",
                    "gradient_checkpointing": True}),
    ("tiny-llama", {"layer_types": ["full_attention"] * 4, "partial_rotary_factor": 1.0, "is_causal": True}),
    ("tiny-llama", {"auto_map": {"AutoTokenizer": "x.Y"}, "temperature": 0.7, "foo": [1, {"a": 2}]}),
    ("tiny-qwen3-moe", {"residual_multiplier": 0.5, "moe_frequency": 1}),
    ("tiny-solar-open2", {"unsloth_fixed": True, "output_attentions": False, "_whatever": 1}),
    ("tiny-deepseek-v3", {"auto_map": {"AutoModelForCausalLM": "x.Y"}, "unsloth_fixed": True, "_x": 1}),
]


@pytest.mark.each(("recipe", "fields"), PASSED)
def test_fields_that_no_program_computes_with_are_passed_over(recipe: str, fields: dict[str, Any]) -> None:
    config = build_config(recipe)
    family = models.get_family(config["model_type"])
    assert family.find_ignored_fields(config) == {}
    passed = family.find_ignored_fields(config | fields)
    assert passed == {name: value for name, value in fields.items() if name != "auto_map"}
    assert family.from_hf_config(config | fields) == family.from_hf_config(config)


@pytest.mark.each(("recipe", "name"), [
    ("tiny-deepseek-v3", "norm_topk_prob"), ("tiny-deepseek-v3", "rope_interleave"),
    ("tiny-solar-open", "norm_topk_prob"),
    ("tiny-gemma3", "tie_word_embeddings")])
def test_null_is_refused_where_transformers_takes_it_for_false(recipe: str, name: str) -> None:
    config = build_config(recipe)
    family = models.get_family(config["model_type"])
    with pytest.raises(UserError, match=r"None|null"):
        family.from_hf_config(config | {name: None})


# Recipe, added fields that may affect the model, and the expected error.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("tiny-llama", {"is_causal": False}, r"is_causal = False \(read by transformers, but not supported"),
    ("tiny-llama", {"is_causal": None}, r"is_causal = None \(read by transformers, but not supported"),
    ("tiny-llama", {"attention_chunk_size": 8192}, r"attention_chunk_size = 8192 \(read by transformers"),
    ("tiny-llama", {"sliding_window": 16}, r"sliding_window = 16 \(read by transformers"),
    ("tiny-llama", {"layer_types": ["sliding_attention"] * 4}, r"layer_types = \['sliding_attention'.* \(r"),
    ("tiny-llama", {"output_attentions": True}, "output_attentions = True"),
    ("tiny-llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0\.5"),
    ("tiny-llama", {"per_layer_config": {"0": {}}}, "per_layer_config = "),
    ("tiny-deepseek-v3", {"num_local_experts": 9}, r"num_local_experts = 9 \(read by transformers"),
    ("tiny-solar-open2", {"foo": 1}, r"foo = 1 \(a program that has family 'solar_open2' may read it\)"),
    ("tiny-solar-open2", {"use_rop": True}, r"use_rop = True \(.* may read it; did you mean 'use_rope'\?\)"),
    ("tiny-llama", {"auto_map": {"AutoModelForCausalLM": "x.Y"}, "foo": 1, "bar": 2},
     r"foo = 1 \(the folder's own code may read it\); bar = 2 \(.*; remove a field if it has no effect"),
]


@pytest.mark.each(("recipe", "fields", "expected"), REFUSED)
def test_fields_that_a_program_may_compute_with_are_refused(recipe: str, fields: dict[str, Any],
                                                            expected: str) -> None:
    config = build_config(recipe)
    family = models.get_family(config["model_type"])
    with pytest.raises(UserError, match=expected):
        family.from_hf_config(config | fields)
    # The remedy works: the config is read without `is_causal` and with null for the other fields.
    nulls = {name: None for name in fields if name != "is_causal"}
    assert family.from_hf_config(config | nulls) == family.from_hf_config(config)


@pytest.mark.each(("name", "hint"), [
    ("solar-open", "solar_open"), ("Qwen3MoE", "qwen3_moe"), ("lama", "llama"),
    ("exaone_mo", "exaone_moe"), ("hyperclova_x", "hyperclovax"),
    *((name, None) for name in ("smollm3", "qwen4", "llama4", "gemma", "gemma3n", "ministral", "phi3",
                                "olmo2", "deepseek_v2", "deepseek_v32", "glm4", "qwen2_moe", "mistral3",
                                "kimi_k2", "exaone"))])
def test_only_a_misspelt_family_gets_a_hint(name: str, hint: str | None) -> None:
    with pytest.raises(UserError) as e:
        models.get_family(name)
    if hint is None:
        assert "did you mean" not in str(e.value)
    else:
        assert f"did you mean '{hint}'?" in str(e.value)


def test_any_is_not_a_value_of_a_config() -> None:
    assert ANY_VALUE not in (None, 0, False, "", [])
