"""Blocks: every number of the model is in exactly one, and writing into a block changes the model."""

from __future__ import annotations

from typing import Any

import pytest


def covered(layout: dict[str, Any]) -> dict[str, Any]:
    """Return which parameters blocks do not reach, and which elements are not owned by exactly one process."""
    import torch
    import torch.distributed as dist

    from megatron_sov import recipes
    from megatron_sov.config import ParallelConfig, apply_settings
    from megatron_sov.mcore import blocks, world
    from megatron_sov.mcore.model import build

    config = apply_settings(recipes.get("tiny-k-exaone"), [
        "model.vocab_size=96", "model.hidden_size=32", "model.head_dim=8", "model.expert_ffn_dim=16"])
    world.join(ParallelConfig(**layout))
    model = build(config.model, ParallelConfig(**layout), config.train)
    parameters = list(model.parameters())
    local = blocks.of(model)
    lookup = blocks.ParameterLookup(parameters)
    found = {b.key: lookup.find(b) for b in local}
    with torch.no_grad():
        for p in parameters:
            p.zero_()
        for b in local:
            b.data.add_(1)
        once = all(p.eq(1).all() for p in parameters)
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, [(b.key, b.global_shape, b.offset, b.shape) for b in local if b.owned])
    owners: dict[str, torch.Tensor] = {}
    for key, whole, offset, shape in (owned for one in everyones for owned in one):
        place = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
        owners.setdefault(key, torch.zeros(whole, dtype=torch.int))[place] += 1
    return {"once": once, "wrong": [k for k, t in owners.items() if not t.eq(1).all()],
            "shapes": {k: list(t.shape) for k, t in owners.items()}, "buffers": sorted(k for k, p in found.items() if p is None),
            "sorted": [b.key for b in local] == sorted(b.key for b in local)}


@pytest.mark.distributed
def test_blocks_are_the_model_at_every_layout(ranks, job) -> None:
    layouts = [(1, {}), (2, {"tp": 2, "sp": True}), (2, {"ep": 2}), (4, {"tp": 2, "sp": True, "pp": 2, "ep": 2}),
               (2, {"pp": 2, "vpp": 2})]
    results = ranks(*(job(__file__, "covered", n, {"layout": layout}) for n, layout in layouts))
    for (_, layout), per_rank in zip(layouts, results, strict=True):
        for result in per_rank:
            assert result["once"] and result["sorted"], layout
            assert result["wrong"] == [], layout
            assert result["shapes"] == results[0][0]["shapes"], layout
            assert all(key.endswith("expert_bias") for key in result["buffers"])
    assert len(results[0][0]["buffers"]) == 3  # four layers, the first dense
