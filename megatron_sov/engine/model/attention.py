"""Core attention inside packed documents; `gpu_settings.uses_document_attention` says when it is used.

Megatron-Core's local attention refuses packed sequences and context parallelism, and on sliding layers
replaces the document mask by the window mask, so that documents would attend to each other. Transformer
Engine's context parallelism requires documents padded to a multiple of twice the group size and has no
sliding window over split documents. `DocumentAttention` therefore also serves `parallel.cp` > 1, unless
`gpu.attention` selects another kernel (`specs.build_exchanged_attention`).

A piece is a range of the row on this process. Each document attends to itself: on GPUs in 16 bits, one kernel
call covers all documents of a piece (`attend_documents`); else documents of equal length share a call. Keys
and values arrive by an all-gather over the context-parallel group (Llama 3, arXiv 2407.21783, section
3.3.2): the whole row for global attention, the last window - 1 tokens of each piece for sliding windows."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from megatron_sov.engine.model.delta_rule import DocumentChunks, chunk_documents
from megatron_sov.engine.parallel import context
from megatron_sov.engine.parallel.device import to_device

MAX_HEAD_DIM = 256
"""Maximum head size for torch's flash attention, which also requires multiples of 8."""
Span = tuple[int, int, int]
"""(start, first, end) of a document in the row: queries are tokens first to end, keys start to end."""
QUERY_BLOCK = 1024
"""Queries per call with a mask, which bounds the mask: QUERY_BLOCK x (keys up to the last query) booleans, or
QUERY_BLOCK x (QUERY_BLOCK + window) with a sliding window."""


class DocumentAttention(MegatronModule):
    """Causal attention inside each packed document, optionally within a sliding window.

    With `parallel.cp` > 1 every global layer saves its gathered keys and values for the backward pass: 2 x
    row tokens x key heads x head size. With `train.recompute` only one layer at a time does."""

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str,
                 attention_dropout: float | None = None, softmax_scale: float | None = None,
                 cp_comm_type: str | None = None, pg_collection: Any = None, window_tokens: int = 0) -> None:
        super().__init__(config=config)
        self.window_tokens = window_tokens
        self.softmax_scale = softmax_scale or config.kv_channels ** -0.5

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
                attn_mask_type: Any = None, attention_bias: None = None,
                packed_seq_params: PackedDocuments | None = None) -> torch.Tensor:
        """Compute attention outputs.

        Args:
            query: [local tokens, heads, head_dim].
            key, value: [local tokens, kv_heads, head_dim].
            packed_seq_params: documents of the row.

        Returns:
            [local tokens, heads * head_dim]; the caller adds the batch axis.
        """
        if packed_seq_params is None:
            raise ValueError("DocumentAttention needs packed_seq_params: "
                             "micro-batches are rows of packed documents")
        spans, shared, window = packed_seq_params.spans, packed_seq_params.shared, self.window_tokens
        varlen = supports_varlen(query)
        if not varlen and (
            length_groups := packed_seq_params.group_by_length(self.window_tokens)) is not None:
            return self._attend_by_length(query, key, value, length_groups).reshape(len(query), -1)
        if shared is not None:  # expand every document's keys; the kernel applies the window
            key, value, window = key.index_select(0, shared.source), value.index_select(0, shared.source), 0
        pieces = zip(query.chunk(len(spans)), self._gather_reachable_keys(key, value), spans, strict=True)
        outputs = []
        if varlen:
            for (queries, (keys, values, first), documents), bounds in zip(
                    pieces, packed_seq_params.get_piece_bounds(window), strict=True):
                # gathered keys may begin before the first key that the documents of this piece reach
                offset = find_first_keys(documents, window)[0] - first
                outputs.append(attend_documents(queries, keys[offset:], value=values[offset:], bounds=bounds,
                                                scale=self.softmax_scale, window_tokens=self.window_tokens))
        else:
            for queries, (keys, values, first), documents in pieces:
                outputs += attend_document_list(
                    list(_split_by_document(queries, keys, values=values, documents=documents,
                                            begins=find_first_keys(documents, window), first=first)),
                    self.softmax_scale, self.window_tokens)
        return torch.cat(outputs).reshape(len(query), -1)

    def _attend_by_length(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                          length_groups: LengthGroups) -> torch.Tensor:
        """Return [tokens, heads, head_dim], with one kernel call per document length."""
        queries = _permute_rows(query, length_groups.order, length_groups.inverse).split(
            [count * length for count, length, _ in length_groups.groups])
        if length_groups.keys is None:
            key, value = (_permute_rows(tensor, length_groups.order, length_groups.inverse)
                          for tensor in (key, value))
        else:
            key, value = (tensor.index_select(0, length_groups.keys) for tensor in (key, value))
        num_keys = [count * length for count, _, length in length_groups.groups]
        keys, values = key.split(num_keys), value.split(num_keys)
        outputs = [attend_equal_lengths(q.unflatten(0, (count, -1)), k.unflatten(0, (count, -1)),
                                        v.unflatten(0, (count, -1)), self.softmax_scale).flatten(0, 1)
                   for (count, _, _), q, k, v in zip(
                       length_groups.groups, queries, keys, values, strict=True)]
        return _permute_rows(outputs[0] if len(outputs) == 1 else torch.cat(outputs), length_groups.inverse,
                             length_groups.order)

    def _gather_reachable_keys(self, key: torch.Tensor,
                               value: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
        """Gather the keys and values that each local piece's queries reach.

        Args:
            key, value: [local tokens, kv_heads, head_dim].

        Returns:
            Per piece: keys and values [keys, kv_heads, head_dim] up to the end of the piece, and the row
            index of the first key.
        """
        if context.get_cp_size() == 1:
            return [(key, value, 0)]
        local = torch.stack([key, value], dim=1)
        pieces = context.get_local_pieces(len(local) * context.get_cp_size())
        length, tail = len(local) // 2, self.window_tokens - 1
        if not 0 <= tail <= length:
            # no window (tail -1), or one longer than a piece: gather the whole row, keys and values in one
            # message; gradients return to the process that owns the token
            row = context.gather_keys(local)
            return [(row[:end, 0], row[:end, 1], 0) for _, end in pieces]
        local_pieces = local.split(length)
        # the window reaches window - 1 tokens back, so only the end of every other piece is needed
        tails = (context.gather_keys(torch.cat([piece[length - tail:] for piece in local_pieces])) if tail
                 else local[:0])
        reachable = []
        for piece, (first, _) in zip(local_pieces, pieces, strict=True):
            piece_index = first // length
            # tails are in row order; the first piece has no tail before it
            tail_before = tails[max(0, piece_index - 1) * tail:piece_index * tail]
            keys_values = torch.cat([tail_before, piece])
            reachable.append((keys_values[:, 0], keys_values[:, 1], first - len(tail_before)))
        return reachable

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (),
                           metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return nothing: attention has no parameters."""
        return {}


@dataclass
class PackedDocuments(PackedSeqParams):
    """`PackedSeqParams` with a row's documents.

    For `DocumentAttention`, `max_seqlen_q` is the row length, so that Megatron-Core's rotary table
    covers every position. Megatron-Core's class has cumulative lengths on the device alone, and no shared
    prompts. Test: `test_attention.py::test_each_document_attends_to_itself_alone`."""

    bounds: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int32))
    """[documents + 1] int32 cumulative document lengths."""
    longest_tokens: int = 0
    """Longest document in tokens."""
    row_tokens: int = 0
    spans: list[list[Span]] = field(default_factory=list)
    """Documents, whole or in part, per local piece."""
    piece_bounds: dict[int, list[PieceBounds]] = field(default_factory=dict)
    """Window -> `PieceBounds` per local piece, cached by the first layer that needs the window."""
    length_groups: LengthGroups | None = None
    """Documents grouped by length, computed by the first layer that needs them."""
    shared: SharedPrompts | None = None
    """Prompts stored once for several documents. None: no shared prompts."""
    bucketed: bool = True
    """Whether lengths are rounded to powers of two, see `pack_documents`."""
    host_bounds: Sequence[int] | None = None
    """`bounds` on the host. None: copied from the device on first use."""

    @cached_property
    def chunks(self) -> DocumentChunks:
        """The whole row's documents as `DocumentChunks`, for linear attention."""
        if self.shared is not None:
            return chunk_documents(self.shared.spans, self.bounds.device)
        bounds = self.bounds.tolist() if self.host_bounds is None else self.host_bounds
        spans = [(begin, begin, end) for begin, end in pairwise(bounds) if end > begin]
        return chunk_documents(spans, self.bounds.device)

    @cached_property
    def unsplit(self) -> PackedDocuments:
        """The whole row's documents for `ExchangedAttention`."""
        return pack_documents(self.bounds, self.longest_tokens, self.row_tokens, own=False,
                              bucketed=self.bucketed)

    def get_piece_bounds(self, window_tokens: int) -> list[PieceBounds]:
        if window_tokens not in self.piece_bounds:
            self.piece_bounds[window_tokens] = compute_piece_bounds(self.spans, window_tokens,
                                                                    self.bounds.device)
        return self.piece_bounds[window_tokens]

    def group_by_length(self, window_tokens: int) -> LengthGroups | None:
        """Return the documents grouped by length, or None if context parallelism splits the row, a window
        cuts keys, or a mask would exceed QUERY_BLOCK ** 2."""
        longest = max(stop - start for start, _, stop in self.spans[0])
        if context.get_cp_size() > 1 or 0 < window_tokens < longest:
            return None
        if any((stop - first) * (stop - start) > QUERY_BLOCK ** 2 for start, first, stop in self.spans[0]
               if first > start):
            return None
        if self.length_groups is None:
            self.length_groups = _group_documents(self.spans[0], self.bounds.device, self.shared)
        return self.length_groups


def pack_documents(bounds: torch.Tensor, max_document_tokens: int, row_tokens: int, *, own: bool = True,
                   host_bounds: Sequence[int] | None = None, shared: SharedPrompts | None = None,
                   bucketed: bool = True) -> PackedDocuments:
    """Build `PackedDocuments` for a row.

    Args:
        bounds: [documents + 1] int32 cumulative lengths, from 0 to `row_tokens`.
        max_document_tokens: length of the longest document.
        row_tokens: length of the row.
        own: True: for `DocumentAttention`; False: for Megatron-Core's attention.
        host_bounds: `bounds` on the host. None: copied from the device, which makes the host wait.
        shared: shared prompts; requires `own` and no context parallelism.
        bucketed: round number and length of documents to powers of two for Megatron-Core. Its unfused
            attention allocates scores of documents x longest ** 2, which would grow up to eightfold.
    """
    if shared is not None:
        assert own and context.get_cp_size() == 1, "documents that share a prompt need attention of our own"
        return PackedDocuments(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds,
                               max_seqlen_q=row_tokens, max_seqlen_kv=row_tokens, bounds=bounds,
                               spans=[shared.spans], shared=shared)
    if not own:
        # Megatron-Core caches a rotary table per maximum length, and Transformer Engine selects its kernel
        # again if length or number of documents change: powers of two keep both rare. Empty documents at
        # the end fill the number up.
        longest, num_documents = max_document_tokens, len(bounds) - 1
        if bucketed:
            longest = min(_round_up_to_power_of_two(longest), row_tokens)
            num_documents = _round_up_to_power_of_two(num_documents)
        padded_bounds = pad(bounds, (0, num_documents + 1 - len(bounds)), value=row_tokens)
        return PackedDocuments(qkv_format="thd", cu_seqlens_q=padded_bounds, cu_seqlens_kv=padded_bounds,
                               max_seqlen_q=longest, max_seqlen_kv=longest, bounds=bounds,
                               host_bounds=host_bounds)
    bounds_list = bounds.tolist() if host_bounds is None else host_bounds
    documents = [(begin, stop) for begin, stop in pairwise(bounds_list) if stop > begin]
    spans = [[(begin, max(begin, first), min(stop, end)) for begin, stop in documents
              if begin < end and first < stop]
             for first, end in context.get_local_pieces(row_tokens)]
    return PackedDocuments(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds,
                           max_seqlen_q=row_tokens, max_seqlen_kv=row_tokens, bounds=bounds, spans=spans,
                           longest_tokens=max_document_tokens, row_tokens=row_tokens, bucketed=bucketed,
                           host_bounds=host_bounds)


@dataclass(frozen=True)
class SharedPrompts:
    """A row that stores a prompt shared by several documents once.

    Hidden states depend only on earlier tokens: one copy suffices, which attention reads per document."""

    source: torch.Tensor
    """[expanded tokens] int64: index in the packed row for the token or the token's stored copy."""
    spans: list[Span]
    """Documents in the expanded row: start, first stored token, end."""
    padding: torch.Tensor
    """[expanded tokens] bool, True for padding."""


@dataclass(frozen=True)
class LengthGroups:
    """A row's documents grouped by length, for one kernel call per length: with many short documents, a call
    per document would take most of the time."""

    order: torch.Tensor | None
    """[tokens] int64 row index per token in grouped order. None: the row is already grouped."""
    inverse: torch.Tensor | None
    """[tokens] int64 grouped position per row token."""
    groups: list[tuple[int, int, int]]
    """(documents, queries per document, keys per document) per group."""
    keys: torch.Tensor | None = None
    """[keys] int64 row index per key in grouped order, for shared prompts. None: same as `order`."""


@dataclass(frozen=True)
class PieceBounds:
    """Document bounds in a piece's queries and in the keys that the queries reach."""

    queries: torch.Tensor
    """[documents + 1] int32 cumulative lengths, on the device."""
    keys: torch.Tensor
    """[documents + 1] int32 cumulative lengths, on the device."""
    max_queries: int
    """Largest number of queries in a document."""
    max_keys: int
    """Largest number of keys in a document."""


def find_first_keys(documents: Sequence[Span], window_tokens: int) -> list[int]:
    """Return per document the row index of the first key within the window; `window_tokens` 0: no window."""
    return [max(start, first - window_tokens + 1) if window_tokens else start
            for start, first, _ in documents]


def compute_piece_bounds(spans: Sequence[Sequence[Span]], window_tokens: int,
                         device: torch.device) -> list[PieceBounds]:
    """Compute the bounds of the local pieces and copy them to the device in a single transfer."""
    lengths: list[list[int]] = []  # per piece: query lengths, then key lengths
    for documents in spans:
        first_keys = find_first_keys(documents, window_tokens)
        lengths.append([end - first_query for _, first_query, end in documents])
        lengths.append([end - key for key, (_, _, end) in zip(first_keys, documents, strict=True)])
    cumulative = [list(accumulate(piece_lengths, initial=0)) for piece_lengths in lengths]
    flat = torch.tensor([bound for piece_lengths in cumulative for bound in piece_lengths], dtype=torch.int32)
    on_device = to_device(flat, device)
    bounds = on_device.split([len(piece_lengths) for piece_lengths in cumulative])
    return [PieceBounds(bounds[i], bounds[i + 1], max(lengths[i]), max(lengths[i + 1]))
            for i in range(0, len(lengths), 2)]


def supports_varlen(query: torch.Tensor) -> bool:
    """Return whether torch's `varlen_attn` supports the query's device, dtype and head size."""
    return (query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
            and query.shape[-1] <= MAX_HEAD_DIM and query.shape[-1] % 8 == 0)


def attend_documents(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: PieceBounds,
                     scale: float, window_tokens: int) -> torch.Tensor:
    """Attend causally inside each document by torch's `varlen_attn`, in one call for all documents of a
    piece; the last query aligns with the last key.

    Tests replace the kernel by a plain torch version; a run on an H200 compared the kernel with a dense
    softmax.

    query [queries, heads, head_dim], key and value [keys, kv_heads, head_dim] -> [queries, heads, head_dim].

    Args:
        bounds: document bounds in queries and keys.
        scale: softmax scale.
        window_tokens: sliding window, current token included. 0: no window.
    """
    options: dict[str, Any] = {}
    group_size = query.shape[1] // key.shape[1]
    # a module-level import would take a second, for torch's compiler
    from torch.nn.attention import varlen

    if group_size > 1 and _accepts_grouped_heads(varlen.varlen_attn):
        options = {"enable_gqa": True}
    elif group_size > 1:
        key, value = (t.repeat_interleave(group_size, dim=1) for t in (key, value))
    # the log-sum-exp is returned only on request
    output: Any = varlen.varlen_attn(
        query, key, value, bounds.queries, bounds.keys, bounds.max_queries, bounds.max_keys, scale=scale,
        window_size=(window_tokens - 1, 0) if window_tokens else (-1, 0), **options)
    return output


@cache
def _accepts_grouped_heads(function: Any) -> bool:
    """Return whether `varlen_attn` accepts fewer key heads than query heads (not in torch 2.11)."""
    return "enable_gqa" in inspect.signature(function).parameters


def _permute_rows(values: torch.Tensor, order: torch.Tensor | None,
                  inverse: torch.Tensor | None) -> torch.Tensor:
    """Permute values [n, ...] by `order` [n]; `inverse` [n] is the inverse permutation."""
    output: torch.Tensor = values if order is None else _Permutation.apply(values, order, inverse)
    return output


class _Permutation(torch.autograd.Function):
    """Row permutation whose backward pass gathers by the inverse instead of a scatter-add."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order, inverse)
        return values.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Permutation.apply(gradient, inverse, order), None, None


def _group_documents(documents: Sequence[Span], device: torch.device,
                     shared: SharedPrompts | None) -> LengthGroups:
    """Group a row's documents by length as `LengthGroups`."""
    by_length: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    row_index = 0  # of a document's first query in the row
    for start, first, stop in documents:
        by_length[stop - first, stop - start].append((row_index, start))
        row_index += stop - first
    keys = None
    if shared is not None:
        key_rows = torch.cat([torch.arange(start, start + length)
                              for (_, length), starts in by_length.items() for _, start in starts])
        keys = shared.source[to_device(key_rows, device)]
    groups = [(len(starts), *lengths) for lengths, starts in by_length.items()]
    # equal lengths become contiguous: a group is a slice
    query_rows = [row_index for starts in by_length.values() for row_index, _ in starts]
    if query_rows == sorted(query_rows):  # for example a single document
        return LengthGroups(None, None, groups, keys)
    order = torch.cat([torch.arange(row_index, row_index + queries)
                       for (queries, _), starts in by_length.items() for row_index, _ in starts])
    return LengthGroups(to_device(order, device), to_device(order.argsort(), device), groups, keys)


def _round_up_to_power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def attend_document(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
                    window_tokens: int) -> torch.Tensor:
    """Attend from the last m tokens of a document with L tokens.

    query [m, heads, head_dim], key and value [L, kv_heads, head_dim] -> [m, heads, head_dim].

    Args:
        scale: softmax scale.
        window_tokens: sliding window, current token included. 0: no window.
    """
    m, total = len(query), len(key)
    is_sliding = 0 < window_tokens < total
    # a whole document needs no mask: the fused kernel has a causal flag, and blocks are unnecessary
    if m == total and not is_sliding:
        return attend_equal_lengths(query[None], key[None], value[None], scale)[0]
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))  # the fused kernels need a batch axis
    gqa = q.shape[1] != k.shape[1]
    blocks = []
    for start in range(0, m, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, m)
        # skip keys after the last query of the block
        first_key, end_key = 0, total - m + stop
        if is_sliding:
            first_key = max(0, total - m + start - window_tokens + 1)
            mask = _build_band_mask(stop - start, end_key - first_key, window_tokens, q.device)
        else:
            mask = _build_causal_mask(stop - start, end_key, q.device)
        keys = slice(first_key, end_key)
        attend = partial(scaled_dot_product_attention, attn_mask=mask, scale=scale, enable_gqa=gqa)
        block = q[:, :, start:stop], k[:, :, keys], v[:, :, keys]
        if is_sliding or q.is_cuda or not torch.is_grad_enabled():
            blocks.append(attend(*block))
        # without a fused kernel every block would save its mask, quadratic memory in the row length
        else:
            blocks.append(checkpoint(attend, *block, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(blocks, dim=2)[0].transpose(0, 1)


def attend_document_list(documents: Sequence[tuple[torch.Tensor, ...]], scale: float,
                         window_tokens: int) -> list[torch.Tensor]:
    """Apply `attend_document` to each (query, key, value); whole documents of a length share a call."""
    outputs: dict[int, torch.Tensor] = {}
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, (query, key, value) in enumerate(documents):
        if len(query) == len(key) and not 0 < window_tokens < len(key):
            by_length[len(key)].append(i)
        else:
            outputs[i] = attend_document(query, key, value, scale, window_tokens)
    for group in by_length.values():
        query, key, value = (torch.stack([documents[i][tensor] for i in group]) for tensor in range(3))
        outputs |= dict(zip(group, attend_equal_lengths(query, key, value, scale), strict=True))
    return [outputs[i] for i in range(len(documents))]


def attend_equal_lengths(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                         scale: float) -> torch.Tensor:
    """Attend causally by `scaled_dot_product_attention` in a batch with equal document lengths, without a
    window.

    query [documents, m, heads, head_dim], key and value [documents, L, kv_heads, head_dim] -> [documents, m,
    heads, head_dim]; the m queries align with the last m keys."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    same_length = q.shape[2] == k.shape[2]
    return scaled_dot_product_attention(
        q, k, v, attn_mask=None if same_length else _build_causal_mask(q.shape[2], k.shape[2], q.device),
        is_causal=same_length, scale=scale, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def _build_causal_mask(queries: int, keys: int, device: torch.device) -> Any:
    """Return a causal mask or bias whose last query aligns with the last key."""
    if device.type == "cpu":
        return _build_band_mask(queries, keys, keys, device)
    # materialized only without a fused kernel; its import takes a second, for torch's compiler
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(queries, keys)


def _build_band_mask(queries: int, keys: int, window_tokens: int, device: torch.device) -> torch.Tensor:
    """Return [queries, keys] bool, True inside the causal window; the last query aligns with the last key."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance >= 0) & (distance < window_tokens)


def _split_by_document(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
                       documents: Sequence[Span], begins: Sequence[int], first: int
                       ) -> Iterator[tuple[torch.Tensor, ...]]:
    """Split a piece into (queries, keys, values) per `Span`.

    Args:
        begins: row index of each document's first key.
        first: row index of `keys[0]`.
    """
    # split instead of slices: the backward pass then writes gradients once, without a zero-filled row per
    # document
    lengths = [begins[0] - first,
               *(stop - begin for begin, (_, _, stop) in zip(begins, documents, strict=True))]
    return zip(queries.split([stop - start for _, start, stop in documents]), keys.split(lengths)[1:],
               values.split(lengths)[1:], strict=True)
