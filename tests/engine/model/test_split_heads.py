"""Output heads split over ranks: losses, log-probabilities and best tokens against plain torch in float64.

The vocabulary is split by tensor parallelism, and the tokens of a row by context parallelism.
"""

from typing import Any

import pytest
import torch

from tests.engine.model import test_divergence as divergences
from tests.head_config import head_config

CAP, TEMPERATURE = 1.5, 0.7
LAYOUTS: list[tuple[int, dict[str, Any], int]] = [
    (1, {}, 64), (2, {"tp": 2, "sp": True}, 5), (3, {"tp": 3}, 5), (4, {"tp": 2, "sp": True, "cp": 2}, 4)]
"""Number of processes, layout and tokens per chunk."""
IS_SELECTED = torch.arange(divergences.TOKENS) % 3 == 0
FIGURES = ("cross-entropy", "log-probabilities", "log-probabilities of some", *divergences.KINDS)
"""Results of a head; "of some": of the tokens in `IS_SELECTED`, 0 at other positions."""


def draw_tensors() -> dict[str, torch.Tensor]:
    """Return states, heads of student and teacher, labels, and the weights of two terms."""
    tensors = divergences.draw_tensors()
    tensors["weight"][30] = tensors["weight"][17]  # a tie between two processes
    return tensors | {"labels": torch.randint(divergences.VOCABULARY, (divergences.TOKENS,),
                                              generator=torch.Generator().manual_seed(1))}


def cap_logits(values: torch.Tensor, cap: float | None) -> torch.Tensor:
    return cap * torch.tanh(values / cap) if cap else values


def compute_split_results(layout: dict[str, Any], chunk_tokens: int, cap: float | None) -> dict[str, Any]:
    """Inside ranks: compute each of `FIGURES`, and this rank's shards of the gradients of ``first / 7 + 3 *
    second``.

    Padding rows of the vocabulary get large logits, so that reading them would change every result.
    """
    from megatron.core import parallel_state

    from megatron_sov.engine.model.divergence import Divergence, TeacherStates, TeacherTopK
    from megatron_sov.engine.model.logprobs import Head
    from megatron_sov.engine.parallel import context, world
    from megatron_sov.model.config import ParallelConfig

    world.join_world(ParallelConfig(**layout))
    tp, sp, tensors = layout.get("tp", 1), layout.get("sp", False), draw_tensors()
    rows = -(-divergences.VOCABULARY // tp)
    first_row = parallel_state.get_tensor_model_parallel_rank() * rows

    def shard_head(weight: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        padded = torch.cat([weight, 9 * states[:rows * tp - divergences.VOCABULARY]])
        return padded[first_row:first_row + rows].clone()

    device = torch.device("cpu")
    local = context.compute_row_index(divergences.TOKENS, False, device)
    positions = context.compute_row_index(divergences.TOKENS, sp, device)
    top = compute_teacher_logprobs(tensors, cap)[local].topk(divergences.K)
    teacher_head = shard_head(tensors["teacher weight"], tensors["teacher states"])
    teachers = {"states": TeacherStates(tensors["teacher states"][local], teacher_head, cap),
                "top-k with the rest": TeacherTopK(top.indices, top.values),
                "top-k alone": TeacherTopK(top.indices, top.values, keep_remainder=False)}
    weights = {name: tensors[name] for name in ("first", "second")}
    results: dict[str, Any] = {"positions": positions.tolist(), "first row": first_row}
    for figure in FIGURES:
        states = tensors["states"][positions, None].clone().requires_grad_()
        weight = shard_head(tensors["weight"], tensors["states"]).requires_grad_()
        head = Head(weight, head_config(sp), chunk_tokens, divergences.VOCABULARY, cap)
        if figure == "cross-entropy":
            sums, values = head.cross_entropy(states, tensors["labels"], weights)
            assert not values.requires_grad
        elif figure.startswith("log-probabilities"):
            values = head.logprobs(states, tensors["labels"], TEMPERATURE,
                                   IS_SELECTED if figure.endswith("some") else None)
            sums = {name: (values * w).sum() for name, w in weights.items()}
        else:
            sums, statistics = head.divergence(states, teachers[figure], weights,
                                               Divergence(0.5, TEMPERATURE))
            values = statistics.divergence
        (sums["first"] / 7 + 3 * sums["second"]).backward()
        results[figure] = {"values": values.tolist(), "states": states.grad[:, 0].tolist(),
                           "weight": weight.grad.tolist()}
    results["logits"] = head.logits(tensors["states"]).tolist()
    results["best"] = head.top_tokens(tensors["states"]).tolist()
    results["most probable"] = [t.tolist() for t in head.find_most_probable(
        tensors["states"][positions, None], 3, TEMPERATURE)]
    return results


def compute_teacher_logprobs(tensors: dict[str, torch.Tensor], cap: float | None) -> torch.Tensor:
    logits = cap_logits(tensors["teacher states"] @ tensors["teacher weight"].T, cap)
    return (logits / TEMPERATURE).log_softmax(-1)


def compute_expected(figure: str, tensors: dict[str, torch.Tensor],
                     cap: float | None) -> dict[str, torch.Tensor]:
    """Compute one of `FIGURES` and its gradients by autograd over the logits of the whole vocabulary."""
    states, weight = (tensors[name].clone().requires_grad_() for name in ("states", "weight"))
    logits, labels = cap_logits(states @ weight.T, cap), tensors["labels"]
    log_p = (logits / TEMPERATURE).log_softmax(-1)
    if figure == "cross-entropy":
        values = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    elif figure.startswith("log-probabilities"):
        values = log_p[torch.arange(len(labels)), labels] * (IS_SELECTED if figure.endswith("some") else 1)
    else:
        values = divergences.compute_divergence(
            *divergences.select_events(figure, log_p, compute_teacher_logprobs(tensors, cap)), 0.5)
    ((values * tensors["first"]).sum() / 7 + 3 * (values * tensors["second"]).sum()).backward()
    assert states.grad is not None and weight.grad is not None
    return {"values": values.detach(), "states": states.grad, "weight": weight.grad}


@pytest.mark.tier1_cases(1)
@pytest.mark.distributed
@pytest.mark.parametrize("cap", [None, CAP])
def test_values_and_gradients_equal_those_of_whole_logits(ranks: Any, job: Any, cap: float | None) -> None:
    results = ranks(*(job(__file__, "compute_split_results", nproc,
                          {"layout": layout, "chunk_tokens": chunk_tokens, "cap": cap})
                      for nproc, layout, chunk_tokens in LAYOUTS))
    tensors, vocabulary = draw_tensors(), divergences.VOCABULARY
    logits = cap_logits(tensors["states"] @ tensors["weight"].T, cap)
    best = logits.clone()
    best[:, 30] = -torch.inf  # 30 ties with 17, and ties go to the lowest id
    assert (best.argmax(-1) == 17).any()
    for (_, layout, _), per_rank in zip(LAYOUTS, results, strict=True):
        for figure in FIGURES:
            expected = compute_expected(figure, tensors, cap)
            gradients = {"states": torch.zeros_like(tensors["states"]),
                         # padded to 3 processes of 14 rows
                         "weight": torch.zeros(vocabulary + 2, divergences.HIDDEN).double()}
            for result in per_rank:
                local = {name: torch.tensor(value, dtype=torch.float64)
                         for name, value in result[figure].items()}
                torch.testing.assert_close(local["values"], expected["values"], rtol=1e-12, atol=1e-13)
                gradients["states"][result["positions"]] = local["states"]
                gradients["weight"][result["first row"]:][:len(local["weight"])] += local["weight"]
            assert not gradients["weight"][vocabulary:].any(), "no gradient reaches padding"
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient[:vocabulary], expected[name], rtol=1e-10, atol=1e-12,
                                           msg=lambda m, figure=figure,
                                           layout=layout: f"{figure} {layout}: {m}")
        top = (logits / TEMPERATURE).log_softmax(-1).topk(3)
        for result in per_rank:
            torch.testing.assert_close(torch.tensor(result["logits"], dtype=torch.float64), logits)
            assert result["best"] == best.argmax(-1).tolist()
            torch.testing.assert_close(torch.tensor(result["most probable"][1], dtype=torch.float64),
                                       top.values)
