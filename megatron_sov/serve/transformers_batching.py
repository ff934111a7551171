"""Generate with a Hugging Face model through transformers' continuous batching.

transformers 5.24 draws every sequence from one random stream (`continuous_api.py`, `set_tp_seed`), and
reports only the chosen token's log-probability (`model_runner.py`, `_sample`). `RequestSampler`, a logits
processor that receives each row of logits with its request, therefore chooses the tokens: a sample depends on
its request and seed alone, as in our own decoder. """

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor, ContinuousBatchingLogitsProcessorList)

from megatron_sov.infer.decoder.generator import compute_distributions
from megatron_sov.infer.decoder.sampling import draw_tokens
from megatron_sov.infer.engines.live_generation import NewSequence, RequestSource, TokenEvent
from megatron_sov.infer.engines.transformers_engine import PAGE_TOKENS, compute_cache_sizes
from megatron_sov.infer.request import LENGTH, STOP, Batching

WAIT_S = 0.1
"""Longest wait for a token before looking at new requests."""


@dataclass
class _ActiveSequence:
    """A sequence in transformers' batch."""

    sequence: NewSequence
    random: np.random.Generator
    """Random stream, as `Continuation.random`."""
    logprobs: deque[float] = field(default_factory=deque)
    """Log-probabilities of sampled tokens that are not reported yet."""
    num_reported: int = 0


@torch.no_grad()
def run_transformers_batching(model: Any, batching: Batching, max_length: int, source: RequestSource) -> None:
    """Generate the source's sequences until the source ends the generation.

    Args:
        model: from `load_hf`.
        batching: memory limits.
        max_length: longest prompt with its continuation, in tokens.
        source: decides which sequences join and leave.

    Raises:
        RuntimeError: transformers' thread ended, or failed a request.
    """
    slots, pages, pass_tokens = compute_cache_sizes(batching.batch_size, max_length, batching)
    # synchronous: the sampler must run between the forward pass and the choice
    sizes = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS, num_blocks=pages, max_requests_per_batch=slots, max_batch_tokens=pass_tokens,
        use_async_batching=False, use_cuda_graph=False)
    generation_config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    manager = model.init_continuous_batching(generation_config, sizes)
    manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([RequestSampler()]))
    manager.logit_processor.tensors_required = 1
    manager.start()
    active: dict[int, _ActiveSequence] = {}
    try:
        while not (changes := source.choose_changes(slots - len(active), not active)).ends:
            for number in changes.leaving:
                if active.pop(number, None) is not None:
                    manager.cancel_request(str(number))
            for sequence in changes.joining:
                active[sequence.number] = _add_request(manager, sequence)
            if active and (events := _read_tokens(manager, active)):
                source.report_tokens(events)
    finally:
        manager.stop(hard_stop=True)


class RequestSampler(ContinuousBatchingLogitsProcessor):
    """Sample each request's next token, and mask every other token."""

    supported_kwargs = {"request": _ActiveSequence}
    ignored_kwargs = ()

    def __init__(self) -> None:
        self._rows: list[_ActiveSequence] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> torch.Tensor:
        """Record the requests in the order of the next logits."""
        self._rows = [request.state.logit_processor_kwargs["request"] for request in requests_with_new_token]
        return torch.zeros(len(self._rows), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Return logits [rows, vocab] that allow one token per row."""
        samplings = [row.sequence.sampling for row in self._rows]
        tokens = scores.argmax(dim=-1)
        logprobs = torch.log_softmax(scores.double(), dim=-1).gather(1, tokens[:, None])[:, 0]
        if sampled := [i for i, sampling in enumerate(samplings) if sampling.temperature]:
            distributions = compute_distributions(scores[sampled], [samplings[i] for i in sampled])
            drawn = draw_tokens(distributions, [self._rows[i].random.random() for i in sampled])
            tokens[sampled] = torch.tensor(drawn, device=tokens.device)
            logprobs[sampled] = distributions.gather(1, tokens[sampled, None])[:, 0].log()
        for row, logprob in zip(self._rows, logprobs.tolist(), strict=True):
            row.logprobs.append(logprob)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def _add_request(manager: Any, sequence: NewSequence) -> _ActiveSequence:
    sampling = sequence.sampling
    random = np.random.Generator(np.random.Philox(key=[sampling.seed, sequence.stream]))
    request = _ActiveSequence(sequence, random)
    manager.add_request(list(sequence.prompt), str(sequence.number), sampling.max_new_tokens, streaming=True,
                        eos_token_id=list(sequence.end_ids) or -1, request=request)
    return request


def _read_tokens(manager: Any, active: dict[int, _ActiveSequence]) -> list[TokenEvent]:
    """Return the new tokens, waiting up to `WAIT_S`; finished sequences leave `active`."""
    outputs = [manager.get_result(timeout=WAIT_S)]
    while outputs[-1] is not None:
        outputs.append(manager.get_result(timeout=0))
    if len(outputs) == 1 and not manager.is_running():
        error = manager.background_thread_status.fatal_error
        raise RuntimeError("transformers' continuous batching has ended") from error
    events = []
    for output in outputs[:-1]:
        number = int(output.request_id)
        if (request := active.get(number)) is None:  # cancelled
            continue
        if output.error is not None:
            raise RuntimeError(f"transformers' continuous batching failed a request: {output.error}")
        for token in output.generated_tokens[request.num_reported:]:
            events.append(_build_event(number, request, token))
        if events and events[-1].number == number and events[-1].reason is not None:
            del active[number]
    return events


def _build_event(number: int, request: _ActiveSequence, token: int) -> TokenEvent:
    logprob = request.logprobs.popleft()
    request.num_reported += 1
    reason = None
    if token in request.sequence.end_ids:
        reason = STOP
    elif request.num_reported >= request.sequence.sampling.max_new_tokens:
        reason = LENGTH
    return TokenEvent(number, token, logprob, reason)
