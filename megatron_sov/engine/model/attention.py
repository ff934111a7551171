"""Core attention for packed documents, where Transformer Engine does not serve and wherever a row is
cut over processes.

The library's own local attention refuses packed sequences and context parallelism, and replaces a document
mask by the window mask on sliding layers, so documents would see each other.  Transformer Engine's context
parallelism wants every document padded to a multiple of twice the group's size and does not slide over cut
documents, so with `parallel.cp` > 1 this attention serves there, too, unless `gpu.attention` names another
(`specs.exchanged`).

Each document is attended on its own: on GPUs in 16 bits by one kernel for all of a piece
(`attend_documents`), else those of one length after those of another.  Queries stay where they are; keys and
values come to them by an all-gather over the context-parallel group (Llama 3, arXiv 2407.21783, section
3.3.2): those of the whole row for global attention, and only the last window - 1 of each piece for sliding
windows.
"""

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

from megatron_sov.engine.model.delta_rule import Chunks, chunk_documents
from megatron_sov.engine.parallel import context
from megatron_sov.engine.parallel.device import to_device

# Attention inside all documents of a piece of a row by one fused kernel: torch's flash attention for
# sequences of several lengths (`torch.nn.attention.varlen`).
#
# Bounds and call are tested against a double of the kernel in plain torch; on an H200 they were against a
# dense softmax.

MAX_HEAD_DIM = 256
"""Of torch's flash attention, which also wants multiples of 8."""

Span = tuple[int, int, int]
"""Row indices: start of a document, first query, end of the queries; the keys are those from
the start to the end."""


@dataclass(frozen=True)
class PieceBounds:
    """Where the documents of a piece lie in its queries, and in the keys that they reach."""

    queries: torch.Tensor
    """[documents + 1] int32: cumulative lengths, on the device."""
    keys: torch.Tensor
    """[documents + 1] int32."""
    max_queries: int
    """Most queries of a document."""
    max_keys: int
    """Most keys of a document."""


def first_keys(documents: Sequence[Span], window_tokens: int) -> list[int]:
    """Return the row index of each document's first key that a window reaches (0: no window)."""
    return [max(a, start - window_tokens + 1) if window_tokens else a for a, start, _ in documents]


def piece_bounds(spans: Sequence[Sequence[Span]], window_tokens: int,
                 device: torch.device) -> list[PieceBounds]:
    """Return the bounds of each local piece of a row, sent to the device together."""
    lengths: list[list[int]] = []  # of each piece those of queries, then those of keys
    for documents in spans:
        firsts = first_keys(documents, window_tokens)
        lengths.append([end - start for _, start, end in documents])
        lengths.append([end - first for first, (_, _, end) in zip(firsts, documents, strict=True)])
    flat = [list(accumulate(part, initial=0)) for part in lengths]
    sent = to_device(torch.tensor([bound for part in flat for bound in part], dtype=torch.int32), device)
    parts = sent.split([len(part) for part in flat])
    return [PieceBounds(parts[i], parts[i + 1], max(lengths[i]), max(lengths[i + 1]))
            for i in range(0, len(lengths), 2)]


def serves(query: torch.Tensor) -> bool:
    """Return whether the kernel takes such heads: 16 bits, on a GPU."""
    return (query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
            and query.shape[-1] <= MAX_HEAD_DIM and query.shape[-1] % 8 == 0)


def attend_documents(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: PieceBounds,
                     scale: float, window_tokens: int) -> torch.Tensor:
    """Attend inside each document, its last query standing at its last key: [queries, heads, head_dim],
    [keys, kv_heads, head_dim] -> [queries, heads, head_dim].

    Args:
        bounds: where the documents lie.
        scale: factor on the products of queries and keys.
        window_tokens: sliding window, the current token included; 0: every token before.
    """
    grouped: dict[str, Any] = {}
    groups = query.shape[1] // key.shape[1]
    # here: its import takes a second, for torch's compiler
    from torch.nn.attention import varlen

    if groups > 1 and _takes_grouped_heads(varlen.varlen_attn):
        grouped = {"enable_gqa": True}
    elif groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    # with its log-sums only where they are asked for
    attended: Any = varlen.varlen_attn(
        query, key, value, bounds.queries, bounds.keys, bounds.max_queries, bounds.max_keys, scale=scale,
        window_size=(window_tokens - 1, 0) if window_tokens else (-1, 0), **grouped)
    return attended


@cache
def _takes_grouped_heads(function: Any) -> bool:
    """Return whether keys may have fewer heads than queries, which torch 2.11 did not say."""
    return "enable_gqa" in inspect.signature(function).parameters


QUERY_BLOCK = 1024
"""Queries attended at a time where a mask is needed: it holds at most QUERY_BLOCK x (keys of the document up
to the last query) booleans, with a sliding window QUERY_BLOCK x (QUERY_BLOCK + window)."""


@dataclass(frozen=True)
class SharedPrompts:
    """A row whose documents begin with the same tokens, of which it holds each once: the answers to one
    prompt.  What a token becomes depends on those before it alone, so only attention needs them again."""

    source: torch.Tensor
    """[tokens of the whole row] int64: place of each token, or of the one that stands for it, in the row."""
    spans: list[Span]
    """The documents in the whole row: where each begins, its first token that is held, its end."""
    padding: torch.Tensor
    """[tokens of the whole row] bool, True where a token is padding."""


@dataclass(frozen=True)
class Alike:
    """The documents of a row by their length: of many short ones most of the time would be that of calls, and
    of cutting the row up and putting it together again."""

    order: torch.Tensor | None
    """[tokens] int64: row index of each token where documents of one length stand together; None: they do so
    in the row."""
    back: torch.Tensor | None
    """[tokens] int64: place of each of the row's tokens in that order."""
    groups: list[tuple[int, int, int]]
    """Number of the documents of each length, their queries and their keys, in that order."""
    keys: torch.Tensor | None = None
    """[keys] int64: row index of each key in that order, where documents share some; None: those of the
    queries."""


def _reordered(values: torch.Tensor, order: torch.Tensor | None, back: torch.Tensor | None) -> torch.Tensor:
    """[n, ...], [n], [n] -> [n, ...]."""
    found: torch.Tensor = values if order is None else _Reordered.apply(values, order, back)
    return found


class _Reordered(torch.autograd.Function):
    """Values in another order of the same places; the way back is the other index, nothing is added up."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, order: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        """[n, ...], [n], [n] -> [n, ...]."""
        ctx.save_for_backward(order, back)
        return values.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        order, back = ctx.saved_tensors
        return _Reordered.apply(gradient, back, order), None, None


@dataclass
class PackedDocuments(PackedSeqParams):
    """The documents of a row.

    Where `DocumentAttention` serves, the library makes angles for every place of the row, of which each token
    is given those of its position.
    """

    bounds: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int32))
    """[documents + 1] int32: cumulative lengths of the documents."""
    longest_tokens: int = 0
    """Length of the longest document."""
    row_tokens: int = 0
    """Length of the whole row."""
    spans: list[list[Span]] = field(default_factory=list)
    """For each local piece of the row its documents (parts of documents), in order."""
    piece_bounds: dict[int, list[PieceBounds]] = field(default_factory=dict)
    """Window -> the bounds of each local piece, made for the first layer that needs them."""
    alike: Alike | None = None
    """The row's documents by their length, made for the first layer that needs them."""
    shared: SharedPrompts | None = None
    """What documents share; None: each is there whole."""
    bucketed: bool = True
    """See `pack`."""
    padding: torch.Tensor | None = None
    """[1, local tokens] bool, True where a token is padding, for experts of a prediction layer; None: nobody
    asks."""
    host_bounds: Sequence[int] | None = None
    """`bounds` on the host; None: they are fetched where they are needed."""

    @cached_property
    def chunks(self) -> Chunks:
        """The documents of the whole row as linear attention takes them."""
        if self.shared is not None:
            return chunk_documents(self.shared.spans, self.bounds.device)
        bounds = self.bounds.tolist() if self.host_bounds is None else self.host_bounds
        return chunk_documents([(a, a, b) for a, b in pairwise(bounds) if b > a], self.bounds.device)

    @cached_property
    def whole(self) -> PackedDocuments:
        """The documents as the library's attention takes them where it has a whole row of some heads."""
        return pack(self.bounds, self.longest_tokens, self.row_tokens, own=False, bucketed=self.bucketed)

    def bounds_within(self, window_tokens: int) -> list[PieceBounds]:
        if window_tokens not in self.piece_bounds:
            self.piece_bounds[window_tokens] = piece_bounds(self.spans, window_tokens, self.bounds.device)
        return self.piece_bounds[window_tokens]

    def by_length(self, window_tokens: int) -> Alike | None:
        """Return the row's documents by their length, where no process has a part of one, no window cuts its
        keys, and no mask would be large; else None."""
        if context.size() > 1 or 0 < window_tokens < max(stop - start for start, _, stop in self.spans[0]):
            return None
        if any((stop - first) * (stop - start) > QUERY_BLOCK ** 2 for start, first, stop in self.spans[0]
               if first > start):
            return None
        if self.alike is None:
            self.alike = _alike(self.spans[0], self.bounds.device, self.shared)
        return self.alike


def _alike(documents: Sequence[Span], device: torch.device, shared: SharedPrompts | None) -> Alike:
    """Sort the documents of a row by their length."""
    by_length: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    place = 0  # of a document's first query in the row
    for start, first, stop in documents:
        by_length[stop - first, stop - start].append((place, start))
        place += stop - first
    keys = None if shared is None else shared.source[to_device(torch.cat([
        torch.arange(start, start + length) for (_, length), starts in by_length.items()
        for _, start in starts]), device)]
    groups = [(len(starts), *lengths) for lengths, starts in by_length.items()]
    # documents of one length next to one another, so that each group is one slice
    places = [place for starts in by_length.values() for place, _ in starts]
    if places == sorted(places):  # as where one document fills a row
        return Alike(None, None, groups, keys)
    order = torch.cat([torch.arange(place, place + queries) for (queries, _), starts in by_length.items()
                       for place, _ in starts])
    return Alike(to_device(order, device), to_device(order.argsort(), device), groups, keys)


def pack(bounds: torch.Tensor, max_document_tokens: int, row_tokens: int, *, own: bool = True,
         host_bounds: Sequence[int] | None = None, shared: SharedPrompts | None = None,
         bucketed: bool = True) -> PackedDocuments:
    """Return the documents of a row.

    Args:
        bounds: [documents + 1] int32, cumulative lengths, from 0 to `row_tokens`.
        max_document_tokens: length of the longest document.
        row_tokens: length of the row.
        own: whether `DocumentAttention` serves; else the parameters are those that the
            library's attention takes.
        host_bounds: the same numbers on the host; None: they are fetched, and the host waits for the device.
        shared: what documents share, where `DocumentAttention` serves and no row is cut.
        bucketed: whether the library's attention is told of few numbers and lengths; its unfused one makes
            scores of documents x longest ** 2, which would be up to eight times as many.
    """
    if shared is not None:
        assert own and context.size() == 1, "documents that share a prompt need attention of our own"
        return PackedDocuments(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds,
                               max_seqlen_q=row_tokens, max_seqlen_kv=row_tokens, bounds=bounds,
                               spans=[shared.spans], shared=shared)
    if not own:
        # the library keeps a table of angles for each length that it is told, and Transformer Engine one
        # decision about kernels, made anew where length or number of documents change: powers of two make
        # few; documents without tokens at the end fill the number up
        longest = min(_power_of_two(max_document_tokens), row_tokens) if bucketed else max_document_tokens
        number = _power_of_two(len(bounds) - 1) if bucketed else len(bounds) - 1
        filled = pad(bounds, (0, number + 1 - len(bounds)), value=row_tokens)
        return PackedDocuments(qkv_format="thd", cu_seqlens_q=filled, cu_seqlens_kv=filled,
                               max_seqlen_q=longest, max_seqlen_kv=longest, bounds=bounds,
                               host_bounds=host_bounds)
    documents = [(a, b) for a, b in pairwise(bounds.tolist() if host_bounds is None else host_bounds)
                 if b > a]
    spans = [[(a, max(a, first), min(b, end)) for a, b in documents if a < end and first < b]
             for first, end in context.pieces(row_tokens)]
    return PackedDocuments(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds,
                           max_seqlen_q=row_tokens, max_seqlen_kv=row_tokens, bounds=bounds, spans=spans,
                           longest_tokens=max_document_tokens, row_tokens=row_tokens, bucketed=bucketed,
                           host_bounds=host_bounds)


def _power_of_two(number: int) -> int:
    """Return the least that is not below the number."""
    return 1 << max(0, number - 1).bit_length()


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
           window_tokens: int) -> torch.Tensor:
    """Attend from the last m of L tokens of a document: [m, heads, head_dim], [L, kv_heads,
    head_dim] -> [m, heads, head_dim].

    Args:
        scale: factor on the products of queries and keys.
        window_tokens: sliding window, the current token included; 0: every token before.
    """
    m, total = len(query), len(key)
    slides = 0 < window_tokens < total
    # a whole document needs no mask: the fused kernel's own causal flag serves, and no block is cut
    if m == total and not slides:
        return attend_whole(query[None], key[None], value[None], scale)[0]
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))  # the fused kernels need a batch axis
    gqa = q.shape[1] != k.shape[1]
    blocks = []
    for start in range(0, m, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, m)
        # keys behind a block's last query are masked for all of it, so they are left out
        first_key, end_key = 0, total - m + stop
        if slides:
            first_key = max(0, total - m + start - window_tokens + 1)
            mask = _band(stop - start, end_key - first_key, window_tokens, q.device)
        else:
            mask = _causal(stop - start, end_key, q.device)
        keys = slice(first_key, end_key)
        attended = partial(scaled_dot_product_attention, attn_mask=mask, scale=scale, enable_gqa=gqa)
        part = q[:, :, start:stop], k[:, :, keys], v[:, :, keys]
        if slides or q.is_cuda or not torch.is_grad_enabled():
            blocks.append(attended(*part))
        # without a fused kernel every block would keep its mask, together as many numbers as the
        # row's length squared
        else:
            blocks.append(checkpoint(attended, *part, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(blocks, dim=2)[0].transpose(0, 1)


def attend_each(documents: Sequence[tuple[torch.Tensor, ...]], scale: float,
                window_tokens: int) -> list[torch.Tensor]:
    """Return what `attend` gives of each document's (query, key, value).

    Whole documents of one length go in one call: of many short ones most of the time is that of calls.
    """
    found: dict[int, torch.Tensor] = {}
    alike: dict[int, list[int]] = defaultdict(list)
    for i, (query, key, value) in enumerate(documents):
        if len(query) == len(key) and not 0 < window_tokens < len(key):
            alike[len(key)].append(i)
        else:
            found[i] = attend(query, key, value, scale, window_tokens)
    for group in alike.values():
        query, key, value = (torch.stack([documents[i][part] for i in group]) for part in range(3))
        found |= dict(zip(group, attend_whole(query, key, value, scale), strict=True))
    return [found[i] for i in range(len(documents))]


def attend_whole(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Attend from the last m of L tokens of documents of one length, every token before included: [documents,
    m, heads, head_dim], [documents, L, kv_heads, head_dim] twice -> [documents, m, heads, head_dim]."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    whole = q.shape[2] == k.shape[2]
    return scaled_dot_product_attention(
        q, k, v, attn_mask=None if whole else _causal(q.shape[2], k.shape[2], q.device),
        is_causal=whole, scale=scale, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def _causal(queries: int, keys: int, device: torch.device) -> Any:
    """Return what lets the last queries of a document see all keys before them."""
    if device.type == "cpu":
        return _band(queries, keys, keys, device)
    # becomes a mask only where no fused kernel serves; its import takes a second, for torch's compiler
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(queries, keys)


def _band(queries: int, keys: int, window_tokens: int, device: torch.device) -> torch.Tensor:
    """Return [queries, keys] bool, True where a query sees a key; the last query stands at the last key."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance >= 0) & (distance < window_tokens)


def _by_document(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, documents: Sequence[Span],
                 begins: Sequence[int], first: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Return the queries, keys and values of each document of a piece.

    Args:
        begins: row index of each document's first key.
        first: row index of the first of `keys`.
    """
    # split, not indexed: the backward pass then writes each gradient once, and not zeros of a whole row per
    # document
    lengths = [begins[0] - first,
               *(stop - begin for begin, (_, _, stop) in zip(begins, documents, strict=True))]
    return zip(queries.split([stop - start for _, start, stop in documents]), keys.split(lengths)[1:],
               values.split(lengths)[1:], strict=True)


class DocumentAttention(MegatronModule):
    """Causal attention inside each packed document, optionally within a sliding window.

    With `parallel.cp` > 1 the backward pass needs the gathered keys and values of every global layer, 2 x row
    tokens x key/value heads x head size per layer; `train.recompute` keeps one layer's at a time.
    """

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str,
                 attention_dropout: float | None = None, softmax_scale: float | None = None,
                 cp_comm_type: str | None = None, pg_collection: Any = None, window_tokens: int = 0) -> None:
        super().__init__(config=config)
        self.window_tokens = window_tokens
        self.softmax_scale = softmax_scale or config.kv_channels ** -0.5

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
                attn_mask_type: Any = None, attention_bias: None = None,
                packed_seq_params: PackedDocuments | None = None) -> torch.Tensor:
        """Attend.

        Args:
            query: [local tokens, heads, head_dim]; key, value: [local tokens, kv_heads, head_dim].
            packed_seq_params: the row's documents.

        Returns:
            [local tokens, heads * head_dim], to which the caller adds the batch axis.
        """
        if packed_seq_params is None:
            raise ValueError("DocumentAttention needs packed_seq_params: "
                             "micro-batches are rows of packed documents")
        spans, shared, window = packed_seq_params.spans, packed_seq_params.shared, self.window_tokens
        varlen = serves(query)
        if not varlen and (alike := packed_seq_params.by_length(self.window_tokens)) is not None:
            return self._of_whole_documents(query, key, value, alike).reshape(len(query), -1)
        if shared is not None:  # the keys of each document whole, one behind the other, whatever it sees
            key, value, window = key.index_select(0, shared.source), value.index_select(0, shared.source), 0
        pieces = zip(query.chunk(len(spans)), self._reachable(key, value), spans, strict=True)
        outputs = []
        if varlen:
            for (queries, (keys, values, first), documents), bounds in zip(
                    pieces, packed_seq_params.bounds_within(window), strict=True):
                # what was gathered may begin before the first key that any document of the piece reaches
                near = first_keys(documents, window)[0] - first
                outputs.append(attend_documents(queries, keys[near:], values[near:], bounds,
                                                self.softmax_scale, self.window_tokens))
        else:
            for queries, (keys, values, first), documents in pieces:
                outputs += attend_each(
                    list(_by_document(queries, keys, values, documents, first_keys(documents, window),
                                      first)),
                    self.softmax_scale, self.window_tokens)
        return torch.cat(outputs).reshape(len(query), -1)

    def _of_whole_documents(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                            alike: Alike) -> torch.Tensor:
        """Return [tokens, heads, head_dim], a call for each length."""
        queries = _reordered(query, alike.order, alike.back).split(
            [count * length for count, length, _ in alike.groups])
        if alike.keys is None:
            key, value = (_reordered(whole, alike.order, alike.back) for whole in (key, value))
        else:
            key, value = (whole.index_select(0, alike.keys) for whole in (key, value))
        num_keys = [count * length for count, _, length in alike.groups]
        keys, values = key.split(num_keys), value.split(num_keys)
        outputs = [attend_whole(q.unflatten(0, (count, -1)), k.unflatten(0, (count, -1)),
                                v.unflatten(0, (count, -1)), self.softmax_scale).flatten(0, 1)
                   for (count, _, _), q, k, v in zip(alike.groups, queries, keys, values, strict=True)]
        return _reordered(outputs[0] if len(outputs) == 1 else torch.cat(outputs), alike.back, alike.order)

    def _reachable(self, key: torch.Tensor,
                   value: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
        """Return for each local piece the keys and values that its queries may need,
        and the row index of the first.

        Args:
            key, value: [local tokens, kv_heads, head_dim].

        Returns:
            [keys, kv_heads, head_dim] each, ending with the last token of the piece.
        """
        if context.size() == 1:
            return [(key, value, 0)]
        local = torch.stack([key, value], dim=1)
        pieces = context.pieces(len(local) * context.size())
        length, tail = len(local) // 2, self.window_tokens - 1
        if not 0 <= tail <= length:
            # keys and values in one message; a gradient flows back to the process that holds the token
            row = context.gather_keys(local)
            return [(row[:end, 0], row[:end, 1], 0) for _, end in pieces]
        own = local.split(length)
        # a window reaches back one token less than its size, so of every other piece only its end is needed
        tails = (context.gather_keys(torch.cat([piece[length - tail:] for piece in own])) if tail
                 else local[:0])
        found = []
        for piece, (first, _) in zip(own, pieces, strict=True):
            number = first // length
            # tails come in row order, one for each piece: the one before this piece is number - 1, and the
            # first has none
            before = tails[max(0, number - 1) * tail:number * tail]
            near = torch.cat([before, piece])
            found.append((near[:, 0], near[:, 1], first - len(before)))
        return found

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (),
                           metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return nothing: attention itself has no state."""
        return {}

