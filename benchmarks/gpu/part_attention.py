"""Attention over packed rows: Transformer Engine and the fused kernel of torch against a dense reference.

Cases: documents of a row x sliding window x query heads per key head, each with the output and the gradients
of queries, keys and values. Linear attention: the kernels of flash-linear-attention, if installed, against
plain torch, with the output and the gradients of all five inputs.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from setting import Figures, Setting, compute_relative_error, fail_on, find_largest

from megatron_sov.engine.parallel.gpu_libraries import find_fla_problem

LIMIT = 2e-2
"""Largest relative error in bf16: rounding one operand gives 2e-3 to 4e-3, and three products follow."""
DOCUMENTS = {"one": (1.0,), "many": (0.1, 0.05, 0.4, 0.001, 0.449)}
"""Kind -> share of the row's tokens that each document has."""
WINDOWS = (0, 128)
"""Sliding windows in tokens; 0: none."""
HEADS = ((8, 8), (8, 2), (64, 8))
"""(query heads, key heads)."""


def compute_bounds(shares: tuple[float, ...], num_tokens: int) -> list[int]:
    """Return the document boundaries of a packed row in tokens: [0, ..., num_tokens]."""
    ends = [max(1, round(sum(shares[:n + 1]) * num_tokens)) for n in range(len(shares) - 1)]
    return [0, *ends, num_tokens]


def attend_densely(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int],
                   window: int) -> torch.Tensor:
    """Return dense causal attention within documents, in the dtype of the inputs: [tokens, heads,
    head_dim]."""
    num_tokens, group_size = len(q), q.shape[1] // k.shape[1]
    position = torch.arange(num_tokens, device=q.device)
    document = torch.bucketize(position, torch.tensor(bounds[1:-1], device=q.device), right=True)
    mask = (document[:, None] == document) & (position[:, None] >= position)
    if window:
        mask &= position[:, None] - position < window
    keys, values = (t.repeat_interleave(group_size, dim=1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, keys) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def attend_by_transformer_engine(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int],
                                 window: int) -> torch.Tensor:
    """Return the output of Transformer Engine's attention for a packed row: [tokens, heads, head_dim]."""
    import transformer_engine.pytorch as te

    attention = te.DotProductAttention(
        q.shape[1], q.shape[2], num_gqa_groups=k.shape[1], attention_dropout=0.0, qkv_format="thd",
        attn_mask_type="padding_causal", window_size=(window - 1, 0) if window else None)
    cumulative = torch.tensor(bounds, dtype=torch.int32, device=q.device)
    longest = max(b - a for a, b in itertools.pairwise(bounds))
    out: torch.Tensor = attention(q, k, v, cu_seqlens_q=cumulative, cu_seqlens_kv=cumulative,
                                  max_seqlen_q=longest, max_seqlen_kv=longest)
    return out.reshape(q.shape)


def attend_by_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int],
                    window: int) -> torch.Tensor:
    """Return the output of `engine.model.attention`, which calls torch's variable-length kernel."""
    from megatron_sov.engine.model import attention

    spans = [(a, a, b) for a, b in itertools.pairwise(bounds)]
    [piece] = attention.compute_piece_bounds([spans], window, q.device)
    first = attention.find_first_keys(spans, window)
    keys, values = (torch.cat([t[start:end] for start, (_, _, end) in zip(first, spans, strict=True)])
                    for t in (k, v))
    return attention.attend_documents(q, keys, values, piece, q.shape[-1] ** -0.5, window)


def compare_linear_attention(setting: Setting, bounds: list[int]) -> list[float]:
    """Return the relative errors of flash-linear-attention's output and of the five input gradients."""
    from megatron_sov.engine.model.delta_rule import (
        apply_delta_rule, apply_fused_delta_rule, chunk_documents, normalize_l2)

    torch.manual_seed(0)
    tokens, heads, width = bounds[-1], 4, 128
    q, k = (normalize_l2(torch.randn(tokens, heads, width)) for _ in range(2))
    decays, rates = torch.rand(tokens, heads, 1, width), torch.rand(tokens, heads, 1)
    values = torch.randn(tokens, heads, 1, width)
    inputs = [t.to(setting.device) for t in (q * width ** -0.5, k, values, -0.3 * decays, rates)]
    chunks = chunk_documents([(a, a, b) for a, b in itertools.pairwise(bounds)], torch.device(setting.device))
    fused_inputs, exact_inputs = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
    fused = apply_fused_delta_rule(*fused_inputs, chunks=chunks, dtype=torch.bfloat16)
    exact, *_ = apply_delta_rule(*exact_inputs, chunks=chunks)
    return compare_gradients(fused, exact, fused_inputs, exact_inputs)


def compare_gradients(output: torch.Tensor, exact: torch.Tensor, inputs: list[torch.Tensor],
                      exact_inputs: list[torch.Tensor]) -> list[float]:
    """Return the relative errors of an output, and of the gradients of its inputs."""
    seed = torch.randn_like(exact)
    output.backward(seed.to(output.dtype))
    exact.backward(seed)
    return [compute_relative_error(output, exact), *(
        compute_relative_error(tensor.grad, exact_tensor.grad)
        for tensor, exact_tensor in zip(inputs, exact_inputs, strict=True))]


WAYS = {"Transformer Engine": attend_by_transformer_engine, "torch varlen": attend_by_torch}
"""Name -> attention implementation."""


def compare(way: Any, setting: Setting, heads: tuple[int, int], bounds: list[int],
            window: int) -> list[float]:
    """Return the relative errors of output and gradients of q, k and v, against `attend_densely`."""
    torch.manual_seed(0)
    dtype = torch.float32 if setting.dry else torch.bfloat16
    shapes = [(bounds[-1], n, 32 if setting.dry else 128) for n in (heads[0], heads[1], heads[1])]
    qkv = [torch.randn(shape, device=setting.device, dtype=dtype).requires_grad_() for shape in shapes]
    exact_qkv = [tensor.detach().to(torch.float32, copy=True).requires_grad_() for tensor in qkv]
    q, k, v = exact_qkv
    return compare_gradients(way(*qkv, bounds, window), attend_densely(q, k, v, bounds, window), qkv,
                             exact_qkv)


def iter_cases(setting: Setting) -> Iterator[tuple[str, Callable[[], list[float]]]]:
    """Yield the name of each case, and the function that returns its errors."""
    num_tokens = 256 if setting.dry else 4096
    ways = WAYS if not setting.dry else ("Transformer Engine",)
    bounds = {kind: compute_bounds(shares, num_tokens) for kind, shares in DOCUMENTS.items()}
    for way, heads, kind, window in itertools.product(
            ways, HEADS[:2] if setting.dry else HEADS, DOCUMENTS, WINDOWS):
        yield (f"{way}, {heads[0]}/{heads[1]} heads, documents: {kind}, window {window}",
               partial(compare, WAYS[way], setting, heads, bounds[kind], window))
    if not setting.dry and not find_fla_problem():
        for kind in DOCUMENTS:
            yield (f"linear attention, documents: {kind}",
                   partial(compare_linear_attention, setting, bounds[kind]))


def measure(setting: Setting) -> Figures:
    """Yield the errors of every case.

    Raises:
        Failed: an error is above `LIMIT`, or an implementation raises.
    """
    problems = []
    for case, compute_errors in iter_cases(setting):
        try:
            errors = compute_errors()
        except Exception as e:  # report this case as a problem and continue with the others
            problems.append(f"{case}: {type(e).__name__}: {str(e)[:200]}")
            continue
        yield case, errors
        if not find_largest(errors) < LIMIT:
            problems.append(f"{case}: relative error {find_largest(errors):.2e}")
    if setting.dry:
        yield "not in a dry run", ["torch varlen, linear attention: kernels for CUDA alone"]
    elif reason := find_fla_problem():
        yield "linear attention", f"flash-linear-attention does not serve: {reason}"
    fail_on(problems)
