"""Every element of the model is in exactly one block, and writing to a block changes the model."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sov.engine.model.specs import clamp_gates
from megatron_sov.model import recipes

LAYERS = 8
"""Number of layers of a big model that include every kind."""


def compare_with_family(recipe: str) -> dict[str, Any]:
    """Build the first layers of a recipe on meta tensors, and compare their tensors with the family's map.

    Returns:
        "differing": keys whose (number of elements, global shape, dtype) differ; "num_tensors": tensors of
        the model; "all_on_meta": whether no parameter has memory.
    """
    import torch

    from megatron_sov import recipes
    from megatron_sov.engine.model.language_model import build_model
    from megatron_sov.engine.model.local_shards import list_local_shards
    from megatron_sov.engine.parallel import world
    from megatron_sov.model.config import ParallelConfig, apply_settings
    from megatron_sov.model.families import supported as models

    config = apply_settings(recipes.get(recipe), [f"model.num_layers={LAYERS}"])
    world.join_world(ParallelConfig())
    with torch.device("meta"):
        model = build_model(config.model, ParallelConfig(), config.train)
    tensors: dict[str, list[Any]] = {}
    for shard in list_local_shards(model):
        tensor = tensors.setdefault(shard.key, [0, list(shard.global_shape), str(shard.data.dtype)])
        tensor[0] += shard.data.numel()
    expected: dict[str, list[Any]] = {}
    for link in models.get_family(config.model.family).links(config.model):
        tensor = expected.setdefault(link.key, [0, list(link.shape),
                                                "torch.float32" if link.fp32 else "torch.bfloat16"])
        tensor[0] += torch.Size(link.block_shape).numel()
    return {"num_tensors": len(tensors), "all_on_meta": all(p.is_meta for p in model.parameters()),
            "differing": [k for k in {**tensors, **expected} if tensors.get(k) != expected.get(k)]}


@pytest.mark.deep
@pytest.mark.distributed
def test_full_size_models_have_the_tensors_that_their_families_map(ranks, job) -> None:
    # K-EXAONE: 8 in the dense layer, 12 in each other and the MTP layer; 3 in all: embedding, norm, head
    sizes = {"solar-open-102b": LAYERS * 10 + 3, "k-exaone-236b": 8 + (LAYERS - 1) * 12 + 12 + 3,
             "qwen3-moe-30b": LAYERS * 9 + 3}
    for name, (result,) in zip(
            sizes, ranks(*(job(__file__, "compare_with_family", 1, {"recipe": name}) for name in sizes)),
            strict=True):
        assert result["differing"] == [] and result["all_on_meta"], name
        assert result["num_tensors"] == sizes[name], name


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


def test_activation_bounds_apply_after_adapters() -> None:
    model = recipes.get("tiny-k-exaone2").model
    layers = [SimpleNamespace(layer_number=n, mlp=Network()) for n in (4, 5)]  # limit 7 on the second
    linears: list[Any] = [part.linear_fc1 for layer in layers
                          for part in (*layer.mlp.experts, layer.mlp.shared_experts)]
    for linear in linears:  # the adapter's addition
        linear.register_forward_hook(lambda module, inputs, outputs: (outputs[0] * 3, outputs[1]))
    clamp_gates(SimpleNamespace(decoder=SimpleNamespace(layers=layers)), model)

    inputs = torch.tensor([[-4.0, 4.0, -4.0, 1.0]])  # two gates, two up projections

    assert all(linear(inputs)[0].tolist() == [[-12.0, 12.0, -12.0, 3.0]] for linear in linears[:3])
    assert all(linear(inputs)[0].tolist() == [[-12.0, 7.0, -7.0, 3.0]] for linear in linears[3:])
    assert layers[1].mlp.shared_experts.linear_fc2(inputs)[0].tolist() == inputs.tolist()
