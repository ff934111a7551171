"""Context parallelism: a row of n tokens cut over c processes, so that each does the same share
of causal attention.

The row is cut into 2c equal pieces; process r holds pieces r and 2c - 1 - r, one early and one late
("zigzag", as in Megatron-LM's context parallelism and Llama 3, arXiv 2407.21783, section 3.3.2).  Under
sequence parallelism the local tokens are cut once more, into consecutive parts over the tensor-parallel
group.  With c = 1 everything is the identity.

Every process of a context-parallel group reads the same row and computes the same loss; only `local` tokens
pass through its layers.  So losses and counts are never summed over this group,
and gradients of parameters always are.
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
    """Return what the length of every row must be a multiple of at this layout."""
    tp = int(parallel_state.get_tensor_model_parallel_world_size())
    return tp * 2 * size() if size() > 1 else tp


def pieces(row_tokens: int) -> list[tuple[int, int]]:
    """Return first row index and end of each piece that this process holds,
    in the order of its local tokens."""
    if size() == 1:
        return [(0, row_tokens)]
    length = row_tokens // (2 * size())
    # the early piece attends to little and the late one to much: together every process does the same
    return [(i * length, (i + 1) * length) for i in _own_pieces()]


def local(row: torch.Tensor) -> torch.Tensor:
    """Return this process's tokens of a row: [n, ...] -> [n / c, ...]."""
    return row if size() == 1 else torch.cat([row[first:end] for first, end in pieces(len(row))])


def row_index(row_tokens: int, sequence_parallel: bool, device: torch.device) -> torch.Tensor:
    """Return the row index [n / c] int64 of each local token, under sequence parallelism [n / c / tp] of
    this process's part."""
    index = local(torch.arange(row_tokens, device=device))
    if sequence_parallel:
        index = index.chunk(parallel_state.get_tensor_model_parallel_world_size())[
            parallel_state.get_tensor_model_parallel_rank()]
    return index


def gather(values: torch.Tensor) -> torch.Tensor:
    """Return the whole row on every process: [n / c, ...] -> [n, ...].

    Differentiable for losses that every process of the group computes alike: the gradient is this process's
    part of the row's gradient, so each token counts once.
    """
    return values if size() == 1 else _GatherAlike.apply(values)


def gather_keys(values: torch.Tensor) -> torch.Tensor:
    """Return the whole row on every process, [n / c, ...] -> [n, ...],
    for computations that differ between processes.

    The gradient is the sum over the group of what each process found for these tokens.
    """
    return values if size() == 1 else _GatherKeys.apply(values)


def exchange_tokens(values: torch.Tensor) -> torch.Tensor:
    """Return the whole row of this process's share of the heads: [n / c, heads, dim] -> [n, heads / c, dim]
    (DeepSpeed Ulysses, arXiv 2309.14509)."""
    found: torch.Tensor = _Exchange.apply(values, True)
    return found


def exchange_heads(row: torch.Tensor) -> torch.Tensor:
    """Return all heads of this process's tokens, the other way round: [n, heads / c, dim] -> [n / c, heads,
    dim]."""
    found: torch.Tensor = _Exchange.apply(row, False)
    return found


def share(count: int) -> slice:
    """Return which of so many heads this process has a whole row of behind `exchange_tokens`."""
    own, rank = count, int(parallel_state.get_context_parallel_rank())
    return slice(rank * own, (rank + 1) * own)


def pick(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return values at some row indices on every process: [n / c, ...], [positions] -> [positions,
    ...] (no gradient)."""
    positions = positions.to(values.device)
    if size() == 1:
        return values[positions]
    length = len(values) // 2
    piece, place = positions // length, positions % length
    early, late = _own_pieces()
    found = values[torch.where(piece == late, place + length, place)]
    mine = (piece == early) | (piece == late)
    # zeros elsewhere make the sum over the group the one value that exists
    found = torch.where(mine.reshape(-1, *[1] * (values.dim() - 1)), found, 0)
    dist.all_reduce(found, group=_group())  # one process has the value, the others zero
    return found


def _group() -> Any:
    return parallel_state.get_context_parallel_group()


def _own_pieces() -> tuple[int, int]:
    rank = int(parallel_state.get_context_parallel_rank())
    return rank, 2 * size() - 1 - rank


def _in_row_order(by_rank: torch.Tensor) -> torch.Tensor:
    """[c, n / c, ...] of processes -> [n, ...] in row order."""
    c = len(by_rank)
    pieces_ = by_rank.unflatten(1, (2, -1))
    # early pieces come in the order of ranks, late ones against it: rank r holds piece 2c - 1 - r
    return torch.cat([pieces_[:, 0], pieces_[:, 1].flip(0)]).reshape(c * by_rank.shape[1], *by_rank.shape[2:])


def _by_rank(row: torch.Tensor) -> torch.Tensor:
    """[n, ...] in row order -> [c, n / c, ...] of processes."""
    c = size()
    by_piece = row.reshape(2 * c, -1, *row.shape[1:])
    # the inverse of `_in_row_order`: piece i of the first half and piece 2c - 1 - i go to process i
    return torch.stack([by_piece[:c], by_piece[c:].flip(0)], dim=1).flatten(1, 2)


def _all_gather(values: torch.Tensor) -> torch.Tensor:
    """[n / c, ...] -> [n, ...] in row order."""
    by_rank = values.new_empty(size(), *values.shape)
    dist.all_gather_into_tensor(by_rank.flatten(0, 1), values.contiguous(), group=_group())
    return _in_row_order(by_rank)


def _reduce_scatter(row: torch.Tensor) -> torch.Tensor:
    """[n, ...] -> [n / c, ...]: sums over the group, each process gets its own tokens."""
    summed = row.new_empty(len(row) // size(), *row.shape[1:])
    dist.reduce_scatter_tensor(summed, _by_rank(row).flatten(0, 1), group=_group())
    return summed


class _Exchange(torch.autograd.Function):
    """Tokens for heads, or heads for tokens; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, of_tokens: bool) -> torch.Tensor:
        ctx.of_tokens = of_tokens
        sent = values.unflatten(1, (size(), -1)).transpose(0, 1) if of_tokens else _by_rank(values)
        sent = sent.contiguous()
        got = torch.empty_like(sent)
        dist.all_to_all_single(got, sent, group=_group())
        return _in_row_order(got) if of_tokens else got.transpose(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Exchange.apply(grads[0], not ctx.of_tokens), None


class _GatherAlike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return _all_gather(values)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        # every process has the whole gradient of the same loss: a sum over the group would count it c times
        return local(grads[0])


class _GatherKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return _all_gather(values)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        # each process found another part of the gradient of these keys: its own queries' one
        return _reduce_scatter(grads[0])
