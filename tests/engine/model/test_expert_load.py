"""Tokens per expert in training and evaluation; a rejected step leaves the biases unchanged."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sov.engine.decode.forward_only import DocumentBatch
from megatron_sov.engine.model.expert_load import ExpertLoad
from megatron_sov.train.loop import train_step
from tests.tiny import tiny_trainer


def count_in_steps_and_evaluation(data: str, run: str) -> dict[str, Any]:
    """Take an accepted and a rejected step, then run a forward pass with counted tokens.

    Returns:
        "step loads": per step, expert assignments of each layer;
        "evaluation load": the same for the forward pass;
        "result": what the forward pass returned;
        "uncounted": sum of the assignments counted while nothing ran (must be 0);
        "unchanged": whether the rejected step left biases and weights as they were;
        the other keys: settings and counters to compare with.
    """
    trainer = tiny_trainer(data, "model.num_layers=2", "train.global_batch_size=8",
                           "train.micro_batch_size=2", "train.steps=9", "guards.hang_timeout_s=0",
                           "parallel.ep=2", run=run, faults="nan@step=2,rank=1")
    expert_load = trainer.expert_load
    step_loads, states = [], []
    for _ in range(2):
        train_step(trainer)
        step_loads.append(expert_load.gather().sum(dim=1).tolist())
        states.append([expert_load.biases(), *(p.detach().clone() for p in trainer.model.parameters())])

    documents = DocumentBatch([[1, 2, 3], [4, 5]], torch.device("cpu"), min_tokens=16)

    def evaluate() -> Any:
        return trainer.policy.map([documents], lambda hidden, head, batch: len(hidden))

    result, evaluation_load = expert_load.count_during(evaluate)
    _, load_at_rest = expert_load.count_during(lambda: None)
    evaluate()  # outside of `count_during`: must not be counted by the next one
    _, load_after_evaluation = expert_load.count_during(lambda: None)
    trainer.close()
    return {"step loads": step_loads, "learned tokens": trainer.state.tokens, "result": result,
            "evaluation load": evaluation_load.sum(dim=1).tolist(),
            "uncounted": float((load_at_rest + load_after_evaluation).sum()),
            "bias": float(states[0][0].abs().max()),
            "unchanged": all(torch.equal(a, b) for a, b in zip(*states, strict=True)),
            "skipped steps": [e.first_step for e in trainer.batches.ledger.entries if e.skip],
            "top k": trainer.config.model.num_experts_per_token,
            "bias update": trainer.config.model.router_bias_update_rate}


@pytest.mark.distributed
def test_tokens_are_counted_once_and_a_refused_step_moves_no_bias(ranks: Any, job: Any, packed_data: Any,
                                                                  tmp_path: Any) -> None:
    ((result, result_of_rank_1),) = ranks(job(__file__, "count_in_steps_and_evaluation", 2,
                                              {"data": str(packed_data.text), "run": str(tmp_path / "run")}))
    assert result == result_of_rank_1
    assert result["step loads"][0] == [result["learned tokens"] * result["top k"]] * 2, (
        "every token, in both layers")
    assert result["bias"] == pytest.approx(result["bias update"])
    assert result["unchanged"] and result["skipped steps"] == [1]  # the second step; the ledger counts from 0
    assert result["evaluation load"] == [2 * 5 * result["top k"]] * 2, (
        "both processes ran five tokens; padding is left out")
    assert result["result"] == [1] and result["uncounted"] == 0


def test_all_layers_loads_are_fetched_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = SimpleNamespace(architecture=SimpleNamespace(
        num_layers=3, num_experts=2, num_mtp_moe_layers=lambda: 1))
    transfers, copy_to_cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: transfers.append(self) or copy_to_cpu(self))
    rows = ExpertLoad(model)._stack_layers({1: torch.tensor([4.0, 0.0]), 4: torch.tensor([1.0, 3.0])})
    assert rows.tolist() == [[0, 0], [4, 0], [0, 0], [0, 0], [1, 3]] and rows.dtype == torch.float64
    assert len(transfers) == 1
    assert not ExpertLoad(model)._stack_layers({}).any()
