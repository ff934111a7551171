"""The gated delta rule against transformers' function, and documents of a row against single documents."""

import pytest
import torch

from megatron_sov.engine.model.delta_rule import (
    CHUNK_TOKENS, apply_delta_rule, apply_delta_rule_by_token, apply_short_convolution, chunk_documents,
    convolve_windows, normalize_l2)
from tests.engine.model.test_chunked_head import ProductCounter

CPU = torch.device("cpu")
LENGTHS = [5, 130, 1, 64, 65, 200, 64]
HEADS, R, KEYS, VALUES = 2, 3, 8, 6


def draw_inputs(tokens: int, dtype: torch.dtype = torch.float64, *, r: int = R,
                max_decay: float = 0.3) -> list[torch.Tensor]:
    """Return random inputs of a row, with gradients enabled.

    Queries and keys [tokens, heads, keys], values [tokens, heads, r, values], log decays [tokens, heads, r,
    keys] and learning rates [tokens, heads, r].
    """
    torch.manual_seed(0)
    q, k = (torch.randn(tokens, HEADS, KEYS) for _ in range(2))
    v = torch.randn(tokens, HEADS, r, VALUES)
    g, b = -torch.rand(tokens, HEADS, r, KEYS) * max_decay, torch.rand(tokens, HEADS, r)
    return [t.to(dtype).requires_grad_() for t in (normalize_l2(q) * KEYS ** -0.5, normalize_l2(k), v, g, b)]


def compute_bounds(lengths: list[int]) -> list[tuple[int, int, int]]:
    """Return (start, start, stop) of each document in a row."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [(start, start, stop) for start, stop in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("max_decay", [0.3, 40.0])
def test_a_document_equals_transformers(max_decay: float) -> None:
    """Decays as in Kimi Delta Attention, and fast decays, which reach e^-2,000 in a chunk."""
    from transformers.models.kimi_linear import modeling_kimi_linear as kimi_linear

    row, reference_row = (draw_inputs(150, torch.float32, r=1, max_decay=max_decay) for _ in range(2))
    output, state = apply_delta_rule(*row, chunks=chunk_documents([(0, 0, 150)], CPU))
    (output * torch.linspace(-1, 1, VALUES)).sum().backward()
    q, k, v, g, b = (t[None] for t in reference_row)
    expected, expected_state = kimi_linear.chunk_kimi_delta_attention(
        q * KEYS ** 0.5, k, v[:, :, :, 0], g[:, :, :, 0], b[..., 0], initial_state=None,
        output_final_state=True)
    (expected * torch.linspace(-1, 1, VALUES)).sum().backward()
    torch.testing.assert_close(output[:, :, 0], expected[0], atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(state[:, :, 0], expected_state, atol=2e-6, rtol=2e-5)
    for ours, reference in zip(row, reference_row, strict=True):
        torch.testing.assert_close(ours.grad, reference.grad, atol=2e-5, rtol=2e-5)


def test_backward_cost_per_token_is_constant_in_length() -> None:
    def count_backward_elements(num_chunks: int) -> int:
        row = draw_inputs(num_chunks * CHUNK_TOKENS, torch.float32)
        result, _ = apply_delta_rule(*row, chunks=chunk_documents([(0, 0, len(row[0]))], CPU))
        with ProductCounter() as counter:
            result.sum().backward()
        return counter.num_elements

    assert count_backward_elements(32) < 4.5 * count_backward_elements(8), "four times as many tokens"


def test_packed_documents_equal_single_documents() -> None:
    row = draw_inputs(sum(LENGTHS))
    chunks = chunk_documents(compute_bounds(LENGTHS), CPU)
    output, states = apply_delta_rule(*row, chunks=chunks)
    weights = torch.randn_like(output)
    gradients = torch.autograd.grad((output * weights).sum(), row)
    for number, (start, _, stop) in enumerate(compute_bounds(LENGTHS)):
        document = [t.detach()[start:stop].requires_grad_() for t in row]
        document_output, state = apply_delta_rule(*document,
                                                  chunks=chunk_documents([(0, 0, stop - start)], CPU))
        # Not bit for bit: matrix products of MKL depend on the alignment of their operands in memory.
        torch.testing.assert_close(document_output, output[start:stop], atol=1e-14, rtol=1e-13)
        torch.testing.assert_close(state[0], states[chunks.order.index(number)], atol=1e-14, rtol=1e-13)
        document_gradients = torch.autograd.grad((document_output * weights[start:stop]).sum(), document)
        for document_gradient, gradient in zip(document_gradients, gradients, strict=True):
            torch.testing.assert_close(document_gradient, gradient[start:stop], atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("max_decay", [0.3, 40.0])
def test_single_tokens_and_carried_states_equal_chunks(max_decay: float) -> None:
    row = [t.detach() for t in draw_inputs(2 * CHUNK_TOKENS + 9, max_decay=max_decay)]
    output, final_state = apply_delta_rule(*row, chunks=chunk_documents([(0, 0, len(row[0]))], CPU))
    zeros = torch.zeros(1, HEADS, R, KEYS, VALUES, dtype=torch.float64)
    output_by_token, state_by_token = apply_delta_rule_by_token(*(t[None] for t in row), zeros)
    torch.testing.assert_close(output_by_token[0], output, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(state_by_token, final_state, atol=1e-13, rtol=1e-12)
    split = 37  # not a chunk boundary
    _, first_state = apply_delta_rule(*(t[:split] for t in row), chunks=chunk_documents([(0, 0, split)], CPU))
    second_chunks = chunk_documents([(0, 0, len(row[0]) - split)], CPU)
    second_output, second_state = apply_delta_rule(*(t[split:] for t in row), chunks=second_chunks,
                                                   state=first_state)
    torch.testing.assert_close(second_output, output[split:], atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(second_state, final_state, atol=1e-13, rtol=1e-12)


def test_the_convolution_stays_inside_documents() -> None:
    torch.manual_seed(0)
    row, weight = torch.randn(sum(LENGTHS), 10, dtype=torch.float64), torch.randn(10, 4, dtype=torch.float64)
    result = apply_short_convolution(row, weight, chunk_documents(compute_bounds(LENGTHS), CPU).positions)
    for start, _, stop in compute_bounds(LENGTHS):
        document = row[start:stop]
        convolved = torch.conv1d(document.T[None], weight[:, None], padding=3, groups=10)
        expected = convolved[0, :, :len(document)].T
        torch.testing.assert_close(result[start:stop], expected, atol=1e-13, rtol=1e-12)
        windows = convolve_windows(torch.cat([document.new_zeros(3, 10), document])[None], weight)[0]
        torch.testing.assert_close(windows, expected, atol=1e-13, rtol=1e-12)
