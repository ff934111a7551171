"""Context parallelism (`parallel.cp`): splits a row with n tokens over c processes with equal shares of
causal attention.

The row is cut into 2c equal pieces; process r holds pieces r and 2c - 1 - r, an early and a late one
("zigzag", as in Megatron-LM and Llama 3, arXiv 2407.21783, section 3.3.2). Under sequence parallelism the
local tokens are split again, into consecutive parts over the tensor-parallel group. With c = 1 all functions
are identities.

All processes of a context-parallel group read the same row and compute the same loss; only `select_local`
tokens pass through their layers. Losses and counts are therefore never summed over this group; parameter
gradients always are."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state


def get_cp_size() -> int:
    """Return c = `parallel.cp`, the number of processes that share a row."""
    return int(parallel_state.get_context_parallel_world_size())


def get_row_multiple() -> int:
    """Return the number that must divide the length of every row at this layout."""
    tp = int(parallel_state.get_tensor_model_parallel_world_size())
    return tp * 2 * get_cp_size() if get_cp_size() > 1 else tp


def get_local_pieces(row_tokens: int) -> list[tuple[int, int]]:
    """Return (first row index, end) of each local piece, in the order of the local tokens."""
    if get_cp_size() == 1:
        return [(0, row_tokens)]
    length = row_tokens // (2 * get_cp_size())
    # early pieces attend to few tokens, late ones to many: together every process does equal work
    return [(i * length, (i + 1) * length) for i in _get_piece_indices()]


def select_local(row: torch.Tensor) -> torch.Tensor:
    """Return the local tokens of a row: [n, ...] -> [n / c, ...]."""
    if get_cp_size() == 1:
        return row
    return torch.cat([row[first:end] for first, end in get_local_pieces(len(row))])


def compute_row_index(row_tokens: int, sequence_parallel: bool, device: torch.device) -> torch.Tensor:
    """Return the row index [n / c] int64 of each local token; under sequence parallelism [n / c / tp]."""
    index = select_local(torch.arange(row_tokens, device=device))
    if sequence_parallel:
        index = index.chunk(parallel_state.get_tensor_model_parallel_world_size())[
            parallel_state.get_tensor_model_parallel_rank()]
    return index


def gather_row(values: torch.Tensor) -> torch.Tensor:
    """Gather the whole row on every process: [n / c, ...] -> [n, ...].

    For losses that every process of the group computes equally: the gradient is the local part of the row's
    gradient, so that each token counts once."""
    return values if get_cp_size() == 1 else _GatherReplicated.apply(values)


def gather_keys(values: torch.Tensor) -> torch.Tensor:
    """Gather the whole row on every process, [n / c, ...] -> [n, ...], for computations that differ per
    process.

    The gradient is the sum over the group of all processes' gradients for the local tokens."""
    return values if get_cp_size() == 1 else _GatherKeys.apply(values)


def exchange_tokens(values: torch.Tensor) -> torch.Tensor:
    """Exchange local tokens of all heads for all tokens of local heads: [n / c, heads, dim] -> [n,
    heads / c, dim] (DeepSpeed Ulysses, arXiv 2309.14509)."""
    heads: torch.Tensor = _HeadExchange.apply(values, True)
    return heads


def exchange_heads(row: torch.Tensor) -> torch.Tensor:
    """Invert `exchange_tokens`: [n, heads / c, dim] -> [n / c, heads, dim]."""
    tokens: torch.Tensor = _HeadExchange.apply(row, False)
    return tokens


def get_local_heads(num_heads: int) -> slice:
    """Return the `num_heads` heads that this process holds after `exchange_tokens`, as a slice of all."""
    rank = int(parallel_state.get_context_parallel_rank())
    return slice(rank * num_heads, (rank + 1) * num_heads)


def gather_positions(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Gather the values [n / c, ...] at p row indices on every process: -> [p, ...], without gradient."""
    positions = positions.to(values.device)
    if get_cp_size() == 1:
        return values[positions]
    length = len(values) // 2
    piece, offset = positions // length, positions % length
    early, late = _get_piece_indices()
    gathered = values[torch.where(piece == late, offset + length, offset)]
    is_local = (piece == early) | (piece == late)
    # only the owner contributes a nonzero value, so the sum over the group equals the owner's value
    gathered = torch.where(is_local.reshape(-1, *[1] * (values.dim() - 1)), gathered, 0)
    dist.all_reduce(gathered, group=_get_group())
    return gathered


def _get_group() -> Any:
    return parallel_state.get_context_parallel_group()


def _get_piece_indices() -> tuple[int, int]:
    rank = int(parallel_state.get_context_parallel_rank())
    return rank, 2 * get_cp_size() - 1 - rank


def _to_row_order(by_rank: torch.Tensor) -> torch.Tensor:
    """Reorder [c, n / c, ...] by process to [n, ...] in row order."""
    c = len(by_rank)
    pieces = by_rank.unflatten(1, (2, -1))
    # early pieces come in rank order, late ones in reverse: rank r holds piece 2c - 1 - r
    return torch.cat([pieces[:, 0], pieces[:, 1].flip(0)]).reshape(c * by_rank.shape[1], *by_rank.shape[2:])


def _split_by_rank(row: torch.Tensor) -> torch.Tensor:
    """Reorder [n, ...] in row order to [c, n / c, ...] by process."""
    c = get_cp_size()
    by_piece = row.reshape(2 * c, -1, *row.shape[1:])
    # the inverse of `_to_row_order`: pieces i and 2c - 1 - i go to process i
    return torch.stack([by_piece[:c], by_piece[c:].flip(0)], dim=1).flatten(1, 2)


def _all_gather(values: torch.Tensor) -> torch.Tensor:
    """Gather [n / c, ...] -> [n, ...] in row order."""
    by_rank = values.new_empty(get_cp_size(), *values.shape)
    dist.all_gather_into_tensor(by_rank.flatten(0, 1), values.contiguous(), group=_get_group())
    return _to_row_order(by_rank)


def _reduce_scatter(row: torch.Tensor) -> torch.Tensor:
    """Reduce-scatter [n, ...] -> [n / c, ...] over the group."""
    local = row.new_empty(len(row) // get_cp_size(), *row.shape[1:])
    dist.reduce_scatter_tensor(local, _split_by_rank(row).flatten(0, 1), group=_get_group())
    return local


class _HeadExchange(torch.autograd.Function):
    """All-to-all between tokens and heads; the backward pass is the opposite exchange."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, from_tokens: bool) -> torch.Tensor:
        ctx.from_tokens = from_tokens
        if from_tokens:
            sent = values.unflatten(1, (get_cp_size(), -1)).transpose(0, 1).contiguous()
        else:
            sent = _split_by_rank(values).contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=_get_group())
        return _to_row_order(received) if from_tokens else received.transpose(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _HeadExchange.apply(grads[0], not ctx.from_tokens), None


class _GatherReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return _all_gather(values)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        # every process holds the full gradient of the same loss: a sum over the group would count it c times
        return select_local(grads[0])


class _GatherKeys(_GatherReplicated):
    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        # every process computed a partial gradient from the local queries
        return _reduce_scatter(grads[0])
