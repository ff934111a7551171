"""The gated delta rule in plain torch: linear attention whose state forgets by a gate and is corrected by a
key's error (Kimi Delta Attention, arXiv 2510.26692; in chunks by the WY form of arXiv 2406.06484).

With a state S [key channels, value channels] of each head, a token's decay g <= 0 of each channel of keys,
and its learning rate b:

    S <- exp(g) S;  S <- S + b k (v - S^T k)^T;  output = S^T q

Inside a chunk of tokens all corrections follow from one triangular system; between chunks the state goes on.
Chunks begin with their document, so what becomes of one does not depend on where it lies in its row.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from megatron_sov.engine.parallel.device import FLA_KERNEL, to_device

CHUNK = 64
"""Tokens of a chunk."""
NORM_EPS = 1e-6
"""Added to the squared length of queries and keys (transformers' `l2norm`, as in flash-linear-attention)."""


@dataclass(frozen=True)
class Chunks:
    """The documents of a row in chunks: all first ones, then all second ones, and so on, those of documents
    with most chunks first."""

    tokens: torch.Tensor
    """[chunks * CHUNK] int64: row index of what stands at each place; the row's length where nothing does."""
    places: torch.Tensor
    """[outputs] int64: place of each token whose output is asked for."""
    positions: torch.Tensor
    """[tokens] int64, counted from the start of each document."""
    steps: list[int]
    """How many documents have a first chunk, a second one, and so on."""
    order: list[int]
    """The documents by falling number of chunks; equal ones as they stand."""
    bounds: torch.Tensor
    """[documents + 1] int64, row indices: where each document begins, and the end of the last."""
    host_bounds: torch.Tensor
    """The same on the host, so that nobody waits for the device to know them."""
    asked: torch.Tensor
    """[outputs] int64, row indices of the tokens whose output is asked for."""


def chunk_documents(documents: Sequence[tuple[int, int, int]], device: torch.device) -> Chunks:
    """Cut documents that follow one another from 0 on.

    Args:
        documents: row indices: start of each, its first token whose output is asked for, its end.
        device: of the indices.
    """
    row_tokens = documents[-1][2]
    starts = torch.tensor([start for start, _, _ in documents])
    lengths = torch.tensor([stop - start for start, _, stop in documents])
    counts = (lengths + CHUNK - 1) // CHUNK
    order = torch.argsort(counts, descending=True, stable=True)
    steps = [int((counts > i).sum()) for i in range(int(counts.max()))]
    firsts = torch.cat([starts[order[:number]] + i * CHUNK for i, number in enumerate(steps)])
    ends = torch.cat([(starts + lengths)[order[:number]] for number in steps])
    tokens = firsts[:, None] + torch.arange(CHUNK)
    tokens = tokens.masked_fill(tokens >= ends[:, None], row_tokens).flatten()
    places = torch.empty(row_tokens + 1, dtype=torch.int64)
    places[tokens] = torch.arange(len(tokens))
    positions = torch.arange(row_tokens) - starts.repeat_interleave(lengths)
    asked = torch.cat([torch.arange(first, stop) for _, first, stop in documents])
    bounds = torch.cat([starts, torch.tensor([row_tokens])])
    tokens, places, positions, on_device, asked = (to_device(t, device) for t in (
        tokens, places[asked], positions, bounds, asked))
    return Chunks(tokens, places, positions, steps, order.tolist(), on_device, bounds, asked)


def normalised(values: torch.Tensor) -> torch.Tensor:
    """Return values of length 1 along the last axis."""
    return values * torch.rsqrt((values * values).sum(-1, keepdim=True) + NORM_EPS)


def in_chunks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor,
              rate: torch.Tensor, *, chunks: Chunks,
              state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the rule to all documents of a row, each from a state of its own.

    Args:
        query, key: [tokens, key heads, key channels], as they meet the state; queries already scaled.
        value: [tokens, key heads, r, value channels]: r value heads share a key head.
        decay: [tokens, key heads, r, key channels], logarithms, at most 0.
        rate: [tokens, key heads, r].
        chunks: where the documents are.
        state: [documents, key heads, r, key channels, value channels] in the order of `chunks`; None: zeros.

    Returns:
        Outputs [outputs, key heads, r, value channels], and the states behind the documents.
    """
    q, k, v = (_placed(t, chunks) for t in (query[:, :, None], key[:, :, None], value))
    g, b = _placed(decay, chunks).cumsum(-2), _placed(rate[..., None], chunks)
    grown, left = g.exp(), (g[..., -1:, :] - g).exp()
    of_keys, within = _decayed_products((k, q), k, g)
    solved = torch.linalg.solve_triangular(
        b * of_keys, b * torch.cat([v, grown * k.expand(*v.shape[:-1], -1)], -1),
        upper=False, unitriangular=True)
    new, seen = solved.split([v.shape[-1], k.shape[-1]], -1)
    read, written = q * grown, (k * left).transpose(-1, -2)
    kept = grown[..., -1:, :].transpose(-1, -2)
    if state is None:
        state = v.new_zeros(chunks.steps[0], *v.shape[1:3], k.shape[-1], v.shape[-1])
    outputs, ended = [], []
    # split at once: the backward pass of a slice for each step would fill a whole row of zeros for each
    steps = (t.split(chunks.steps) for t in (new, seen, read, within, kept, written))
    for number, *parts in zip(chunks.steps, *steps, strict=True):
        new, seen, read, within, kept, written = parts
        if len(state) > number:
            ended.append(state[number:])
            state = state[:number]
        correction = new - seen @ state
        outputs.append(read @ state + within @ correction)
        state = kept * state + written @ correction
    ended.append(state)
    found = torch.cat(outputs).permute(0, 3, 1, 2, 4).flatten(0, 1)
    return found.index_select(0, chunks.places), torch.cat(ended[::-1])


def by_kernels(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor,
               rate: torch.Tensor, *, chunks: Chunks, dtype: torch.dtype) -> torch.Tensor:
    """Apply the rule to all documents of a row, each from zeros, by the kernels of flash-linear-attention.

    It has not run on a GPU: tests hold its calls against the kernels' signatures, and what it does with them
    against the plain versions beside those kernels.

    Args:
        query, key: [tokens, key heads, key channels], as they meet the state; queries already scaled.
        value: [tokens, key heads, r, value channels]: r value heads share a key head.
        decay: [tokens, key heads, r, key channels], logarithms, at most 0.
        rate: [tokens, key heads, r].
        chunks: where the documents are.
        dtype: of what is multiplied, that of the model; decays and rates stay as they are (fla's own layers
            hand on rates in float32, too).

    Returns:
        [outputs, key heads, r, value channels], as wide as `value`.
    """
    # heads of values follow one another, those of a key head together
    found, _ = _fla_kernel()(
        query[None].to(dtype), key[None].to(dtype), value.flatten(1, 2)[None].to(dtype),
        g=decay.flatten(1, 2)[None], beta=rate.flatten(1)[None], scale=1.0,
        cu_seqlens=chunks.bounds, cu_seqlens_cpu=chunks.host_bounds)
    heads: torch.Tensor = found[0].to(value.dtype).unflatten(1, value.shape[1:3])
    return heads.index_select(0, chunks.asked)


def _fla_kernel() -> Callable[..., tuple[torch.Tensor, None]]:
    module, name = FLA_KERNEL
    found: Callable[..., tuple[torch.Tensor, None]] = getattr(importlib.import_module(module), name)
    return found


def _decayed_products(lefts: Sequence[torch.Tensor], right: torch.Tensor,
                      decays: torch.Tensor) -> list[torch.Tensor]:
    """Return the products of each of a chunk's tokens with itself and those before it, whose channels have
    decayed since.

    Between two tokens a channel decays by the quotient of what it has by them.  Decays go to both sides: to
    the later tokens of each half of the chunk since its middle, and to the earlier ones until then, and so on
    in halves, so that none is above 1, however fast channels decay.

    Args:
        lefts: [chunks, key heads, r or 1, CHUNK, channels] each.
        right: of the same shape.
        decays: [chunks, key heads, r, CHUNK, channels], summed up from the chunk's first token on.

    Returns:
        [chunks, key heads, r, CHUNK, CHUNK] each; zeros where the second token is later.
    """
    lefts = [left.expand_as(decays) for left in lefts]
    found = [(left * right).sum(-1)[..., None, None] for left in lefts]
    half = 1
    while half < CHUNK:
        pairs = [t.unflatten(-2, (-1, 2, half)) for t in (*lefts, right.expand_as(decays), decays)]
        *late, early, decay = pairs
        middle = decay[..., 0, -1:, :]
        until = (early[..., 0, :, :] * (middle - decay[..., 0, :, :]).exp()).transpose(-1, -2)
        since = (decay[..., 1, :, :] - middle).exp()
        found = [_joined(blocks, (left[..., 1, :, :] * since) @ until)
                 for blocks, left in zip(found, late, strict=True)]
        half *= 2
    return [blocks.squeeze(-3) for blocks in found]


def _joined(blocks: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """Return lower triangular blocks of twice the size: [..., 2 n, size, size] of both halves of a row of
    tokens, [..., n, size, size] of the later with the earlier ones -> [..., n, 2 size, 2 size]."""
    first, second = blocks.unflatten(-3, (-1, 2)).unbind(-3)
    return torch.cat([torch.cat([first, torch.zeros_like(below)], -1), torch.cat([below, second], -1)], -2)


def by_token(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor,
             rate: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Apply the rule to a few tokens of many sequences, one token after the other: [sequences, tokens, ...]
    of what `in_chunks` takes -> outputs [sequences, tokens, key heads, r, value channels], and the state
    behind each token."""
    outputs, states = [], []
    for t in range(query.shape[1]):
        q, k = query[:, t, :, None, :, None], key[:, t, :, None, :, None]
        state = state * decay[:, t, ..., None].exp()
        error = rate[:, t, ..., None] * (value[:, t] - (state * k).sum(-2))
        state = state + k * error[..., None, :]
        outputs.append((state * q).sum(-2))
        states.append(state)
    return torch.stack(outputs, 1), states


def _placed(values: torch.Tensor, chunks: Chunks) -> torch.Tensor:
    """[tokens, key heads, r or 1, channels] -> [chunks, key heads, r or 1, CHUNK, channels]; zeros, which
    leave a state as it is, where no token is."""
    filled = torch.cat([values, values.new_zeros(1, *values.shape[1:])])
    return filled.index_select(0, chunks.tokens).unflatten(0, (-1, CHUNK)).permute(0, 2, 3, 1, 4)


def short_convolution(inputs: torch.Tensor, weight: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return each channel's causal convolution inside documents: [tokens, channels], [channels, taps],
    positions [tokens] in their documents -> [tokens, channels]."""
    taps = weight.shape[1]
    found = inputs * weight[:, -1]
    for back in range(1, min(taps, len(inputs))):
        before = pad(inputs[:-back], (0, 0, back, 0)) * (positions >= back)[:, None]
        found = found + before * weight[:, taps - 1 - back]
    return found


def convolved_windows(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the same behind the first taps - 1 inputs: [sequences, taps - 1 + tokens, channels], [channels,
    taps] -> [sequences, tokens, channels]."""
    return (inputs.unfold(1, weight.shape[1], 1) * weight).sum(-1)
