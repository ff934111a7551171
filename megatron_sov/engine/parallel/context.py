"""Context parallelism: splits a row of n tokens over c processes with equal shares of causal attention.

The row is cut into 2c equal pieces; process r holds pieces r and 2c - 1 - r, an early and a late one
("zigzag", as in Megatron-LM and Llama 3, arXiv 2407.21783, section 3.3.2). Under sequence parallelism the
local tokens are split again, into consecutive parts over the tensor-parallel group. With c = 1 all functions
are identities.

All processes of a context-parallel group read the same row and compute the same loss; only `local` tokens
pass through their layers. Losses and counts are therefore never summed over this group; parameter gradients
always are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state


def size() -> int:
    """Return c, the number of processes that share a row."""
    return int(parallel_state.get_context_parallel_world_size())


def row_multiple() -> int:
    """Return the number that must divide the length of every row at this layout."""
    tp = int(parallel_state.get_tensor_model_parallel_world_size())
    return tp * 2 * size() if size() > 1 else tp


def pieces(row_tokens: int) -> list[tuple[int, int]]:
    """Return (first row index, end) of each local piece, in the order of the local tokens."""
    if size() == 1:
        return [(0, row_tokens)]
    length = row_tokens // (2 * size())
    # early pieces attend to few tokens, late ones to many: together every process does equal work
    return [(i * length, (i + 1) * length) for i in _own_pieces()]


def local(row: torch.Tensor) -> torch.Tensor:
    """Return the local tokens of a row: [n, ...] -> [n / c, ...]."""
    return row if size() == 1 else torch.cat([row[first:end] for first, end in pieces(len(row))])


def row_index(row_tokens: int, sequence_parallel: bool, device: torch.device) -> torch.Tensor:
    """Return the row index [n / c] int64 of each local token; under sequence parallelism [n / c / tp]."""
    index = local(torch.arange(row_tokens, device=device))
    if sequence_parallel:
        index = index.chunk(parallel_state.get_tensor_model_parallel_world_size())[
            parallel_state.get_tensor_model_parallel_rank()]
    return index


def gather(values: torch.Tensor) -> torch.Tensor:
    """Gather the whole row on every process: [n / c, ...] -> [n, ...].

    For losses that every process of the group computes equally: the gradient is the local part of the row's
    gradient, so that each token counts once.
    """
    return values if size() == 1 else _GatherAlike.apply(values)


def gather_keys(values: torch.Tensor) -> torch.Tensor:
    """Gather the whole row on every process, [n / c, ...] -> [n, ...], for computations that differ per
    process.

    The gradient is the sum over the group of all processes' gradients for the local tokens.
    """
    return values if size() == 1 else _GatherKeys.apply(values)


def exchange_tokens(values: torch.Tensor) -> torch.Tensor:
    """Exchange local tokens of all heads for all tokens of local heads: [n / c, heads, dim] -> [n, heads / c,
    dim] (DeepSpeed Ulysses, arXiv 2309.14509)."""
    heads: torch.Tensor = _Exchange.apply(values, True)
    return heads


def exchange_heads(row: torch.Tensor) -> torch.Tensor:
    """Invert `exchange_tokens`: [n, heads / c, dim] -> [n / c, heads, dim]."""
    tokens: torch.Tensor = _Exchange.apply(row, False)
    return tokens


def share(count: int) -> slice:
    """Return the local slice of the heads after `exchange_tokens`; `count` is the number of local heads."""
    num_heads, rank = count, int(parallel_state.get_context_parallel_rank())
    return slice(rank * num_heads, (rank + 1) * num_heads)


def pick(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Gather values at row indices on every process, without gradient: [n / c, ...], [positions] ->
    [positions, ...]."""
    positions = positions.to(values.device)
    if size() == 1:
        return values[positions]
    length = len(values) // 2
    piece, offset = positions // length, positions % length
    early, late = _own_pieces()
    picked = values[torch.where(piece == late, offset + length, offset)]
    is_local = (piece == early) | (piece == late)
    # one process has each value; zeros elsewhere make the sum over the group equal to it
    picked = torch.where(is_local.reshape(-1, *[1] * (values.dim() - 1)), picked, 0)
    dist.all_reduce(picked, group=_group())
    return picked


def _group() -> Any:
    return parallel_state.get_context_parallel_group()


def _own_pieces() -> tuple[int, int]:
    rank = int(parallel_state.get_context_parallel_rank())
    return rank, 2 * size() - 1 - rank


def _in_row_order(by_rank: torch.Tensor) -> torch.Tensor:
    """Reorder [c, n / c, ...] by process to [n, ...] in row order."""
    c = len(by_rank)
    pieces_ = by_rank.unflatten(1, (2, -1))
    # early pieces come in rank order, late ones in reverse: rank r holds piece 2c - 1 - r
    return torch.cat([pieces_[:, 0], pieces_[:, 1].flip(0)]).reshape(c * by_rank.shape[1], *by_rank.shape[2:])


def _by_rank(row: torch.Tensor) -> torch.Tensor:
    """Reorder [n, ...] in row order to [c, n / c, ...] by process."""
    c = size()
    by_piece = row.reshape(2 * c, -1, *row.shape[1:])
    # the inverse of `_in_row_order`: pieces i and 2c - 1 - i go to process i
    return torch.stack([by_piece[:c], by_piece[c:].flip(0)], dim=1).flatten(1, 2)


def _all_gather(values: torch.Tensor) -> torch.Tensor:
    """Gather [n / c, ...] -> [n, ...] in row order."""
    by_rank = values.new_empty(size(), *values.shape)
    dist.all_gather_into_tensor(by_rank.flatten(0, 1), values.contiguous(), group=_group())
    return _in_row_order(by_rank)


def _reduce_scatter(row: torch.Tensor) -> torch.Tensor:
    """Reduce-scatter [n, ...] -> [n / c, ...] over the group."""
    summed = row.new_empty(len(row) // size(), *row.shape[1:])
    dist.reduce_scatter_tensor(summed, _by_rank(row).flatten(0, 1), group=_group())
    return summed


class _Exchange(torch.autograd.Function):
    """All-to-all between tokens and heads; the backward pass is the opposite exchange."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, of_tokens: bool) -> torch.Tensor:
        ctx.of_tokens = of_tokens
        outgoing = values.unflatten(1, (size(), -1)).transpose(0, 1) if of_tokens else _by_rank(values)
        outgoing = outgoing.contiguous()
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=_group())
        return _in_row_order(incoming) if of_tokens else incoming.transpose(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Exchange.apply(grads[0], not ctx.of_tokens), None


class _GatherAlike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return _all_gather(values)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        # every process holds the full gradient of the same loss: a sum over the group would count it c times
        return local(grads[0])


class _GatherKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return _all_gather(values)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        # each process computed a partial gradient of these keys, from its own queries
        return _reduce_scatter(grads[0])
