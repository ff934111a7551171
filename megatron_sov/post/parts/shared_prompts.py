"""A group's responses begin with the same prompt, of which a micro-batch needs one (arXiv 2506.05433).

What a token becomes depends on it and those before it alone, so the tokens of a document before its first
learned label are the same numbers in every response to the prompt.  Labels, weights and columns of what is
left out are those of nothing that is learned.
"""

from __future__ import annotations

import dataclasses
from itertools import accumulate, pairwise

import numpy as np
import torch

from megatron_sov.config import RunConfig
from megatron_sov.mcore.model.attention import SharedPrompts
from megatron_sov.mcore.model.gpu_settings import own_attention_serves
from megatron_sov.mcore.model.specs import PRECISION, uses_transformer_engine
from megatron_sov.mcore.model.varlen import Span
from megatron_sov.mcore.parallel.device import to_device
from megatron_sov.train.microbatch import MicroBatch


def can_share(config: RunConfig) -> bool:
    """Return whether a run's rows may hold prompts once: no row is cut over processes, nothing is predicted
    further ahead, left out by lot or rounded in blocks of tokens, no route is replayed (of a prompt each
    response has its own), rows may have other lengths than those of other processes, and the attention is
    ours."""
    layout, train = config.parallel, config.train
    te = uses_transformer_engine(PRECISION[train.precision])
    return (config.policy.share_prompts and layout.tp == layout.pp == layout.cp == 1
            and (layout.ep * layout.etp == 1 or layout.expert_dispatcher == "alltoall")
            and not config.model.num_mtp_layers and not train.hidden_dropout and train.fp8 == "none"
            and not config.policy.router_replay
            and own_attention_serves(te, layout.cp, config.gpu.attention,
                                     capped=config.model.attention_softcap is not None))


def sharing_prompts(batch: MicroBatch) -> MicroBatch:
    """Return a micro-batch without what is in it more than once; without such a thing the same.

    Placeholders of two pictures are the same tokens, so a row that has any is left as it is.
    """
    host = batch.host
    if host.inputs.media:
        return batch
    source, kept = np.arange(len(host.labels)), np.ones(len(host.labels), bool)
    spans = _spans(host, source, kept)
    if kept.all() or host.inputs.routes is not None:
        return batch
    index = torch.from_numpy(kept.nonzero()[0])
    source = (kept.cumsum() - 1)[source]
    found = _only(host, index, torch.from_numpy(source), spans)
    if batch.on_host is None:
        return found
    device = batch.labels.device
    return dataclasses.replace(
        _only(batch, to_device(index, device), to_device(torch.from_numpy(source), device), spans),
        on_host=found)


def _spans(host: MicroBatch, source: np.ndarray, kept: np.ndarray) -> list[Span]:
    """Return where each document begins, its first token that is kept, and its end.

    Args:
        host: the micro-batch on the host.
        source: [tokens]: gets the place of the token that stands for each.
        kept: [tokens] bool: gets False for those that another one stands for.
    """
    tokens, positions = host.inputs.tokens.numpy(), host.inputs.positions.numpy()
    is_learned = (host.weights > 0).numpy()
    begun: dict[tuple[int, bytes], int] = {}
    spans = []
    for start, stop in pairwise(host.inputs.cu_seqlens.tolist()):
        if start == stop:
            continue
        prompt = int(is_learned[start:stop].argmax())  # 0 where nothing is learned, as of padding
        first = begun.setdefault((int(positions[start]), tokens[start:start + prompt].tobytes()), start)
        if prompt and first != start:
            source[start:start + prompt] = np.arange(first, first + prompt)
            kept[start:start + prompt] = False
            spans.append((start, start + prompt, stop))
        else:
            spans.append((start, start, stop))
    return spans


def _only(batch: MicroBatch, index: torch.Tensor, source: torch.Tensor, spans: list[Span]) -> MicroBatch:
    """Return a micro-batch of some of its tokens.

    Args:
        index: [kept tokens] int64: which.
        source: see `SharedPrompts`.
        spans: see `SharedPrompts`.
    """
    inputs = batch.inputs
    bounds = list(accumulate((stop - first for _, first, stop in spans), initial=0))
    return dataclasses.replace(
        batch,
        inputs=dataclasses.replace(
            inputs, tokens=inputs.tokens[index], positions=inputs.positions[index],
            cu_seqlens=to_device(torch.tensor(bounds, dtype=torch.int32), inputs.tokens.device),
            padding=inputs.padding[index], host_bounds=bounds,
            shared=SharedPrompts(source, spans, inputs.padding)),
        labels=batch.labels[index], weights=batch.weights[index], types=batch.types[index],
        sources=batch.sources[index],
        columns={name: column[index] for name, column in batch.columns.items()})
