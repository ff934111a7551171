"""Compute a prompt once per micro-batch for all responses to the prompt (arXiv 2506.05433).

Attention is causal: the tokens before the first learned label of a document have equal hidden states in every
response to the prompt. Labels, weights and columns of the removed tokens carry no loss.
"""

import dataclasses
from itertools import accumulate, pairwise

import numpy as np
import torch

from megatron_sov.engine.model.attention import SharedPrompts, Span
from megatron_sov.engine.model.gpu_settings import KernelContext, uses_document_attention
from megatron_sov.engine.model.specs import PRECISION, uses_transformer_engine
from megatron_sov.engine.parallel.device import to_device
from megatron_sov.model.config import RunConfig
from megatron_sov.train.objectives.microbatch import MicroBatch
from megatron_sov.train.objectives.objective import GlobalBatch


def find_sharing_problem(config: RunConfig) -> list[str]:
    """List the settings that prevent sharing, with reasons; [] if `share_prompts` may remove prompts."""
    reasons = config.why_prompts_not_shared()
    place = KernelContext(uses_transformer_engine(PRECISION[config.train.precision]), config.model,
                          config.parallel)
    if not uses_document_attention(place, config.gpu.attention, config.train.deterministic):
        reasons.append(f"gpu.attention = {config.gpu.attention}: Transformer Engine needs whole documents")
    return reasons


def share_prompts(batch: GlobalBatch, config: RunConfig) -> GlobalBatch:
    """Remove repeated prompts from micro-batches with counted denominators, if `config` allows sharing."""
    if find_sharing_problem(config):
        return batch
    return dataclasses.replace(batch, micro_batches=tuple(map(remove_repeated_prompts, batch.micro_batches)))


def remove_repeated_prompts(batch: MicroBatch) -> MicroBatch:
    """Remove repeated prompts from `batch`, or return `batch` itself if no prompt repeats.

    Micro-batches with images stay whole: the placeholder tokens of two different images are equal.
    """
    host = batch.host
    if host.inputs.encoder_inputs:
        return batch
    source, is_retained = np.arange(len(host.labels)), np.ones(len(host.labels), bool)
    spans = _find_spans(host, source, is_retained)
    if is_retained.all() or host.inputs.routes is not None:
        return batch
    index = torch.from_numpy(is_retained.nonzero()[0])
    # Map positions in the original row to positions among the retained tokens.
    source = (is_retained.cumsum() - 1)[source]
    host_batch = _select_tokens(host, index, torch.from_numpy(source), spans)
    if batch.on_host is None:
        return host_batch
    device = batch.labels.device
    device_batch = _select_tokens(
        batch, to_device(index, device), to_device(torch.from_numpy(source), device), spans)
    return dataclasses.replace(device_batch, on_host=host_batch)


def _find_spans(host: MicroBatch, source: np.ndarray, is_retained: np.ndarray) -> list[Span]:
    """Return (start, first retained token, end) per document.

    Args:
        host: the micro-batch on the host.
        source: [tokens] int64; set here for repeated tokens: the position of the first occurrence.
        is_retained: [tokens] bool; set to False here for repeated tokens.
    """
    tokens, positions = host.inputs.tokens.numpy(), host.inputs.positions.numpy()
    is_learned = (host.weights > 0).numpy()
    first_starts: dict[tuple[int, bytes], int] = {}
    spans = []
    for start, stop in pairwise(host.inputs.cu_seqlens.tolist()):
        if start == stop:
            continue
        prompt_tokens = int(is_learned[start:stop].argmax())  # 0 for padding, which has no learned label
        # The position is part of the key: hidden states depend on positions.
        key = int(positions[start]), tokens[start:start + prompt_tokens].tobytes()
        first = first_starts.setdefault(key, start)
        if prompt_tokens and first != start:
            # The first document with the prompt retains the prompt tokens.
            source[start:start + prompt_tokens] = np.arange(first, first + prompt_tokens)
            is_retained[start:start + prompt_tokens] = False
            spans.append((start, start + prompt_tokens, stop))
        else:
            spans.append((start, start, stop))
    return spans


def _select_tokens(batch: MicroBatch, index: torch.Tensor, source: torch.Tensor, spans: list[Span]
                   ) -> MicroBatch:
    """Select the tokens at `index`, [retained tokens] int64; `source` and `spans` as in `SharedPrompts`."""
    inputs = batch.inputs
    bounds = list(accumulate((stop - first for _, first, stop in spans), initial=0))
    selected = dataclasses.replace(
        inputs, tokens=inputs.tokens[index], positions=inputs.positions[index],
        cu_seqlens=to_device(torch.tensor(bounds, dtype=torch.int32), inputs.tokens.device),
        padding=inputs.padding[index], host_bounds=bounds,
        shared=SharedPrompts(source, spans, inputs.padding))
    return dataclasses.replace(
        batch, inputs=selected, labels=batch.labels[index], weights=batch.weights[index],
        types=batch.types[index], sources=batch.sources[index],
        columns={name: column[index] for name, column in batch.columns.items()})
