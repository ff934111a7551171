"""Losses and divergences of capped logits against plain torch, alone and with a vocabulary that is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.model import test_divergence as divergences, test_logprobs as labels_of
from tests.head_config import head_config

CAP, TEMPERATURE = 1.5, 0.7


def capped(values: torch.Tensor) -> torch.Tensor:
    return CAP * torch.tanh(values / CAP)


def of_a_split_head(tp: int, sp: bool) -> dict[str, Any]:
    """Return figures of capped logits in float64 and this process's parts of the gradients of everything that
    is differentiable, with their places."""
    from megatron.core import parallel_state

    from megatron_sov.engine.model.divergence import Divergence, TeacherStates, TeacherTopK
    from megatron_sov.engine.model.logprobs import Head
    from megatron_sov.engine.parallel import world
    from megatron_sov.model.config import ParallelConfig

    world.join(ParallelConfig(tp=tp, sp=sp))
    rank, tensors = parallel_state.get_tensor_model_parallel_rank(), divergences.whole()
    rows = -(-divergences.VOCABULARY // tp)

    def own(weight: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        padded = torch.cat([weight, 9 * states[:rows * tp - divergences.VOCABULARY]])
        return padded[rank * rows:(rank + 1) * rows].clone()

    teacher_head = own(tensors["teacher weight"], tensors["teacher states"])
    top = teacher_logprobs(tensors).topk(divergences.K)
    teachers = {"states": TeacherStates(tensors["teacher states"], teacher_head, CAP),
                "top-k with the rest": TeacherTopK(top.indices, top.values),
                "top-k alone": TeacherTopK(top.indices, top.values, keep_remainder=False)}
    labels, weights = labels_of.whole()[2], {"first": tensors["first"]}
    local = slice(None) if not sp else slice(rank * len(labels) // tp, (rank + 1) * len(labels) // tp)
    found: dict[str, Any] = {}
    for what in ("cross-entropy", "log-probabilities", *teachers):
        states = tensors["states"][local, None].clone().requires_grad_()
        weight = own(tensors["weight"], tensors["states"]).requires_grad_()
        head = Head(weight, head_config(sp), 5, divergences.VOCABULARY, CAP)
        if what == "cross-entropy":
            sums, values = head.cross_entropy(states, labels, weights)
        elif what == "log-probabilities":
            values = head.logprobs(states, labels, TEMPERATURE)
            sums = {"first": (values * tensors["first"]).sum()}
        else:
            sums, of_row = head.divergence(states, teachers[what], weights, Divergence(0.5, TEMPERATURE))
            values = of_row.divergence
        sums["first"].backward()
        found[what] = {"values": values.tolist(), "states": states.grad[:, 0].tolist(),
                       "weight": weight.grad.tolist()}
    states = tensors["states"][local, None]
    found["logits"] = head.logits(tensors["states"]).tolist()
    found["best"] = [t.tolist() for t in head.best_tokens(tensors["states"])]
    found["most probable"] = [t.tolist() for t in head.most_probable(states, 3, TEMPERATURE)]
    return found


def teacher_logprobs(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return (capped(tensors["teacher states"] @ tensors["teacher weight"].T) / TEMPERATURE).log_softmax(-1)


def expected_of(what: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the same by autograd over whole logits."""
    states, weight = (tensors[name].clone().requires_grad_() for name in ("states", "weight"))
    logits, labels = capped(states @ weight.T), labels_of.whole()[2]
    log_p = (logits / TEMPERATURE).log_softmax(-1)
    if what == "cross-entropy":
        values = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    elif what == "log-probabilities":
        values = log_p[torch.arange(len(labels)), labels]
    else:
        values = divergences.reference(*divergences.over_events(what, log_p, teacher_logprobs(tensors)), 0.5)
    (values * tensors["first"]).sum().backward()
    assert states.grad is not None and weight.grad is not None
    return {"values": values.detach(), "states": states.grad, "weight": weight.grad}


@pytest.mark.distributed
def test_losses_of_capped_logits_are_those_of_whole_ones(ranks: Any, job: Any) -> None:
    cases = [(1, False), (2, True), (3, False)]
    results = ranks(*(job(__file__, "of_a_split_head", tp, {"tp": tp, "sp": sp}) for tp, sp in cases))
    tensors, n = divergences.whole(), divergences.VOCABULARY
    logits = capped(tensors["states"] @ tensors["weight"].T)
    for (_, sp), per_rank in zip(cases, results, strict=True):
        for what in ("cross-entropy", "log-probabilities", *divergences.KINDS):
            wanted, parts = expected_of(what, tensors), [result[what] for result in per_rank]
            weight = torch.tensor([row for part in parts for row in part["weight"]], dtype=torch.float64)
            states = [row for part in parts for row in part["states"]] if sp else parts[-1]["states"]
            for found, value in ((parts[0]["values"], wanted["values"]), (states, wanted["states"]),
                                 (weight[:n], wanted["weight"])):
                torch.testing.assert_close(torch.as_tensor(found, dtype=torch.float64), value, rtol=1e-10,
                                           atol=1e-12, msg=lambda m, what=what: f"{what}: {m}")
            assert not weight[n:].any(), "no gradient reaches padding"
        for result in per_rank:
            torch.testing.assert_close(torch.tensor(result["logits"], dtype=torch.float64), logits)
            assert result["best"][0] == logits.argmax(-1).tolist()
            top = (logits / TEMPERATURE).log_softmax(-1).topk(3)
            assert result["most probable"][0] == top.indices.tolist()
            torch.testing.assert_close(torch.tensor(result["most probable"][1], dtype=torch.float64),
                                       top.values)
