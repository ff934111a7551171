"""Tensors whose rows stand by heads, and the config items of families with linear attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_sov.base.errors import UserError
from megatron_sov.model import recipes
from megatron_sov.model.config import LinearAttentionConfig
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.linear_layers import DELTA_NET, GATED_ATTENTION, LinearLayers, SharedWidth
from megatron_sov.model.families.weights import Link

MODEL = replace(recipes.get("tiny-qwen3-next").model, num_heads=4, num_kv_heads=2, head_dim=8, hidden_size=5,
                linear_attention=LinearAttentionConfig(2, 6, 3, 4, conv_taps=2))


def link(name: str) -> Link:
    """Return the block of the first layer that has a tensor of this name."""
    return next(one for one in models.get("qwen3_next").links(MODEL)
                if one.key.startswith("decoder.") and one.key.endswith(name))


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


@pytest.mark.parametrize("name", [entry.megatron for entry in (*DELTA_NET, *GATED_ATTENTION)])
def test_what_is_split_is_joined_again(name: str) -> None:
    one = link(name)
    block = numbered(one.block_shape)
    parts = one.split(block)
    assert {n: tuple(t.shape) for n, t in parts.items()} == one.hf_shapes()
    assert torch.equal(one.join(parts), block)


def test_a_convolutions_channels_stand_by_kind_in_the_folder() -> None:
    """Key head 0 has query 0-2, key 3-5, values 6-17; head 1 the 18 behind."""
    (found,) = link("conv1d.weight").split(torch.arange(36.)[:, None, None].expand(36, 1, 2)).values()
    heads = [[*range(a, b), *range(18 + a, 18 + b)] for a, b in ((0, 3), (3, 6), (6, 18))]
    assert found[:, 0, 0].tolist() == [row for kind in heads for row in kind]


def test_a_heads_gate_stands_behind_it_in_the_folder() -> None:
    """A group has two query heads, their two gates, key and value, of 8 rows each."""
    one = link("linear_qkv.weight")
    rows = torch.arange(96.)[:, None].expand(96, 5)
    query = one.split(rows)[one.hf_names[0]][::8, 0]
    assert query.tolist() == [0, 16, 8, 24, 48, 64, 56, 72]


def test_layers_are_a_list_or_follow_from_an_interval() -> None:
    read = LinearLayers().read
    assert read({"num_hidden_layers": 8}) == {"attention_pattern": "DDDG"}
    assert read({"num_hidden_layers": 4, "full_attention_interval": 2}) == {"attention_pattern": "DG"}
    listed = ["full_attention", "linear_attention", "linear_attention"]
    assert read({"num_hidden_layers": 3, "layer_types": listed}) == {"attention_pattern": "GDD"}
    for config, expected in (
            ({"layer_types": listed, "full_attention_interval": 3}, "disagree; remove the latter"),
            ({"layer_types": listed[:2]}, "for each of 3 layers"),
            ({"layer_types": ["sliding_attention"] * 3}, "must name linear_attention or full_attention"),
            ({"full_attention_interval": 0}, "must be an integer of 1 or more"),
            ({"num_hidden_layers": 10**9}, "count its zeros")):
        with pytest.raises(UserError, match=expected):
            read({"num_hidden_layers": 3, **config})


def test_a_shared_width_is_a_number_of_experts() -> None:
    read = SharedWidth(512).read
    assert read({"moe_intermediate_size": 256}) == {"num_shared_experts": 2}
    for width in (0, 100):
        with pytest.raises(UserError, match="must be a multiple of moe_intermediate_size = 256"):
            read({"moe_intermediate_size": 256, "shared_expert_intermediate_size": width})
