"""Cross-entropy, log-probabilities, divergences, best tokens and logits of split heads and rows, with and
without a softcap, against plain torch over whole logits in float64."""

from typing import Any

import pytest
import torch

from tests.engine.model import test_divergence as divergences
from tests.head_config import head_config

CAP, TEMPERATURE = 1.5, 0.7
LAYOUTS: list[tuple[int, dict[str, Any], int]] = [
    (1, {}, 64), (2, {"tp": 2, "sp": True}, 5), (3, {"tp": 3}, 5), (4, {"tp": 2, "sp": True, "cp": 2}, 4)]
"""Number of processes, layout and tokens per chunk."""
IS_ASKED = torch.arange(divergences.TOKENS) % 3 == 0
FIGURES = ("cross-entropy", "log-probabilities", "log-probabilities of some", *divergences.KINDS)


def whole() -> dict[str, torch.Tensor]:
    """Return states, heads of student and teacher, labels, and the weights of two terms."""
    tensors = divergences.whole()
    tensors["weight"][30] = tensors["weight"][17]  # a tie between two processes
    return tensors | {"labels": torch.randint(divergences.VOCABULARY, (divergences.TOKENS,),
                                              generator=torch.Generator().manual_seed(1))}


def cap_logits(values: torch.Tensor, cap: float | None) -> torch.Tensor:
    return cap * torch.tanh(values / cap) if cap else values


def of_a_split_head(layout: dict[str, Any], chunk_tokens: int, cap: float | None) -> dict[str, Any]:
    """Return values and this process's parts of the gradients of ``first / 7 + 3 * second``, with their
    offsets. Padding rows of the vocabulary would win over every token."""
    from megatron.core import parallel_state

    from megatron_sov.engine.model.divergence import Divergence, TeacherStates, TeacherTopK
    from megatron_sov.engine.model.logprobs import Head
    from megatron_sov.engine.parallel import context, world
    from megatron_sov.model.config import ParallelConfig

    world.join_world(ParallelConfig(**layout))
    tp, sp, tensors = layout.get("tp", 1), layout.get("sp", False), whole()
    rows = -(-divergences.VOCABULARY // tp)
    first_row = parallel_state.get_tensor_model_parallel_rank() * rows

    def own(weight: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        padded = torch.cat([weight, 9 * states[:rows * tp - divergences.VOCABULARY]])
        return padded[first_row:first_row + rows].clone()

    device = torch.device("cpu")
    local = context.compute_row_index(divergences.TOKENS, False, device)
    places = context.compute_row_index(divergences.TOKENS, sp, device)
    top = teacher_logprobs(tensors, cap)[local].topk(divergences.K)
    teachers = {"states": TeacherStates(tensors["teacher states"][local], own(
                    tensors["teacher weight"], tensors["teacher states"]), cap),
                "top-k with the rest": TeacherTopK(top.indices, top.values),
                "top-k alone": TeacherTopK(top.indices, top.values, keep_remainder=False)}
    weights = {name: tensors[name] for name in ("first", "second")}
    found: dict[str, Any] = {"places": places.tolist(), "first row": first_row}
    for what in FIGURES:
        states = tensors["states"][places, None].clone().requires_grad_()
        weight = own(tensors["weight"], tensors["states"]).requires_grad_()
        head = Head(weight, head_config(sp), chunk_tokens, divergences.VOCABULARY, cap)
        if what == "cross-entropy":
            sums, values = head.cross_entropy(states, tensors["labels"], weights)
            assert not values.requires_grad
        elif what.startswith("log-probabilities"):
            values = head.logprobs(states, tensors["labels"], TEMPERATURE,
                                   IS_ASKED if what.endswith("some") else None)
            sums = {name: (values * w).sum() for name, w in weights.items()}
        else:
            sums, of_row = head.divergence(states, teachers[what], weights, Divergence(0.5, TEMPERATURE))
            values = of_row.divergence
        (sums["first"] / 7 + 3 * sums["second"]).backward()
        found[what] = {"values": values.tolist(), "states": states.grad[:, 0].tolist(),
                       "weight": weight.grad.tolist()}
    found["logits"] = head.logits(tensors["states"]).tolist()
    found["best"] = head.top_tokens(tensors["states"]).tolist()
    found["most probable"] = [t.tolist() for t in head.find_most_probable(
        tensors["states"][places, None], 3, TEMPERATURE)]
    return found


def teacher_logprobs(tensors: dict[str, torch.Tensor], cap: float | None) -> torch.Tensor:
    logits = cap_logits(tensors["teacher states"] @ tensors["teacher weight"].T, cap)
    return (logits / TEMPERATURE).log_softmax(-1)


def expected_of(what: str, tensors: dict[str, torch.Tensor], cap: float | None) -> dict[str, torch.Tensor]:
    """Return the same by autograd over whole logits."""
    states, weight = (tensors[name].clone().requires_grad_() for name in ("states", "weight"))
    logits, labels = cap_logits(states @ weight.T, cap), tensors["labels"]
    log_p = (logits / TEMPERATURE).log_softmax(-1)
    if what == "cross-entropy":
        values = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    elif what.startswith("log-probabilities"):
        values = log_p[torch.arange(len(labels)), labels] * (IS_ASKED if what.endswith("some") else 1)
    else:
        values = divergences.reference(
            *divergences.over_events(what, log_p, teacher_logprobs(tensors, cap)), 0.5)
    ((values * tensors["first"]).sum() / 7 + 3 * (values * tensors["second"]).sum()).backward()
    assert states.grad is not None and weight.grad is not None
    return {"values": values.detach(), "states": states.grad, "weight": weight.grad}


@pytest.mark.tier1_cases(1)
@pytest.mark.distributed
@pytest.mark.parametrize("cap", [None, CAP])
def test_values_and_gradients_equal_those_of_whole_logits(ranks: Any, job: Any, cap: float | None) -> None:
    results = ranks(*(job(__file__, "of_a_split_head", n, {"layout": layout, "chunk_tokens": tokens,
                                                           "cap": cap}) for n, layout, tokens in LAYOUTS))
    tensors, n = whole(), divergences.VOCABULARY
    logits = cap_logits(tensors["states"] @ tensors["weight"].T, cap)
    best = logits.clone()
    best[:, 30] = -torch.inf  # ties go to the lowest id
    assert (best.argmax(-1) == 17).any()
    for (_, layout, _), per_rank in zip(LAYOUTS, results, strict=True):
        for what in FIGURES:
            expected = expected_of(what, tensors, cap)
            gradients = {"states": torch.zeros_like(tensors["states"]),
                         "weight": torch.zeros(n + 2, divergences.HIDDEN).double()}
            for result in per_rank:
                found = {name: torch.tensor(value, dtype=torch.float64)
                         for name, value in result[what].items()}
                torch.testing.assert_close(found["values"], expected["values"], rtol=1e-12, atol=1e-13)
                gradients["states"][result["places"]] = found["states"]
                gradients["weight"][result["first row"]:][:len(found["weight"])] += found["weight"]
            assert not gradients["weight"][n:].any(), "no gradient reaches padding"
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient[:n], expected[name], rtol=1e-10, atol=1e-12,
                                           msg=lambda m, what=what, layout=layout: f"{what} {layout}: {m}")
        top = (logits / TEMPERATURE).log_softmax(-1).topk(3)
        for result in per_rank:
            torch.testing.assert_close(torch.tensor(result["logits"], dtype=torch.float64), logits)
            assert result["best"] == best.argmax(-1).tolist()
            torch.testing.assert_close(torch.tensor(result["most probable"][1], dtype=torch.float64),
                                       top.values)
