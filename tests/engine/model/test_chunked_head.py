"""The number of head applications, saved and skipped tensors, and the scaling of bf16 gradients."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_sov.engine.model import chunked_head
from megatron_sov.engine.model.chunked_head import Chunking, CrossEntropySums, LabelLogprobs
from megatron_sov.engine.parallel import world
from megatron_sov.model.config import ParallelConfig

TOKENS, HIDDEN, VOCABULARY, CHUNK = 24, 8, 50, 7
CHUNKING = Chunking(CHUNK, VOCABULARY)


@pytest.fixture(autouse=True)
def joined_world(one_rank: None) -> Iterator[None]:
    world.join_world(ParallelConfig())
    yield
    world.leave_world()


class ProductCounter(TorchDispatchMode):
    """Counts matrix products, and the elements of all tensors and of the largest tensor that operations
    return."""

    def __init__(self) -> None:
        super().__init__()
        self.num_products = self.num_elements = self.max_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.num_products += "mm" in str(func)
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.num_elements += sum(sizes)
        self.max_elements = max(self.max_elements, *sizes, 0)
        return out


def draw_inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Return hidden states [tokens, hidden], head weight [vocabulary, hidden], labels [tokens] and token
    weights [tokens]."""
    random = torch.Generator().manual_seed(0)
    return (torch.randn(TOKENS, HIDDEN, generator=random).to(dtype).requires_grad_(),
            torch.randn(VOCABULARY, HIDDEN, generator=random).to(dtype).requires_grad_(),
            torch.randint(VOCABULARY, (TOKENS,), generator=random), torch.rand(TOKENS, generator=random))


def sum_losses(states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor,
               *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the loss of each token, and one weighted sum for each of `weights`."""
    losses_and_sums: tuple[torch.Tensor, ...] = CrossEntropySums.apply(
        states, weight, labels, CHUNKING, torch.is_grad_enabled(), *weights)
    return losses_and_sums


def test_a_weighted_sum_needs_one_pass_and_other_losses_two() -> None:
    states, weight, labels, weights = draw_inputs()
    num_chunks = -(-TOKENS // CHUNK)
    with ProductCounter() as weighted_sum:
        sum_losses(states, weight, labels, weights)[1].backward()
    with ProductCounter() as logprobs:
        LabelLogprobs.apply(states, weight, labels, CHUNKING, 1.0).exp().sum().backward()
    with ProductCounter() as two_sums:
        sum(sum_losses(states, weight, labels, weights, weights > 0.5)[1:]).backward()
    # Logits, and the gradients of both inputs. Without a single weighted sum, the backward pass computes
    # the logits again.
    assert weighted_sum.num_products == 3 * num_chunks
    assert two_sums.num_products == logprobs.num_products == 4 * num_chunks
    assert weighted_sum.max_elements == logprobs.max_elements == max(CHUNK, HIDDEN) * VOCABULARY, (
        "the logits of all tokens never exist at once")


def test_without_gradients_only_logits_are_computed() -> None:
    states, weight, labels, weights = draw_inputs()
    with torch.no_grad(), ProductCounter() as counter:
        losses, total = sum_losses(states, weight, labels, weights)
    assert counter.num_products == -(-TOKENS // CHUNK) and not total.requires_grad
    torch.testing.assert_close(total, (losses * weights).sum())


@pytest.mark.parametrize("frozen", ["states", "weight"])
def test_a_frozen_head_weight_costs_nothing(frozen: str) -> None:
    states, weight, labels, weights = draw_inputs()
    (states if frozen == "states" else weight).requires_grad_(False)
    with ProductCounter() as counter:
        sum_losses(states, weight, labels, weights)[1].backward()
    assert counter.num_products == 2 * -(-TOKENS // CHUNK)
    assert (states.grad is None, weight.grad is None) == (frozen == "states", frozen == "weight")


def test_gradients_are_returned_once() -> None:
    """Gradients are scaled in place: a second backward pass would scale them twice."""
    total = sum_losses(*draw_inputs())[1]
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_the_divisor_of_a_mean_is_not_rounded_to_bf16() -> None:
    """1 / 255 rounded to bf16 is off by 0.4 %, and so would be every gradient of a mean."""
    states, weight, labels, weights = draw_inputs(torch.bfloat16)
    inputs = (states, weight)
    sum_gradients = torch.autograd.grad(sum_losses(states, weight, labels, weights)[1], inputs)
    mean_gradients = torch.autograd.grad(sum_losses(states, weight, labels, weights)[1] / 255, inputs)
    for sum_gradient, mean_gradient in zip(sum_gradients, mean_gradients, strict=True):
        assert mean_gradient.dtype == torch.bfloat16
        # The least-squares factor between both gradients, from which single roundings average out.
        ratio = (mean_gradient.double() * sum_gradient).sum() / sum_gradient.double().square().sum()
        assert float(255 * ratio) == pytest.approx(1, abs=2.5e-3)


@pytest.mark.parametrize("sum_by_head", [
    lambda chunked, weights: CrossEntropySums.apply(*chunked, True, weights)[1],
    lambda chunked, weights: sum(CrossEntropySums.apply(*chunked, True, 0.25 * weights, 0.75 * weights)[1:]),
    lambda chunked, weights: (-LabelLogprobs.apply(*chunked, 1.0) * weights).sum(),
], ids=["one sum", "two sums", "logprobs"])
def test_the_heads_gradient_is_summed_in_float32_under_bf16(sum_by_head: Any,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """With 256 chunks of equal sign, a bf16 sum loses later chunks: 8 bits drop terms below 1/256 of the sum.
    In float32 the sum is as close to float64 as bf16 logits allow."""
    monkeypatch.setattr(chunked_head, "PRODUCT_ROWS", 16)
    random = torch.Generator().manual_seed(0)
    num_tokens = 2048
    bf16_states = (torch.randn(num_tokens, HIDDEN, generator=random) * 0.1 + 1).bfloat16().requires_grad_()
    bf16_weight = torch.randn(VOCABULARY, HIDDEN, generator=random).bfloat16().requires_grad_()
    labels = torch.randint(3, (num_tokens,), generator=random)
    weights = torch.rand(num_tokens, generator=random)
    states, weight = (t.detach().double().requires_grad_() for t in (bf16_states, bf16_weight))
    losses = torch.nn.functional.cross_entropy(states @ weight.T, labels, reduction="none")
    (losses * weights).sum().backward()
    sum_by_head((bf16_states, bf16_weight, labels, Chunking(8, VOCABULARY)), weights).backward()
    gradient = bf16_weight.grad
    assert gradient.dtype == torch.bfloat16
    error = (gradient.double() - weight.grad).norm() / weight.grad.norm()
    assert error < 4e-3, f"{error:.1e}"
