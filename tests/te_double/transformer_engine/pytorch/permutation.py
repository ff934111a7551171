"""Permute tokens into the order of their experts, and back."""

from __future__ import annotations

import torch

from .placement import require_cuda
from .recording import kernel


def _order_rows(inp: torch.Tensor, routing_map: torch.Tensor, num_out_tokens: int,
                probs: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the expert and the token of every permuted row, ordered by expert, then token."""
    if not inp.numel():
        return torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)
    require_cuda(inp=inp, routing_map=routing_map, probs=probs)
    if len(inp) != len(routing_map):
        raise ValueError(f"Permute not possible: inp.size(0) ({len(inp)}) must match routing_map.size(0) "
                         f"({len(routing_map)}).")
    assert num_out_tokens > 0, (f"moe_permute (mask map) requires num_out_tokens > 0, got {num_out_tokens}. "
                                "Use int(routing_map.sum()) or num_tokens * top_k.")
    with kernel():
        expert, token = routing_map.bool().t().nonzero(as_tuple=True)
    if num_out_tokens != len(token):
        raise NotImplementedError(f"the double permutes all {len(token)} rows, not num_out_tokens="
                                  f"{num_out_tokens}")
    return expert, token


def _row_id_map(routing_map: torch.Tensor, expert: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Return an int32 map [tokens, 2 * experts + 1], the shape of the real map. Column e has each token's
    permuted row for expert e, or -1; the columns after the experts' are -1."""
    tokens, experts = routing_map.shape
    row_id_map = torch.full((tokens, 2 * experts + 1), -1, dtype=torch.int32)
    row_id_map[token, expert] = torch.arange(len(token), dtype=torch.int32)
    return row_id_map


def _find_rows(row_id_map: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return permuted row, token and expert of each entry of a map, ordered by token."""
    rows = row_id_map[:, :row_id_map.shape[1] // 2]
    token, expert = (rows >= 0).nonzero(as_tuple=True)
    assert len(token) == num_rows, f"the map has {len(token)} rows, and the input {num_rows}"
    return rows[token, expert].long(), token, expert


def moe_permute(inp: torch.Tensor, routing_map: torch.Tensor, num_out_tokens: int, max_token_num: int = -1,
                map_type: str = "mask") -> tuple[torch.Tensor, torch.Tensor]:
    """Return the permuted rows of `inp` [tokens, hidden], and the map for `moe_unpermute`."""
    if map_type != "mask":
        raise NotImplementedError("the double takes masks only")
    expert, token = _order_rows(inp, routing_map, num_out_tokens)
    return inp[token], _row_id_map(routing_map, expert, token)


def moe_permute_with_probs(inp: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor,
                           num_out_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the permuted rows, their weights from `probs` [tokens, experts], and the map."""
    expert, token = _order_rows(inp, routing_map, num_out_tokens, probs)
    return inp[token], probs[token, expert], _row_id_map(routing_map, expert, token)


def moe_unpermute(inp: torch.Tensor, row_id_map: torch.Tensor, merging_probs: torch.Tensor | None = None,
                  restore_shape: torch.Size | None = None, map_type: str = "mask",
                  probs: torch.Tensor | None = None, pad_offsets: torch.Tensor | None = None) -> torch.Tensor:
    """Return [tokens, hidden]: the (weighted) sum of each token's rows, accumulated at least in float32 like
    the kernel. Without rows the result has no rows, whatever `restore_shape` is."""
    if map_type != "mask" or pad_offsets is not None or probs is not None:
        raise NotImplementedError("the double takes masks without padding only")
    if not inp.numel():
        return inp.clone()
    require_cuda(inp=inp, row_id_map=row_id_map, merging_probs=merging_probs)
    row, token, expert = _find_rows(row_id_map, len(inp))
    wide = torch.promote_types(inp.dtype, torch.float32)
    parts = inp[row].to(wide)
    if merging_probs is not None:
        parts = parts * merging_probs[token, expert].to(wide)[:, None]
    shape = inp.shape if restore_shape is None else restore_shape
    # unlike index_add, scatter_add does not save the rows for backward; neither does the kernel
    return parts.new_zeros(shape).scatter_add(0, token[:, None].expand_as(parts), parts).to(inp.dtype)


def moe_sort_chunks_by_index(inp: torch.Tensor, split_sizes: torch.Tensor,
                             sorted_index: torch.Tensor) -> torch.Tensor:
    """Return `inp`, cut into chunks of `split_sizes` rows, with the chunks in the order of `sorted_index`."""
    if not inp.numel():
        return inp.clone()
    require_cuda(inp=inp, split_sizes=split_sizes, sorted_index=sorted_index)
    chunks = inp.split(split_sizes.tolist())
    return torch.cat([chunks[i] for i in sorted_index.tolist()])


def moe_sort_chunks_by_index_with_probs(inp: torch.Tensor, probs: torch.Tensor, split_sizes: torch.Tensor,
                                        sorted_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply `moe_sort_chunks_by_index` to the rows and to their weights."""
    return (moe_sort_chunks_by_index(inp, split_sizes, sorted_index),
            moe_sort_chunks_by_index(probs, split_sizes, sorted_index))
