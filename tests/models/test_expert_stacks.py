"""Experts that are one tensor of a layer: turned and sorted as loops do it, and back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_sov import recipes
from megatron_sov.models.expert_stacks import ExpertStack, StackLayout
from megatron_sov.models.weights import Section, links

MODEL = replace(recipes.get("tiny-gpt-oss").model, num_experts=3, hidden_size=4, expert_ffn_dim=5)


@pytest.mark.parametrize(("shape", "in_turns"), [("H I", True), ("I", True), ("I H", False), ("H", False)])
def test_a_stack_is_each_experts_matrix_turned(shape: str, in_turns: bool) -> None:
    (link,) = links([Section("once", "", "", (ExpertStack("ours", "theirs", shape, in_turns),))], MODEL)
    (stored,) = link.hf_shapes().values()
    theirs = torch.arange(torch.Size(stored).numel()).reshape(stored)
    experts = []
    for expert in theirs:
        columns = [expert[..., 0::2], expert[..., 1::2]] if in_turns else [expert]  # gate, up
        experts.append(torch.cat([part.t() if part.dim() == 2 else part for part in columns]))
    ours = link.join({"theirs": theirs})
    assert torch.equal(ours, torch.stack(experts)) and tuple(ours.shape) == link.shape == link.extent
    assert torch.equal(link.split(ours)["theirs"], theirs) and link.rows() == {}
    assert isinstance(link.layout, StackLayout)
    assert torch.equal(ours.flatten()[link.layout.places(theirs.flatten())], theirs.flatten())
