"""Silent corruption: a flipped bit of a weight or a wrong gradient is detected, and its process is named."""

from typing import Any

import pytest
import torch

from megatron_sov.base.errors import SilentCorruption
from megatron_sov.engine.model import replica_checks
from megatron_sov.engine.model.replica_checks import compute_checksum, flip_bit
from megatron_sov.engine.parallel import world
from megatron_sov.train.loop import train_step
from tests.tiny import tiny_model, tiny_trainer


@pytest.mark.each("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_flipped_bit_changes_the_checksum_and_little_else(dtype: torch.dtype) -> None:
    tensors = [torch.randn(50, 7, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
    checksum, copy = compute_checksum(tensors), tensors[1].clone()
    assert compute_checksum([t.clone() for t in tensors]) == checksum
    flip_bit(tensors[1])
    assert compute_checksum(tensors) != checksum
    changed = (tensors[1] != copy).nonzero()
    assert len(changed) == 1 and torch.allclose(tensors[1], copy, rtol=0.6)
    flip_bit(tensors[1])
    assert compute_checksum(tensors) == checksum


def test_a_checksum_is_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: fetched.append(self) or cpu(self))
    assert int(compute_checksum(torch.ones(2, 3, dtype=d) for d in (torch.float32, torch.bfloat16))) != 0
    assert len(fetched) == 1 and fetched[0].numel() == 1
    assert int(compute_checksum([])) == 0


def find_flipped_replicas(layout: dict[str, int], flipped_on: list[int], expert: bool) -> list[Any]:
    """Inside ranks: find differing replicas before and after some ranks flip a bit of a weight.

    The weight is one of a routed expert, or a shared one.
    """
    _, model = tiny_model("tiny-solar-open", "model.num_layers=1", layout=layout)
    differing_ranks = [replica_checks.find_differing_replicas(model)]
    if torch.distributed.get_rank() in flipped_on:
        # Megatron-Core sets `allreduce` to False on routed experts.
        replica_checks.flip_bit(next(p for p in model.parameters()
                                     if p.dim() == 2 and getattr(p, "allreduce", True) != expert))
    differing_ranks.append(replica_checks.find_differing_replicas(model))
    return differing_ranks


@pytest.mark.distributed
def test_a_majority_names_the_process_whose_weight_changed(ranks: Any, job: Any) -> None:
    # layout, number of ranks, ranks that flip a bit, whether of an expert, ranks that are named
    cases = [({}, 3, [1], False, [1]), ({"ep": 2}, 2, [1], False, [0, 1]), ({"ep": 2}, 4, [3], True, [1, 3]),
             ({"tp": 2, "sp": True}, 2, [1], False, []), ({}, 3, [], False, [])]
    result = ranks(
        *[job(__file__, "find_flipped_replicas", nproc,
              {"layout": layout, "flipped_on": flipped, "expert": expert})
          for layout, nproc, flipped, expert, _ in cases])
    for per_rank, (layout, nproc, flipped, _, differing_ranks) in zip(result, cases, strict=True):
        assert per_rank == [[[], differing_ranks]] * nproc, (layout, flipped)


def train_with_probe(settings: list[str], data: str, run: str) -> list[Any]:
    """Inside ranks: train two steps without probes, with probes, and with a rank that miscomputes step 2.

    Returns the losses and the error of each run.
    """
    results = []
    for every_steps, fault in ((0, ""), (1, ""), (1, "miscompute@step=2,rank=1")):
        trainer = tiny_trainer(
            data, "model.num_layers=2", "model.num_experts=4", "model.expert_ffn_dim=16",
            "train.global_batch_size=4", "train.micro_batch_size=2", "train.steps=9",
            "train.deterministic=true", "train.hidden_dropout=0.1", "guards.hang_timeout_s=0",
            f"guards.probe_every_steps={every_steps}", *settings, run=run, faults=fault)
        losses, error = [], ""
        try:
            losses += [train_step(trainer).loss for _ in range(2)]
        except SilentCorruption as e:
            error = str(e)
        results.append([losses, error])
        trainer.close()
        world.leave_world()
    return results


@pytest.mark.deep
@pytest.mark.distributed
def test_a_nondeterministic_process_is_named_and_probing_has_no_effect(ranks: Any, job: Any, packed_data: Any,
                                                                       tmp_path: Any) -> None:
    (results,) = ranks(job(__file__, "train_with_probe", 2, {
        "settings": ["parallel.tp=2", "parallel.sp=true"], "data": str(packed_data.text),
        "run": str(tmp_path / "run")}))
    for unprobed, probed, (losses, error) in results:
        assert unprobed == probed and len(unprobed[0]) == 2
        assert losses == []
        assert "the same micro-batch gave other gradients when it was computed again" in error
        assert error.startswith("silent corruption after step 2: ") and "(rank 1 on " in error
