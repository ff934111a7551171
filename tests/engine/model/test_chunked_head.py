"""The number of head applications, saved and skipped tensors, and the scaling of bf16 gradients."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sov.engine.model import chunked_head
from megatron_sov.engine.model.chunked_head import Chunking, CrossEntropySums, LabelLogprobs
from megatron_sov.engine.parallel import world
from megatron_sov.model.config import ParallelConfig

TOKENS, HIDDEN, VOCABULARY, CHUNK = 24, 8, 50, 7
CHUNKING = Chunking(CHUNK, VOCABULARY)


@pytest.fixture(autouse=True)
def alone(one_rank: None) -> Iterator[None]:
    world.join_world(ParallelConfig())
    yield
    world.leave_world()


class Products(TorchDispatchMode):
    """Counts matrix products and records the largest tensor that an operation creates."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.most_numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += "mm" in str(func)
        if torch.is_tensor(out):
            self.most_numbers = max(self.most_numbers, out.numel())
        return out


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(dtype: torch.dtype = torch.float32) -> Inputs:
    """Return hidden states, head weight, labels and token weights."""
    random = torch.Generator().manual_seed(0)
    return (torch.randn(TOKENS, HIDDEN, generator=random).to(dtype).requires_grad_(),
            torch.randn(VOCABULARY, HIDDEN, generator=random).to(dtype).requires_grad_(),
            torch.randint(VOCABULARY, (TOKENS,), generator=random), torch.rand(TOKENS, generator=random))


def fused(states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor,
          *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    found: tuple[torch.Tensor, ...] = CrossEntropySums.apply(states, weight, labels, CHUNKING,
                                                             torch.is_grad_enabled(), *weights)
    return found


def test_a_weighted_sum_needs_one_pass_and_other_losses_two() -> None:
    states, weight, labels, weights = inputs()
    chunks = -(-TOKENS // CHUNK)
    with Products() as once:
        fused(states, weight, labels, weights)[1].backward()
    with Products() as twice:
        LabelLogprobs.apply(states, weight, labels, CHUNKING, 1.0).exp().sum().backward()
    with Products() as two_terms:
        sum(fused(states, weight, labels, weights, weights > 0.5)[1:]).backward()
    assert (once.count, two_terms.count, twice.count) == (3 * chunks, 4 * chunks, 4 * chunks)
    assert once.most_numbers == twice.most_numbers == max(CHUNK, HIDDEN) * VOCABULARY, "never all logits"


def test_without_gradients_only_logits_are_computed() -> None:
    states, weight, labels, weights = inputs()
    with torch.no_grad(), Products() as seen:
        losses, total = fused(states, weight, labels, weights)
    assert seen.count == -(-TOKENS // CHUNK) and not total.requires_grad
    torch.testing.assert_close(total, (losses * weights).sum())


@pytest.mark.parametrize("frozen", ["states", "weight"])
def test_a_frozen_head_weight_costs_nothing(frozen: str) -> None:
    states, weight, labels, weights = inputs()
    (states if frozen == "states" else weight).requires_grad_(False)
    with Products() as seen:
        fused(states, weight, labels, weights)[1].backward()
    assert seen.count == 2 * -(-TOKENS // CHUNK)
    assert (states.grad is None, weight.grad is None) == (frozen == "states", frozen == "weight")


def test_gradients_are_returned_once() -> None:
    """Gradients are scaled in place: a second backward pass would scale them twice."""
    total = fused(*inputs())[1]
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_the_divisor_of_a_mean_is_not_rounded_to_bf16() -> None:
    """1 / 255 rounded to bf16 is off by 0.4 %, and so would be every gradient of a mean."""
    states, weight, labels, weights = inputs(torch.bfloat16)
    of_sum = torch.autograd.grad(fused(states, weight, labels, weights)[1], (states, weight))
    of_mean = torch.autograd.grad(fused(states, weight, labels, weights)[1] / 255, (states, weight))
    for whole, part in zip(of_sum, of_mean, strict=True):
        assert part.dtype == torch.bfloat16
        assert float((255 * part.double() * whole).sum() / whole.double().square().sum()) == pytest.approx(
            1, abs=2.5e-3)


def compute_gradient_by_one_sum(inputs: Inputs, chunking: Chunking) -> torch.Tensor:
    states, weight, labels, weights = inputs
    CrossEntropySums.apply(states, weight, labels, chunking, True, weights)[1].backward()
    return weight.grad


def compute_gradient_by_two_sums(inputs: Inputs, chunking: Chunking) -> torch.Tensor:
    states, weight, labels, weights = inputs
    sum(CrossEntropySums.apply(states, weight, labels, chunking, True, 0.25 * weights,
                               0.75 * weights)[1:]).backward()
    return weight.grad


def compute_gradient_by_logprobs(inputs: Inputs, chunking: Chunking) -> torch.Tensor:
    states, weight, labels, weights = inputs
    (-LabelLogprobs.apply(states, weight, labels, chunking, 1.0) * weights).sum().backward()
    return weight.grad


@pytest.mark.parametrize("way", [compute_gradient_by_one_sum, compute_gradient_by_two_sums,
                                 compute_gradient_by_logprobs])
def test_the_heads_gradient_is_summed_in_float32_under_bf16(way: Any,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """With 256 chunks of equal sign, a bf16 sum loses later chunks: 8 bits drop terms below 1/256 of the sum.
    In float32 the sum is as close to float64 as bf16 logits allow."""
    monkeypatch.setattr(chunked_head, "PRODUCT_ROWS", 16)
    random = torch.Generator().manual_seed(0)
    n = 2048
    bf16 = ((torch.randn(n, HIDDEN, generator=random) * 0.1 + 1).bfloat16().requires_grad_(),
            torch.randn(VOCABULARY, HIDDEN, generator=random).bfloat16().requires_grad_(),
            torch.randint(3, (n,), generator=random), torch.rand(n, generator=random))
    states, weight = (t.detach().double().requires_grad_() for t in bf16[:2])
    losses = torch.nn.functional.cross_entropy(states @ weight.T, bf16[2], reduction="none")
    (losses * bf16[3]).sum().backward()
    result = way(bf16, Chunking(8, VOCABULARY))
    assert result.dtype == torch.bfloat16
    error = (result.double() - weight.grad).norm() / weight.grad.norm()
    assert error < 4e-3, f"{error:.1e}"
