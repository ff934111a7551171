"""Limits on gate and up projections include adapters and experts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from megatron_sov.engine.model.specs import clamp_gates
from megatron_sov.model import recipes


class Network(torch.nn.Module):
    """Two experts and a shared expert, with Megatron-Core's names."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.ModuleDict({"linear_fc1": Linear()}) for _ in range(2))
        self.shared_experts = torch.nn.ModuleDict({"linear_fc1": Linear(), "linear_fc2": Linear()})


class Linear(torch.nn.Module):
    """A linear layer with Megatron-Core's interface and weight 1."""

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, None]:
        return states, None


def test_bounds_come_behind_adapters_in_layers_that_have_one() -> None:
    model = recipes.get("tiny-k-exaone2").model
    layers = [SimpleNamespace(layer_number=n, mlp=Network()) for n in (4, 5)]  # limit 7 on the second
    linears: list[Any] = [part.linear_fc1 for layer in layers
                          for part in (*layer.mlp.experts, layer.mlp.shared_experts)]
    for linear in linears:  # the adapter's addition
        linear.register_forward_hook(lambda module, inputs, outputs: (outputs[0] * 3, outputs[1]))
    clamp_gates(SimpleNamespace(decoder=SimpleNamespace(layers=layers)), model)

    given = torch.tensor([[-4.0, 4.0, -4.0, 1.0]])  # two gates, two up projections

    assert all(linear(given)[0].tolist() == [[-12.0, 12.0, -12.0, 3.0]] for linear in linears[:3])
    assert all(linear(given)[0].tolist() == [[-12.0, 7.0, -7.0, 3.0]] for linear in linears[3:])
    assert layers[1].mlp.shared_experts.linear_fc2(given)[0].tolist() == given.tolist()
