"""Tokens per expert in training and evaluation; a rejected step leaves the biases unchanged."""

from typing import Any

import pytest
import torch

from megatron_sov.engine.decode.forward_only import DocumentBatch
from megatron_sov.engine.model.expert_load import ExpertLoad
from megatron_sov.engine.parallel import world
from megatron_sov.train.loop import train_step
from tests.tiny import tiny_trainer


def counted(data: str, run: str) -> dict[str, Any]:
    """Inside ranks: an accepted step, a rejected step, and a forward pass with counted tokens."""
    trainer = tiny_trainer(data, "model.num_layers=2", "train.global_batch_size=8",
                           "train.micro_batch_size=2", "train.steps=9", "guards.hang_timeout_s=0",
                           "parallel.ep=2", run=run, faults="nan@step=2,rank=1")
    experts = trainer.expert_load
    seen, states = [], []
    for _ in range(2):
        train_step(trainer)
        seen.append(experts.gather().sum(dim=1).tolist())
        states.append([experts.biases(), *(p.detach().clone() for p in trainer.model.parameters())])
    documents = DocumentBatch([[1, 2, 3], [4, 5]], torch.device("cpu"), min_tokens=16)
    result, load = experts.count_during(lambda: trainer.policy.map([documents],
                                                                   lambda hidden, head, batch: len(hidden)))
    _, unseen = experts.count_during(lambda: None)
    trainer.policy.map([documents], lambda hidden, head, batch: len(hidden))
    _, uncounted = experts.count_during(lambda: None)
    trainer.close()
    world.leave_world()
    return {"seen": seen, "learned tokens": trainer.state.tokens, "result": result,
            "evaluated": load.sum(dim=1).tolist(), "nothing": float((unseen + uncounted).sum()),
            "bias": float(states[0][0].abs().max()),
            "unmoved": all(torch.equal(a, b) for a, b in zip(*states, strict=True)),
            "passed over": [e.first_step for e in trainer.batches.ledger.entries if e.skip],
            "top k": trainer.config.model.num_experts_per_token,
            "rate": trainer.config.model.router_bias_update_rate}


@pytest.mark.distributed
def test_tokens_are_counted_once_and_a_refused_step_moves_no_bias(ranks: Any, job: Any, packed_data: Any,
                                                                  tmp_path: Any) -> None:
    ((found, other),) = ranks(job(__file__, "counted", 2,
                                  {"data": str(packed_data.text), "run": str(tmp_path / "run")}))
    assert found == other
    assert found["seen"][0] == [found["learned tokens"] * found["top k"]] * 2, "every token, in both layers"
    assert found["bias"] == pytest.approx(found["rate"]) and found["unmoved"] and found["passed over"] == [1]
    assert found["evaluated"] == [2 * 5 * found["top k"]] * 2, ("both processes ran five tokens; "
                                                                "padding is left out")
    assert found["result"] == [1] and found["nothing"] == 0


def test_all_layers_loads_are_fetched_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    model: Any = SimpleNamespace(architecture=SimpleNamespace(
        num_layers=3, num_experts=2, num_mtp_moe_layers=lambda: 1))
    fetched, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: fetched.append(self) or cpu(self))
    rows = ExpertLoad(model)._stack_layers({1: torch.tensor([4.0, 0.0]), 4: torch.tensor([1.0, 3.0])})
    assert rows.tolist() == [[0, 0], [4, 0], [0, 0], [0, 0], [1, 3]] and rows.dtype == torch.float64
    assert len(fetched) == 1
    assert not ExpertLoad(model)._stack_layers({}).any()
