"""The gated delta rule in plain torch, with a fused alternative: linear attention from Kimi Delta Attention
(arXiv 2510.26692), computed in chunks by the WY form in arXiv 2406.06484.

For each head with state S [key channels, value channels], per-token decay g <= 0 of each key channel and
learning rate b:

    S <- exp(g) S;  S <- S + b k (v - S^T k)^T;  output = S^T q

Inside a chunk of tokens all corrections follow from one triangular system; the state carries over between
chunks. Chunks start at document boundaries, so results do not depend on a document's position in its row."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from megatron_sov.engine.parallel.device import to_device
from megatron_sov.engine.parallel.gpu_libraries import FLA_KERNEL

CHUNK_TOKENS = 64
"""Tokens per chunk."""
NORM_EPS = 1e-6
"""Added to the squared norm in queries and keys (transformers' `l2norm`, as in flash-linear-attention)."""


@dataclass(frozen=True)
class DocumentChunks:
    """A row's documents cut into chunks of C = `CHUNK_TOKENS` tokens.

    Order: the first chunk of every document, then all second chunks, and so on; documents with more chunks
    come first."""

    tokens: torch.Tensor
    """[chunks * C] int64 row index per entry; the row's length for empty entries."""
    places: torch.Tensor
    """[outputs] int64 index in `tokens` per output token."""
    positions: torch.Tensor
    """[tokens] int64, counted from the start of each document."""
    steps: list[int]
    """Number of documents with at least 1, 2, ... chunks: those that have a first, second, ... chunk."""
    order: list[int]
    """Documents by falling chunk count; ties keep the order."""
    bounds: torch.Tensor
    """[documents + 1] int64 row indices: document starts, then the end."""
    host_bounds: torch.Tensor
    """`bounds` on the host, which avoids a device synchronization."""
    output_tokens: torch.Tensor
    """[outputs] int64 row index per output token."""


def chunk_documents(documents: Sequence[tuple[int, int, int]], device: torch.device) -> DocumentChunks:
    """Cut adjacent documents into `DocumentChunks`; the first document starts at 0.

    Args:
        documents: row indices (start, first output token, end) of each.
        device: device of the index tensors.
    """
    row_tokens = documents[-1][2]
    starts = torch.tensor([start for start, _, _ in documents])
    lengths = torch.tensor([stop - start for start, _, stop in documents])
    counts = (lengths + CHUNK_TOKENS - 1) // CHUNK_TOKENS
    order = torch.argsort(counts, descending=True, stable=True)
    steps = [int((counts > i).sum()) for i in range(int(counts.max()))]
    firsts = torch.cat([starts[order[:number]] + i * CHUNK_TOKENS for i, number in enumerate(steps)])
    ends = torch.cat([(starts + lengths)[order[:number]] for number in steps])
    tokens = firsts[:, None] + torch.arange(CHUNK_TOKENS)
    tokens = tokens.masked_fill(tokens >= ends[:, None], row_tokens).flatten()
    places = torch.empty(row_tokens + 1, dtype=torch.int64)
    places[tokens] = torch.arange(len(tokens))
    positions = torch.arange(row_tokens) - starts.repeat_interleave(lengths)
    output_tokens = torch.cat([torch.arange(first, stop) for _, first, stop in documents])
    bounds = torch.cat([starts, torch.tensor([row_tokens])])
    tokens, places, positions, on_device, output_tokens = (to_device(t, device) for t in (
        tokens, places[output_tokens], positions, bounds, output_tokens))
    return DocumentChunks(tokens, places, positions, steps, order.tolist(), on_device, bounds, output_tokens)


def normalize_l2(values: torch.Tensor) -> torch.Tensor:
    """Scale to unit L2 norm along the last axis."""
    return values * torch.rsqrt((values * values).sum(-1, keepdim=True) + NORM_EPS)


def apply_delta_rule(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor,
                     rate: torch.Tensor, *, chunks: DocumentChunks,
                     state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the delta rule to a row's documents, with a state per document.

    Args:
        query, key: [tokens, key heads, key channels], normalized; queries are already scaled.
        value: [tokens, key heads, r, value channels]; r value heads share a key head.
        decay: [tokens, key heads, r, key channels], logarithms, at most 0.
        rate: [tokens, key heads, r].
        chunks: the documents.
        state: [documents, key heads, r, key channels, value channels] in the order of `chunks`. None: zeros.

    Returns:
        Outputs [outputs, key heads, r, value channels], and the final states of the documents.
    """
    q, k, v = (_arrange_chunks(t, chunks) for t in (query[:, :, None], key[:, :, None], value))
    g, b = _arrange_chunks(decay, chunks).cumsum(-2), _arrange_chunks(rate[..., None], chunks)
    decay_from_start, decay_to_end = g.exp(), (g[..., -1:, :] - g).exp()
    key_products, query_products = _compute_decayed_products((k, q), k, g)
    solved = torch.linalg.solve_triangular(
        b * key_products, b * torch.cat([v, decay_from_start * k.expand(*v.shape[:-1], -1)], -1),
        upper=False, unitriangular=True)
    # a chunk's corrections b (v - S^T k) are new_values - read_keys @ S with S before the chunk
    new_values, read_keys = solved.split([v.shape[-1], k.shape[-1]], -1)
    scaled_queries, scaled_keys = q * decay_from_start, (k * decay_to_end).transpose(-1, -2)
    state_decay = decay_from_start[..., -1:, :].transpose(-1, -2)
    if state is None:
        state = v.new_zeros(chunks.steps[0], *v.shape[1:3], k.shape[-1], v.shape[-1])
    outputs, final_states = [], []
    # split once: the backward pass of a slice per step would allocate a zero row for each
    tensors = new_values, read_keys, scaled_queries, query_products, state_decay, scaled_keys
    steps = (t.split(chunks.steps) for t in tensors)
    for num_documents, *step_tensors in zip(chunks.steps, *steps, strict=True):
        values, reads, queries, products, old_share, writes = step_tensors
        if len(state) > num_documents:  # the last documents in the order have no further chunk
            final_states.append(state[num_documents:])
            state = state[:num_documents]
        correction = values - reads @ state
        outputs.append(queries @ state + products @ correction)
        state = old_share * state + writes @ correction
    final_states.append(state)
    row_outputs = torch.cat(outputs).permute(0, 3, 1, 2, 4).flatten(0, 1)
    return row_outputs.index_select(0, chunks.places), torch.cat(final_states[::-1])


def apply_fused_delta_rule(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor,
                           rate: torch.Tensor, *, chunks: DocumentChunks, dtype: torch.dtype) -> torch.Tensor:
    """Apply the delta rule to a row's documents from zero states, with flash-linear-attention's kernels.

    Never run on a GPU by this project: tests compare the call with the kernels' signatures, and the results
    with the plain torch versions in the same package.

    Args:
        query, key: [tokens, key heads, key channels], normalized; queries are already scaled.
        value: [tokens, key heads, r, value channels]; r value heads share a key head.
        decay: [tokens, key heads, r, key channels], logarithms, at most 0.
        rate: [tokens, key heads, r].
        chunks: the documents.
        dtype: dtype of queries, keys and values in the kernel; decays and rates stay float32 (as in fla's
            own layers).

    Returns:
        [outputs, key heads, r, value channels] in the dtype of `value`.
    """
    # value heads are adjacent, grouped by their key head
    outputs, _ = _load_fla_kernel()(
        query[None].to(dtype), key[None].to(dtype), value.flatten(1, 2)[None].to(dtype),
        g=decay.flatten(1, 2)[None], beta=rate.flatten(1)[None], scale=1.0,
        cu_seqlens=chunks.bounds, cu_seqlens_cpu=chunks.host_bounds)
    heads: torch.Tensor = outputs[0].to(value.dtype).unflatten(1, value.shape[1:3])
    return heads.index_select(0, chunks.output_tokens)


def _load_fla_kernel() -> Callable[..., tuple[torch.Tensor, None]]:
    module, name = FLA_KERNEL
    kernel: Callable[..., tuple[torch.Tensor, None]] = getattr(importlib.import_module(module), name)
    return kernel


def _compute_decayed_products(lefts: Sequence[torch.Tensor], right: torch.Tensor,
                              decays: torch.Tensor) -> list[torch.Tensor]:
    """Return products between each token in a chunk and the tokens up to it, with decayed channels.

    A channel decays between two tokens by the quotient of their cumulative decays. To keep every factor at
    most 1, the chunk is halved recursively: tokens of a later half decay from the middle to the token, tokens
    of the earlier half from the token to the middle.

    Args:
        lefts: [chunks, key heads, r or 1, C, channels] each.
        right: the same shape.
        decays: [chunks, key heads, r, C, channels], cumulative from the chunk's first token.

    Returns:
        [chunks, key heads, r, C, C] per entry of `lefts`; zeros above the diagonal.
    """
    lefts = [left.expand_as(decays) for left in lefts]
    products = [(left * right).sum(-1)[..., None, None] for left in lefts]
    half = 1
    while half < CHUNK_TOKENS:
        pairs = [t.unflatten(-2, (-1, 2, half)) for t in (*lefts, right.expand_as(decays), decays)]
        *late, early, decay = pairs
        middle = decay[..., 0, -1:, :]
        decayed_early = (early[..., 0, :, :] * (middle - decay[..., 0, :, :]).exp()).transpose(-1, -2)
        decay_since = (decay[..., 1, :, :] - middle).exp()
        products = [_join_blocks(blocks, (left[..., 1, :, :] * decay_since) @ decayed_early)
                    for blocks, left in zip(products, late, strict=True)]
        half *= 2
    return [blocks.squeeze(-3) for blocks in products]


def _join_blocks(blocks: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """Assemble lower triangular blocks of twice the size from the diagonal blocks [..., 2 n, size, size] of
    both halves and the blocks below [..., n, size, size] -> [..., n, 2 size, 2 size]."""
    first, second = blocks.unflatten(-3, (-1, 2)).unbind(-3)
    return torch.cat([torch.cat([first, torch.zeros_like(below)], -1), torch.cat([below, second], -1)], -2)


def apply_delta_rule_by_token(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                              decay: torch.Tensor, rate: torch.Tensor,
                              state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the delta rule token by token to many sequences.

    Arguments as in `apply_delta_rule`, with leading axes [sequences, tokens]. Returns outputs [sequences,
    tokens, key heads, r, value channels], and the state after the last token."""
    outputs = []
    for t in range(query.shape[1]):
        q, k = query[:, t, :, None, :, None], key[:, t, :, None, :, None]
        state = state * decay[:, t, ..., None].exp()
        error = rate[:, t, ..., None] * (value[:, t] - (state * k).sum(-2))
        state = state + k * error[..., None, :]
        outputs.append((state * q).sum(-2))
    return torch.stack(outputs, 1), state


def _arrange_chunks(values: torch.Tensor, chunks: DocumentChunks) -> torch.Tensor:
    """Arrange [tokens, key heads, r or 1, channels] as [chunks, key heads, r or 1, C, channels]; empty
    entries are 0, which leaves the state unchanged."""
    filled = torch.cat([values, values.new_zeros(1, *values.shape[1:])])
    return filled.index_select(0, chunks.tokens).unflatten(0, (-1, CHUNK_TOKENS)).permute(0, 2, 3, 1, 4)


def apply_short_convolution(inputs: torch.Tensor, weight: torch.Tensor,
                            positions: torch.Tensor) -> torch.Tensor:
    """Apply a causal depthwise convolution inside documents: inputs [tokens, channels], weight [channels,
    taps], positions [tokens] in their documents -> [tokens, channels]."""
    taps = weight.shape[1]
    outputs = inputs * weight[:, -1]
    for back in range(1, min(taps, len(inputs))):
        shifted = pad(inputs[:-back], (0, 0, back, 0)) * (positions >= back)[:, None]
        outputs = outputs + shifted * weight[:, taps - 1 - back]
    return outputs


def convolve_windows(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Apply the convolution to inputs with taps - 1 previous inputs in front: [sequences, taps - 1 + tokens,
    channels], weight [channels, taps] -> [sequences, tokens, channels]."""
    return (inputs.unfold(1, weight.shape[1], 1) * weight).sum(-1)
