"""Randomness is a function of seed and step: a run in two pieces is the run in one piece,
and nothing was stored for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

STEPS, FIRST = 4, 2


def pieces(data: str, run: str, layout: dict[str, Any], dropout: float,
           recompute: bool = False) -> dict[str, Any]:
    """Train in one go, then in two pieces with a checkpoint between them;
    returns the losses and whether all bits agree."""
    import torch.distributed as dist

    from megatron_sov import recipes
    from megatron_sov.config import ParallelConfig, apply_settings
    from megatron_sov.data.token_shards import open_sources
    from megatron_sov.mcore.checkpoint import load
    from megatron_sov.mcore.model.local_shards import local_shards
    from megatron_sov.mcore.parallel import world
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.lm import LanguageModelling
    from megatron_sov.train.trainer import Trainer

    config = apply_settings(recipes.get("tiny-solar-open"), [
        "model.vocab_size=368", "model.hidden_size=32", "model.num_layers=2", "model.head_dim=8",
        "model.expert_ffn_dim=16", 'data.phases=[{"name": "main", "seq_len": 32}]',
        "train.global_batch_size=4", "train.micro_batch_size=2", f"train.steps={STEPS}",
        f"train.hidden_dropout={dropout}", f"train.recompute={str(recompute).lower()}",
        *(f"parallel.{k}={str(v).lower()}" for k, v in layout.items())])
    place = world.join(ParallelConfig(**layout))
    folder = RunFolder(Path(run))
    if place.is_main:
        folder.create()
        folder.declare(config)
    dist.barrier()

    def trainer() -> Any:
        return Trainer(config, place, folder, open_sources({data: 1.0}, 368), LanguageModelling)

    def steps(trainer: Any, count: int) -> list[tuple[float, float]]:
        results = [trainer.update() for _ in range(count)]
        return [(r.loss, r.grad_norm) for r in results]

    whole = trainer()
    expected = steps(whole, STEPS)
    first = trainer()
    found = steps(first, FIRST)
    first.save()
    first.checkpointer.finish()
    second = trainer()
    assert load.damage(folder.checkpoint(FIRST)) is None
    second.resume(folder.checkpoint(FIRST))
    found += steps(second, STEPS - FIRST)
    tensors = [{b.key: b.data for b in [*local_shards(t.model), *t.optimizer.state_shards()]}
               for t in (whole, second)]
    differing = [key for key, value in tensors[0].items() if not value.equal(tensors[1][key])]
    world.leave()
    return {"losses": expected, "same": expected == found, "differing": differing}


@pytest.mark.distributed
def test_dropout_resumes_to_the_bit(ranks: Any, job: Any, packed_data: Any, tmp_path: Path) -> None:
    runs = {"alone": (1, {}, 0.1), "recomputed": (1, {}, 0.1, True), "without": (1, {}, 0.0),
            "experts": (2, {"ep": 2}, 0.1), "sequence": (2, {"tp": 2, "sp": True}, 0.1),
            "stages": (2, {"pp": 2}, 0.1)}
    found = dict(zip(runs, ranks(*(
        job(__file__, "pieces", nproc, {"data": str(packed_data.text), "run": str(tmp_path / name),
                                        "layout": layout, "dropout": dropout, "recompute": bool(more)})
        for name, (nproc, layout, dropout, *more) in runs.items())), strict=True))
    for name, results in found.items():
        assert all(r["same"] and r["differing"] == [] for r in results), name
        assert all(r["losses"] == results[0]["losses"] for r in results), name
    losses = {name: [loss for loss, _ in results[0]["losses"]] for name, results in found.items()}
    assert losses["recomputed"] == losses["alone"]
    assert all(abs(a - b) > 1e-6 for a, b in zip(losses["alone"], losses["without"], strict=True))


def draws() -> list[Any]:
    """What the default generator and the library's tensor-parallel one give at some steps, at tp = 2."""
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megatron_sov.config import ParallelConfig
    from megatron_sov.mcore.parallel import rng, world

    world.join(ParallelConfig(tp=2))
    found = []
    for seed, step in ((1, 0), (1, 1), (2, 0), (1, 0)):
        rng.reseed(seed, step)
        with get_cuda_rng_tracker().fork():
            split = torch.rand(2).tolist()
        found.append([torch.rand(2).tolist(), split])
    world.leave()
    return found


@pytest.mark.distributed
def test_generators_differ_where_work_is_split(ranks: Any, job: Any) -> None:
    (found,) = ranks(job(__file__, "draws", 4))
    assert all(rank[0] == rank[3] for rank in found), "the same step again"
    for at in range(3):
        shared, split = ([rank[at][kind] for rank in found] for kind in (0, 1))
        assert shared[0] == shared[1] != shared[2] == shared[3], (
            "tensor-parallel neighbours drop alike what they both hold")
        assert len({tuple(s) for s in split}) == 4
    assert len({tuple(rank[at][0]) for rank in found for at in range(3)}) == 6
