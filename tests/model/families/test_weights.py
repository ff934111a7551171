"""Weight maps: interleaved rows equal a loop and Megatron-Core's reading, joins are inverted by splits, and
invalid declarations fail at import."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from megatron_sov import recipes
from megatron_sov.model.config import ModelConfig
from megatron_sov.model.families.weights import QKV, Experts, GateUp, Link, Same, WeightSection, build_links

TINY = recipes.get("tiny-k-exaone").model


def build_qkv_link(model: ModelConfig) -> Link:
    return build_links([WeightSection("once", "", "", (QKV("qkv", "q", "k", "v"),))], model)[0]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5))
def test_qkv_rows_equal_a_loop_over_groups(groups: int, heads_per_group: int, half_dim: int,
                                           hidden: int) -> None:
    dim = 2 * half_dim
    model = replace(TINY, num_heads=groups * heads_per_group, num_kv_heads=groups, head_dim=dim,
                    hidden_size=hidden)
    q, k, v = (torch.randn(num_heads * dim, hidden)
               for num_heads in (groups * heads_per_group, groups, groups))
    rows = []
    for group in range(groups):
        for head in range(heads_per_group):
            rows += [q[(group * heads_per_group + head) * dim + i] for i in range(dim)]
        rows += [k[group * dim + i] for i in range(dim)]
        rows += [v[group * dim + i] for i in range(dim)]
    link = build_qkv_link(model)
    qkv = link.join({"q": q, "k": k, "v": v})
    assert torch.equal(qkv, torch.stack(rows))
    assert qkv.shape == link.shape
    split = link.split(qkv)
    assert torch.equal(split["q"], q) and torch.equal(split["k"], k) and torch.equal(split["v"], v)


def test_megatron_reads_the_interleaved_rows_as_query_key_value() -> None:
    """Megatron-Core's own SelfAttention, with our joined weight, returns the three separate projections."""
    from megatron.core.transformer.attention import SelfAttention

    model = replace(TINY, num_heads=6, num_kv_heads=2, head_dim=4, hidden_size=8)
    hf_weights = {"q": torch.randn(24, 8), "k": torch.randn(8, 8), "v": torch.randn(8, 8)}
    qkv_weight = build_qkv_link(model).join(hf_weights)
    hidden = torch.randn(5, 1, 8)

    class Projection(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return x @ qkv_weight.T, None

    attention = SimpleNamespace(
        linear_qkv=Projection(), num_attention_heads_per_partition=6, num_query_groups_per_partition=2,
        hidden_size_per_attention_head=4, world_size=1, q_layernorm=None, k_layernorm=None,
        config=SimpleNamespace(num_query_groups=2, test_mode=False))
    projections = SelfAttention.get_query_key_value_tensors(attention, hidden)
    for projection, name in zip(projections, "qkv", strict=True):
        torch.testing.assert_close(projection.flatten(2), hidden @ hf_weights[name].T)


def test_gate_comes_before_up_and_experts_are_stacked() -> None:
    section = WeightSection("once", "mlp.", "m.", (Experts(GateUp("fc1", "{e}.gate", "{e}.up", "I H")),))
    links = build_links([section], TINY)
    assert len(links) == TINY.num_experts
    link = links[3]
    assert (link.key, link.shape, link.offset, link.extent) == ("mlp.fc1", (8, 256, 128), (3, 0, 0),
                                                                (1, 256, 128))
    hf_weights = {"m.3.gate": torch.randn(128, 128), "m.3.up": torch.randn(128, 128)}
    joined = link.join(hf_weights)
    assert torch.equal(joined, torch.cat([hf_weights["m.3.gate"], hf_weights["m.3.up"]]))
    for name, (first, count) in link.rows().items():
        assert torch.equal(joined[first:first + count], hf_weights[name])


def test_rows_of_unchanged_and_interleaved_tensors() -> None:
    (head,) = build_links([WeightSection("once", "", "", (Same("head", "head", "V H"),))], TINY)
    assert head.rows() == {"head": (0, TINY.vocab_size)}
    assert build_qkv_link(TINY).rows() == {}, "interleaved rows are no ranges"


def test_every_link_of_every_recipe_inverts_on_meta_and_covers_its_tensor() -> None:
    from megatron_sov.model.families import supported as models

    checked_layouts = set()
    # RoPE and lengths change no tensor's shape, and further experts only repeat links: models that differ
    # in these alone are checked once.
    for model in {replace(model, rope_theta=1e6, yarn=None, max_position_tokens=1,
                          num_experts=min(model.num_experts, 3))
                  for model in (recipes.get(name).model for name in recipes.names())}:
        num_elements: dict[str, int] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for link in models.get_family(model.family).links(model):
            if link.layout not in checked_layouts:  # equal layouts are joined and split in the same way
                checked_layouts.add(link.layout)
                hf_shapes = link.hf_shapes()
                block = link.join({name: torch.empty(shape, device="meta")
                                   for name, shape in hf_shapes.items()})
                assert tuple(block.shape) == link.block_shape
                assert {name: tuple(t.shape) for name, t in link.split(block).items()} == hf_shapes
            num_elements[link.key] = num_elements.get(link.key, 0) + math.prod(link.block_shape)
            assert shapes.setdefault(link.key, link.shape) == link.shape
        assert num_elements == {key: math.prod(shape) for key, shape in shapes.items()}


@pytest.mark.each(("declare", "message"), [
    (lambda: Same("a", "b", "V Z"), "'Z' in the shape"),
    (lambda: Same("a", "b", ""), "in the shape ''"),
    (lambda: Experts(Same("a", "b", "H")), "lacks the placeholder {e}"),
    (lambda: Experts(Same("a.{e}", "b.{e}", "H")), "holds all experts"),
    (lambda: WeightSection("every layer", "decoder.", "model.{l}.", ()),
     "both prefixes need the placeholder {l}"),
    (lambda: WeightSection("once", "decoder.{l}.", "model.", ()),
     "neither prefix may have the placeholder {l}"),
    (lambda: WeightSection("once", "", "", (Same("a", "b.{e}", "H"),)), "an expert's in Experts"),
    (lambda: WeightSection("once", "", "", (Same("a", "b", "H"), Same("c", "b", "H"))), "names b twice"),
])
def test_an_invalid_declaration_fails_at_construction(declare, message: str) -> None:
    with pytest.raises(ValueError) as e:
        declare()
    assert message in str(e.value)


def test_two_sections_may_not_claim_one_tensor() -> None:
    section = WeightSection("once", "", "", (Same("a", "b", "H"),))
    with pytest.raises(ValueError, match="names a tensor twice"):
        build_links([section, section], TINY)

