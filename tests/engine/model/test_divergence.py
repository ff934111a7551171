"""Divergence from a teacher against the formula of arXiv 2306.13649 over whole vocabularies in float64."""

import math
from itertools import product
from typing import Any

import pytest
import torch

from megatron_sov.engine.model.divergence import Divergence, TeacherStates, TeacherTopK
from megatron_sov.engine.model.logprobs import Head
from tests.engine.model.test_chunked_head import ProductCounter, joined_world  # noqa: F401  autouse
from tests.head_config import head_config

TOKENS, HIDDEN, TEACHER_HIDDEN, VOCABULARY, K = 12, 8, 6, 40, 5
BETAS = (0.0, 0.1, 0.5, 1.0)
KINDS = ("states", "top-k with the rest", "top-k alone")
CASES = list(product(KINDS, BETAS))


def draw_tensors(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Return hidden states and head weights of both models, and the weights of two terms."""
    random = torch.Generator().manual_seed(0)

    def draw_normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    return {"states": draw_normal(TOKENS, HIDDEN), "weight": draw_normal(VOCABULARY, HIDDEN),
            "teacher states": draw_normal(TOKENS, TEACHER_HIDDEN),
            "teacher weight": draw_normal(VOCABULARY, TEACHER_HIDDEN),
            "first": torch.rand(TOKENS, generator=random, dtype=torch.float64),
            "second": (torch.rand(TOKENS, generator=random) > 0.5).double()}


def compute_teacher_logprobs(tensors: dict[str, torch.Tensor], temperature: float) -> torch.Tensor:
    """Return the teacher's log-probabilities [tokens, vocabulary] in float64."""
    logits = tensors["teacher states"].double() @ tensors["teacher weight"].double().T
    return (logits / temperature).log_softmax(-1)


def compute_divergence(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the divergence of each token: equation 1 of arXiv 2306.13649, and its limits at beta 0 and 1."""
    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.exp() * (a - b)).sum(-1)

    if beta in (0, 1):
        return kl(log_p, log_q) if beta else kl(log_q, log_p)
    mixture = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
    return beta * kl(log_q, mixture) + (1 - beta) * kl(log_p, mixture)


def select_events(kind: str, log_p: torch.Tensor, log_q: torch.Tensor,
                  k: int = K) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both models' log-probabilities [tokens, events]: of all tokens, or of the teacher's top k.

    The last event of "top-k with the rest" is any other token; "top-k alone" normalizes over the top k.
    """
    if kind == "states":
        return log_p, log_q
    ids = log_q.topk(k).indices
    top_p, top_q = (log.gather(1, ids) for log in (log_p, log_q))
    if kind == "top-k alone":
        return top_p.log_softmax(-1), top_q.log_softmax(-1)

    def append_rest(top: torch.Tensor) -> torch.Tensor:
        return torch.cat([top, (1 - top.exp().sum(-1, keepdim=True)).log()], 1)

    return append_rest(top_p), append_rest(top_q)


def compute_expected(kind: str, beta: float, temperature: float = 1.0,
                     tensors: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Return the statistics of each position, and the gradients of ``first / 7 + 3 * second``."""
    tensors = tensors or draw_tensors()
    states, weight = (tensors[name].double().clone().requires_grad_() for name in ("states", "weight"))
    log_p = (states @ weight.T / temperature).log_softmax(-1)
    events = select_events(kind, log_p, compute_teacher_logprobs(tensors, temperature))
    values = compute_divergence(*events, beta)
    ((values * tensors["first"]).sum() / 7 + 3 * (values * tensors["second"]).sum()).backward()
    return {"divergence": values.detach(), "kl": compute_divergence(*events, 0.0).detach(),
            "entropy": -(log_p.exp() * log_p).sum(-1).detach(), "states": states.grad,
            "weight": weight.grad}


def compute_scores(kind: str, beta: float, temperature: float = 1.0, dtype: str = "float64",
                   tensors: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """Return the statistics and gradients of one process; test_split_heads.py covers split heads."""
    tensors = tensors or draw_tensors(getattr(torch, dtype))
    states = tensors["states"][:, None].clone().requires_grad_()
    weight = tensors["weight"].clone().requires_grad_()
    if kind == "states":
        teacher: Any = TeacherStates(tensors["teacher states"], tensors["teacher weight"])
    else:
        top = compute_teacher_logprobs(tensors, temperature).topk(K)
        teacher = TeacherTopK(top.indices, top.values, keep_remainder=kind == "top-k with the rest")
    head = Head(weight, head_config(), 5, VOCABULARY)
    terms = {name: tensors[name].to(weight.dtype) for name in ("first", "second")}
    sums, statistics = head.divergence(states, teacher, terms, Divergence(beta, temperature))
    (sums["first"] / 7 + 3 * sums["second"]).backward()
    return {"divergence": statistics.divergence.tolist(), "kl": statistics.kl.tolist(),
            "entropy": statistics.entropy.tolist(), "states": states.grad[:, 0].tolist(),
            "weight": weight.grad.tolist(), "sums": [sums[name].item() for name in terms]}


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_values_and_gradients_are_the_papers(kind: str, beta: float, temperature: float) -> None:
    scores, expected = compute_scores(kind, beta, temperature), compute_expected(kind, beta, temperature)
    for name, value in expected.items():
        torch.testing.assert_close(torch.tensor(scores[name], dtype=torch.float64), value, rtol=1e-12,
                                   atol=1e-13, msg=lambda m, name=name: f"{name}: {m}")
    expected_sum = float((expected["divergence"] * draw_tensors()["first"]).sum())
    assert scores["sums"][0] == pytest.approx(expected_sum, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_is_larger_than_a_chunks_logits(kind: str) -> None:
    random = torch.Generator().manual_seed(0)
    tensors = draw_tensors() | {name: torch.randn(200, size, generator=random).double()
                                for name, size in (("states", HIDDEN), ("teacher states", TEACHER_HIDDEN))}
    top = compute_teacher_logprobs(tensors, 1.0).topk(K)
    teacher = (TeacherStates(tensors["teacher states"], tensors["teacher weight"]) if kind == "states"
               else TeacherTopK(top.indices, top.values, kind == "top-k with the rest"))
    head = Head(tensors["weight"].requires_grad_(), head_config(), 50, VOCABULARY)
    with ProductCounter() as counter:
        sums, _ = head.divergence(tensors["states"][:, None].requires_grad_(), teacher,
                                  {"sum": torch.ones(200)}, Divergence(0.5))
        sums["sum"].backward()
    assert counter.max_elements == 50 * VOCABULARY


@pytest.mark.parametrize("beta", BETAS)
def test_excluded_tokens_give_finite_values(beta: float) -> None:
    """Logits hundreds apart: probabilities underflow to 0, but values and gradients stay finite."""
    tensors = draw_tensors(torch.float32)
    tensors |= {"states": 60 * tensors["states"], "teacher states": 60 * tensors["teacher states"]}
    result = compute_scores("states", beta, dtype="float32", tensors=tensors)
    expected = compute_expected("states", beta, tensors={name: t.double() for name, t in tensors.items()})
    difference = (torch.tensor(result["divergence"]).double() - expected["divergence"]).abs().max()
    assert difference <= 1e-6 * expected["divergence"].abs().max()
    # Mixtures of disjoint distributions have gradient 0, and float32 differs from 0 by rounding errors.
    torch.testing.assert_close(torch.tensor(result["weight"]).double(), expected["weight"], rtol=5e-3,
                               atol=5e-3)


def test_bf16_teacher_states_equal_rounded_float32_states() -> None:
    """The teacher's states are cast to the dtype of its head, one chunk at a time."""
    tensors = draw_tensors(torch.float32)
    bf16 = tensors | {"teacher states": tensors["teacher states"].bfloat16()}
    rounded = tensors | {"teacher states": bf16["teacher states"].float()}
    assert compute_scores("states", 0.0, tensors=bf16) == compute_scores("states", 0.0, tensors=rounded)


def test_the_heads_gradient_is_summed_in_float32_under_bf16() -> None:
    """With 256 chunks of equal sign, a bf16 sum would lose later chunks."""
    random = torch.Generator().manual_seed(0)
    num_tokens = 256 * 8  # chunks of 8 tokens
    states = (torch.randn(num_tokens, HIDDEN, generator=random) * 0.1 + 1).bfloat16()
    weight, teacher = (torch.randn(VOCABULARY, HIDDEN, generator=random).bfloat16() for _ in range(2))
    head = Head(weight.clone().requires_grad_(), head_config(), 8, VOCABULARY)
    sums, _ = head.divergence(states[:, None], TeacherStates(states, teacher),
                              {"sum": torch.ones(num_tokens)}, Divergence())
    sums["sum"].backward()
    exact = weight.double().requires_grad_()
    log_p, log_q = ((states.double() @ w.T).log_softmax(-1) for w in (exact, teacher.double()))
    compute_divergence(log_p, log_q, 0.0).sum().backward()
    assert head.weight.grad is not None and exact.grad is not None
    error = (head.weight.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 4e-3, f"{error:.1e}"
