"""The gated delta rule against transformers' function, and documents of a row against single documents."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_sov.engine.model.delta_rule import (
    CHUNK_TOKENS, apply_delta_rule, apply_delta_rule_by_token, apply_short_convolution, chunk_documents,
    convolve_windows, normalize_l2)

CPU = torch.device("cpu")
LENGTHS = [5, 130, 1, 64, 65, 200, 64]
HEADS, R, KEYS, VALUES = 2, 3, 8, 6


def draw_inputs(tokens: int, dtype: torch.dtype = torch.float64, *, r: int = R,
                fastest: float = 0.3) -> list[torch.Tensor]:
    """Return random queries, keys, values, decays and rates of a row, with gradients enabled."""
    torch.manual_seed(0)
    q, k = (torch.randn(tokens, HEADS, KEYS) for _ in range(2))
    v = torch.randn(tokens, HEADS, r, VALUES)
    g, b = -torch.rand(tokens, HEADS, r, KEYS) * fastest, torch.rand(tokens, HEADS, r)
    return [t.to(dtype).requires_grad_() for t in (normalize_l2(q) * KEYS ** -0.5, normalize_l2(k), v, g, b)]


def bounds(lengths: list[int]) -> list[tuple[int, int, int]]:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [(start, start, stop) for start, stop in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("fastest", [0.3, 40.0])
def test_a_document_equals_transformers(fastest: float) -> None:
    """Decays as in Kimi Delta Attention; fast ones reach e^-2,000 in a chunk."""
    from transformers.models.kimi_linear import modeling_kimi_linear as theirs

    row, again = (draw_inputs(150, torch.float32, r=1, fastest=fastest) for _ in range(2))
    found, state = apply_delta_rule(*row, chunks=chunk_documents([(0, 0, 150)], CPU))
    (found * torch.linspace(-1, 1, VALUES)).sum().backward()
    q, k, v, g, b = (t[None] for t in again)
    expected, last = theirs.chunk_kimi_delta_attention(
        q * KEYS ** 0.5, k, v[:, :, :, 0], g[:, :, :, 0], b[..., 0], initial_state=None,
        output_final_state=True)
    (expected * torch.linspace(-1, 1, VALUES)).sum().backward()
    torch.testing.assert_close(found[:, :, 0], expected[0], atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(state[:, :, 0], last, atol=2e-6, rtol=2e-5)
    for one, other in zip(row, again, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=2e-5, rtol=2e-5)


def test_backward_cost_per_token_is_constant_in_length() -> None:
    class Counting(TorchDispatchMode):
        """Counts the elements that operators return."""

        numbers = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            self.numbers += sum(t.numel() for t in tree_leaves(found) if isinstance(t, torch.Tensor))
            return found

    def backward(num_chunks: int) -> int:
        row = draw_inputs(num_chunks * CHUNK_TOKENS, torch.float32)
        found, _ = apply_delta_rule(*row, chunks=chunk_documents([(0, 0, len(row[0]))], CPU))
        with Counting() as counting:
            found.sum().backward()
        return counting.numbers

    assert backward(32) < 4.5 * backward(8), "four times as many tokens"


def test_packed_documents_equal_single_documents() -> None:
    row = draw_inputs(sum(LENGTHS))
    chunks = chunk_documents(bounds(LENGTHS), CPU)
    found, states = apply_delta_rule(*row, chunks=chunks)
    weights = torch.randn_like(found)
    together = torch.autograd.grad((found * weights).sum(), row)
    for number, (start, _, stop) in enumerate(bounds(LENGTHS)):
        alone = [t.detach()[start:stop].requires_grad_() for t in row]
        own, state = apply_delta_rule(*alone, chunks=chunk_documents([(0, 0, stop - start)], CPU))
        # not to the bit: MKL's products depend on memory alignment
        torch.testing.assert_close(own, found[start:stop], atol=1e-14, rtol=1e-13)
        torch.testing.assert_close(state[0], states[chunks.order.index(number)], atol=1e-14, rtol=1e-13)
        for gradient, whole in zip(torch.autograd.grad((own * weights[start:stop]).sum(), alone), together,
                                   strict=True):
            torch.testing.assert_close(gradient, whole[start:stop], atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("fastest", [0.3, 40.0])
def test_single_tokens_and_carried_states_equal_chunks(fastest: float) -> None:
    row = [t.detach() for t in draw_inputs(2 * CHUNK_TOKENS + 9, fastest=fastest)]
    found, last = apply_delta_rule(*row, chunks=chunk_documents([(0, 0, len(row[0]))], CPU))
    zeros = torch.zeros(1, HEADS, R, KEYS, VALUES, dtype=torch.float64)
    singly, state = apply_delta_rule_by_token(*(t[None] for t in row), zeros)
    torch.testing.assert_close(singly[0], found, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(state, last, atol=1e-13, rtol=1e-12)
    cut = 37  # not a chunk boundary
    _, middle = apply_delta_rule(*(t[:cut] for t in row), chunks=chunk_documents([(0, 0, cut)], CPU))
    rest = chunk_documents([(0, 0, len(row[0]) - cut)], CPU)
    behind, end = apply_delta_rule(*(t[cut:] for t in row), chunks=rest, state=middle)
    torch.testing.assert_close(behind, found[cut:], atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(end, last, atol=1e-13, rtol=1e-12)


def test_the_convolution_stays_inside_documents() -> None:
    torch.manual_seed(0)
    row, weight = torch.randn(sum(LENGTHS), 10, dtype=torch.float64), torch.randn(10, 4, dtype=torch.float64)
    result = apply_short_convolution(row, weight, chunk_documents(bounds(LENGTHS), CPU).positions)
    for start, _, stop in bounds(LENGTHS):
        alone = row[start:stop]
        expected = torch.conv1d(alone.T[None], weight[:, None], padding=3, groups=10)[0, :, :len(alone)].T
        torch.testing.assert_close(result[start:stop], expected, atol=1e-13, rtol=1e-12)
        windows = convolve_windows(torch.cat([alone.new_zeros(3, 10), alone])[None], weight)[0]
        torch.testing.assert_close(windows, expected, atol=1e-13, rtol=1e-12)
