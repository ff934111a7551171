"""Blocks: every number of the model is in exactly one, and writing into a block changes the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_sov.mcore.model.local_shards import checksum, flip_bit
from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron
from tests.tiny import tiny_model, tiny_trainer

# Bits that should be equal: one flipped bit is seen, and the process that holds it is named.

prepare_megatron()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_flipped_bit_changes_the_checksum_and_little_else(dtype: torch.dtype) -> None:
    tensors = [torch.randn(50, 7, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
    before, copy = checksum(tensors), tensors[1].clone()
    assert checksum([t.clone() for t in tensors]) == before
    flip_bit(tensors[1])
    assert checksum(tensors) != before
    changed = (tensors[1] != copy).nonzero()
    assert len(changed) == 1 and torch.allclose(tensors[1], copy, rtol=0.6)
    flip_bit(tensors[1])
    assert checksum(tensors) == before


def test_a_checksum_is_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: fetched.append(self) or cpu(self))
    assert int(checksum(torch.ones(2, 3, dtype=d) for d in (torch.float32, torch.bfloat16))) != 0
    assert len(fetched) == 1 and fetched[0].numel() == 1
    assert int(checksum([])) == 0


def replicas(layout: dict[str, int], flipped_on: list[int], expert: bool) -> list[Any]:
    """Runs inside ranks: who differs before and after a bit of some ranks is flipped,
    in a shared weight or a routed expert."""
    from megatron_sov import recipes
    from megatron_sov.config import ParallelConfig, apply_settings
    from megatron_sov.mcore.model import init, local_shards
    from megatron_sov.mcore.model.language_model import build
    from megatron_sov.mcore.parallel import world

    config = apply_settings(recipes.get("tiny-solar-open"), ["model.vocab_size=368", "model.num_layers=1"])
    place = world.join(ParallelConfig(**layout))
    model = build(config.model, ParallelConfig(**layout), config.train)
    init.initialise(model, config.model, 1)
    found = [local_shards.differing_replicas(model)]
    if place.rank in flipped_on:
        local_shards.flip_bit(next(p for p in model.parameters()
                                     if p.dim() == 2 and getattr(p, "allreduce", True) != expert))
    found.append(local_shards.differing_replicas(model))
    world.leave()
    return found


@pytest.mark.distributed
def test_the_process_whose_weight_changed_is_named_where_a_majority_knows_better(
        ranks: Any, job: Any) -> None:
    cases = [({}, 3, [1], False, [1]), ({"ep": 2}, 2, [1], False, [0, 1]), ({"ep": 2}, 4, [3], True, [1, 3]),
             ({"tp": 2, "sp": True}, 2, [1], False, []), ({}, 3, [], False, [])]
    found = ranks(
        *[job(__file__, "replicas", nproc, {"layout": layout, "flipped_on": flipped, "expert": expert})
          for layout, nproc, flipped, expert, _ in cases])
    for per_rank, (layout, nproc, flipped, _, named) in zip(found, cases, strict=True):
        assert per_rank == [[[], named]] * nproc, (layout, flipped)


def repeated(settings: list[str], data: str, run: str) -> list[Any]:
    """Runs inside ranks: two steps without and with a probe, and with one process computing wrongly
    in the second one.

    Returns the losses of each, and what is said at the end.
    """

    from megatron_sov.errors import SilentCorruption
    from megatron_sov.mcore.parallel import world

    found = []
    for every, lie in ((0, ""), (1, ""), (1, "miscompute@step=2,rank=1")):
        trainer = tiny_trainer(
            data, "model.num_layers=2", "model.num_experts=4", "model.expert_ffn_dim=16",
            "train.global_batch_size=4", "train.micro_batch_size=2", "train.steps=9",
            "train.deterministic=true", "train.hidden_dropout=0.1", "guards.hang_timeout_s=0",
            f"guards.probe_every_steps={every}", *settings, run=run, faults=lie)
        losses, said = [], ""
        try:
            losses += [trainer.update().loss for _ in range(2)]
        except SilentCorruption as e:
            said = str(e)
        found.append([losses, said])
        trainer.close()
        world.leave()
    return found


@pytest.mark.distributed
def test_a_process_that_computes_otherwise_the_second_time_is_named_and_probing_changes_nothing(
        ranks: Any, job: Any, packed_data: Any, tmp_path: Any) -> None:
    layouts = {"tp": ["parallel.tp=2", "parallel.sp=true"], "pp": ["parallel.pp=2"],
               "zero1": ["parallel.zero1=true", "parallel.overlap_grad_reduce=true",
                         "parallel.overlap_param_gather=true"]}
    data = str(packed_data.text)
    found = ranks(
        *[job(__file__, "repeated", 2, {"settings": settings, "data": data, "run": str(tmp_path / name)})
          for name, settings in layouts.items()])
    for name, per_rank in zip(layouts, found, strict=True):
        for plain, probed, (losses, said) in per_rank:
            assert plain == probed and len(plain[0]) == 2, name
            assert losses == [] and ("the same micro-batch gave other gradients when it was "
                                     "computed again") in said, name
            assert said.startswith("silent corruption after step 2: ") and "(rank 1 on " in said, name


def covered(layout: dict[str, Any]) -> dict[str, Any]:
    """Return which parameters blocks do not reach, and which elements are not owned by
    exactly one process."""
    import torch
    import torch.distributed as dist

    from megatron_sov.mcore.model.local_shards import ParameterLookup, local_shards

    _, model = tiny_model("tiny-k-exaone", layout=layout)
    parameters = list(model.parameters())
    local = local_shards(model)
    lookup = ParameterLookup(parameters)
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
            "shapes": {k: list(t.shape) for k, t in owners.items()},
            "buffers": sorted(k for k, p in found.items() if p is None),
            "sorted": [b.key for b in local] == sorted(b.key for b in local)}


@pytest.mark.distributed
def test_blocks_are_the_model_at_every_layout(ranks, job) -> None:
    layouts = [(1, {}), (2, {"tp": 2, "sp": True}), (2, {"ep": 2}),
               (4, {"tp": 2, "sp": True, "pp": 2, "ep": 2}), (2, {"pp": 2, "vpp": 2})]
    results = ranks(*(job(__file__, "covered", n, {"layout": layout}) for n, layout in layouts))
    for (_, layout), per_rank in zip(layouts, results, strict=True):
        for result in per_rank:
            assert result["once"] and result["sorted"], layout
            assert result["wrong"] == [], layout
            assert result["shapes"] == results[0][0]["shapes"], layout
            assert all(key.endswith("expert_bias") for key in result["buffers"])
    assert len(results[0][0]["buffers"]) == 3  # four layers, the first dense


LAYERS = 8
"""As many of a big model's layers as have every kind."""


def full_size(recipe: str) -> dict[str, Any]:
    """Build the first layers of a big recipe's model on meta tensors, which take no memory;
    return how it differs from its family's map."""
    import torch

    from megatron_sov import models, recipes
    from megatron_sov.config import ParallelConfig, apply_settings
    from megatron_sov.mcore.model.language_model import build
    from megatron_sov.mcore.model.local_shards import local_shards
    from megatron_sov.mcore.parallel import world

    config = apply_settings(recipes.get(recipe), [f"model.num_layers={LAYERS}"])
    world.join(ParallelConfig())
    with torch.device("meta"):
        model = build(config.model, ParallelConfig(), config.train)
    found: dict[str, list[Any]] = {}
    for block in local_shards(model):
        tensor = found.setdefault(block.key, [0, list(block.global_shape), str(block.data.dtype)])
        tensor[0] += block.data.numel()
    expected: dict[str, list[Any]] = {}
    for link in models.get(config.model.family).links(config.model):
        tensor = expected.setdefault(link.key, [0, list(link.shape),
                                                "torch.float32" if link.fp32 else "torch.bfloat16"])
        tensor[0] += torch.Size(link.block_shape).numel()
    return {"num_tensors": len(found), "all_on_meta": all(p.is_meta for p in model.parameters()),
            "differing": [k for k in {**found, **expected} if found.get(k) != expected.get(k)]}


@pytest.mark.distributed
def test_full_size_models_have_the_tensors_that_their_families_map(ranks, job) -> None:
    sizes = {"solar-open-102b": LAYERS * 10 + 3, "k-exaone-236b": 8 + (LAYERS - 1) * 12 + 12 + 3,
             "qwen2-1.5b": LAYERS * 7 + 2, "qwen3-8b": LAYERS * 8 + 3, "qwen3-moe-30b": LAYERS * 9 + 3}
    for name, (result,) in zip(
            sizes, ranks(*(job(__file__, "full_size", 1, {"recipe": name}) for name in sizes)), strict=True):
        assert result["differing"] == [] and result["all_on_meta"], name
        assert result["num_tensors"] == sizes[name], name
