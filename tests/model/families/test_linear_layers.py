"""Tensors whose rows are grouped by head, and config fields of families with linear attention."""

import math
from dataclasses import replace

import pytest
import torch

from megatron_sov.base.errors import UserError
from megatron_sov.model import recipes
from megatron_sov.model.config import LinearAttentionConfig
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.family import TokenIds
from megatron_sov.model.families.linear_layers import GATED_ATTENTION, KIMI_DELTA, SolarLayers

MODEL = replace(recipes.get("tiny-solar-open2").model, num_heads=4, num_kv_heads=2, head_dim=8, hidden_size=5,
                linear_attention=LinearAttentionConfig(2, 2, 3, 3, 3, conv_taps=2))


@pytest.mark.each("name", [entry.megatron for entry in (*KIMI_DELTA, *GATED_ATTENTION)])
def test_split_tensors_are_joined_unchanged(name: str) -> None:
    link = next(link for link in models.get_family("solar_open2").links(MODEL)
                if link.key.startswith("decoder.") and link.key.endswith(name))
    block = torch.arange(float(math.prod(link.block_shape))).reshape(link.block_shape)
    tensors = link.split(block)
    assert {n: tuple(t.shape) for n, t in tensors.items()} == link.hf_shapes()
    assert torch.equal(link.join(tensors), block)


def test_gates_of_solar_open_2_are_a_separate_tensor() -> None:
    """A group has two query heads, their two gates, key and value, of 8 rows each."""
    solar = replace(recipes.get("tiny-solar-open2").model, num_heads=4, num_kv_heads=2, head_dim=8,
                    hidden_size=5)
    link = next(x
                for x in models.get_family("solar_open2").links(solar) if x.key.endswith("linear_qkv.weight"))
    rows = torch.arange(96.)[:, None].expand(96, 5)
    rows_by_projection = {name.split(".")[-2]: tensor[::8, 0].tolist()
                          for name, tensor in link.split(rows).items()}
    assert rows_by_projection == {"q_proj": [0, 8, 48, 56], "g_proj": [16, 24, 64, 72], "k_proj": [32, 80],
                                  "v_proj": [40, 88]}
    assert torch.equal(link.join(link.split(rows)), rows)


SOLAR = {"num_hidden_layers": 8, "num_attention_heads": 6, "head_dim": 4}
LINEAR_CONFIG = {"num_heads": 6, "head_dim": 4, "short_conv_kernel_size": 4}


def test_solar_open_2_counts_layers_from_0_in_one_of_three_spellings() -> None:
    read = SolarLayers().read
    layer_types = ["linear_attention", "full_attention"] * 4
    for fields, pattern in (({}, "GDDD"), ({"gqa_interval": 1}, "GD"), ({"gqa_layers": [3, 7]}, "DDDG"),
                            ({"gqa_interval": 1, "gqa_layers": [3, 7]}, "DDDG"),
                            ({"layer_types": layer_types}, "DG"),
                            ({"layer_types": layer_types, "gqa_layers": [7, 1, 3, 5], "gqa_interval": 3},
                             "DG")):
        assert read({**SOLAR, **fields})["attention_pattern"] == pattern, fields


def test_sizes_of_solar_open_2_are_explicit_or_follow_from_heads() -> None:
    read = SolarLayers().read
    default_sizes = {"num_key_heads": 6, "num_value_heads": 6, "key_head_dim": 4, "value_head_dim": 4,
                     "conv_taps": 4,
                     "gate_rank": 4, "negative_eigenvalues": True}
    for fields, changed in (({}, {}), ({"linear_attn_config": LINEAR_CONFIG | {"num_kv_heads": None}}, {}),
                            ({"linear_attn_config": LINEAR_CONFIG | {"num_kv_heads": 6}}, {}),
                            ({"linear_attn_config": LINEAR_CONFIG | {"short_conv_kernel_size": 3}},
                             {"conv_taps": 3}),
                            ({"kda_allow_neg_eigval": False}, {"negative_eigenvalues": False})):
        assert read({**SOLAR, **fields})["linear_attention"] == default_sizes | changed, fields


@pytest.mark.each(("fields", "message"), [
    ({"gqa_interval": 0}, "gqa_interval = 0 must be an integer of 1 or more"),
    ({"gqa_interval": 3.5}, "gqa_interval = 3.5 must be a whole number"),
    ({"gqa_layers": [0, 8]}, r"gqa_layers = \[0, 8\] must name layers from 0 to 7 once each"),
    ({"gqa_layers": [0], "layer_types": ["full_attention"] * 8}, "and agree with layer_types"),
    ({"layer_types": ["full_attention"], "gqa_layers": [0]}, "layer_types must name .* for each of 8 layers"),
    ({"layer_types": ["linear_attention"] * 8}, "no layer has softmax attention"),
    ({"linear_attn_config": LINEAR_CONFIG | {"num_kv_heads": 2}},
     "num_kv_heads = 2, but only null or num_heads = 6"),
    ({"kda_allow_neg_eigval": "false"}, "kda_allow_neg_eigval = 'false' must be true or false"),
    ({"linear_attn_config": {"num_heads": 6}}, "exactly num_heads, head_dim, short_conv_kernel_size"),
    ({"num_hidden_layers": 10**9}, "count its zeros")])
def test_invalid_layers_of_solar_open_2_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SolarLayers().read({**SOLAR, **fields})


@pytest.mark.each(("field", "value"), [
    ("kda_use_full_proj", True), ("use_rope", True), ("hc_rate", 2), ("use_gqa_gate", False),
    ("use_gqa_gate_bias", True), ("attention_bias", True), ("num_nextn_predict_layers", 1)])
def test_unreleased_switches_of_solar_open_2_are_refused(field: str, value: object) -> None:
    family = models.get_family("solar_open2")
    config = family.to_hf_config(recipes.get("tiny-solar-open2").model, "float32", TokenIds())
    with pytest.raises(UserError, match=f"{field} = {value}, but only .* is supported for this family"):
        family.from_hf_config(config | {field: value})


@pytest.mark.parametrize(("name", "changed", "message"), [
    ("tiny-solar-open2", {"value_head_dim": 8}, "keys and values must have the same number of heads"),
    ("tiny-solar-open2", {"gate_rank": 8}, "equal to gate_rank")])
def test_linear_attention_that_a_family_cannot_write_is_refused(name: str, changed: dict,
                                                                message: str) -> None:
    model = recipes.get(name).model
    assert model.linear_attention is not None
    model = replace(model, linear_attention=replace(model.linear_attention, **changed))
    with pytest.raises(UserError, match=message):
        models.get_family(model.family).check(model)
