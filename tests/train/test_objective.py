"""Sums, denominators and the total loss."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

prepare_megatron()
from megatron_sov.errors import UserError  # noqa: E402
from megatron_sov.train.objective import (  # noqa: E402
    GlobalBatch,
    LossSums,
    parts_of,
    per_source,
    refuse_nothing_learned,
    total_loss,
)


def test_each_term_is_divided_by_its_own_denominator() -> None:
    a, b = torch.tensor(6.0, requires_grad=True), torch.tensor(10.0, requires_grad=True)
    loss = total_loss(LossSums({"a": a, "b": b}, torch.zeros(1, 2)), {"a": 1.0, "b": 0.5},
                      {"a": 3.0, "b": 20.0})
    loss.backward()
    assert loss.item() == pytest.approx(6 / 3 + 0.5 * 10 / 20)
    assert (a.grad, b.grad) == (torch.tensor(1 / 3), torch.tensor(0.5 / 20))


def test_a_term_without_targets_adds_nothing_and_stays_in_the_graph() -> None:
    a = torch.tensor(5.0, requires_grad=True)
    loss = total_loss(LossSums({"a": a}, torch.zeros(1, 2)), {"a": 1.0}, {"a": 0.0})
    loss.backward()
    assert loss.item() == 0.0 and a.grad == 0.0


def test_losses_by_source_are_weighted_sums_and_weights() -> None:
    losses, weights = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 0.5, 0.0, 2.0])
    found = per_source(losses, weights, torch.tensor([0, 2, 2, 0]), 3)
    assert found.tolist() == [[9.0, 3.0], [0.0, 0.0], [1.0, 0.5]] and found.dtype == torch.float64


def test_what_an_objective_remembers_is_json() -> None:
    objective = SimpleNamespace(state=lambda: {"seen": {1}}, restore=lambda state: None)
    with pytest.raises(UserError, match=r"objective SimpleNamespace: state\(\) returned what JSON does not "
                                        r"hold \(Object of type set is not JSON serializable\)"):
        parts_of(objective)["objective"].state()
    assert parts_of(SimpleNamespace()) == {}


@pytest.mark.parametrize(("state", "said"), [
    ({"seen": {3: 1}}, r"state\(\)\['seen'\] has the key 3, which comes back as a string"),
    ({"seen": [0, (1, 2)]}, r"state\(\)\['seen'\]\[1\] is a tuple, which comes back as a list")])
def test_what_would_come_back_as_something_else_is_refused(state: object, said: str) -> None:
    objective = SimpleNamespace(state=lambda: state, restore=lambda state: None)
    with pytest.raises(UserError, match=f"what JSON changes \\({said}\\); return dicts with strings as keys"):
        parts_of(objective)["objective"].state()


def test_a_step_that_learns_nothing_is_refused() -> None:
    batch = GlobalBatch((), 64, 2, "main", 128, {"response": 0.0, "mtp": 0.0})
    with pytest.raises(UserError, match=r"step 3: none of its 128 tokens is learned .*response: 0, mtp: 0"):
        refuse_nothing_learned(batch, 3)
    refuse_nothing_learned(GlobalBatch((), 64, 2, "main", 128, {"response": 0.0, "text": 1.0}), 3)
