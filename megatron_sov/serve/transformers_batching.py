"""A Hugging Face model that continues sequences as they come, by transformers' continuous batching.

transformers 5.24 draws all sequences from one stream of random numbers (`continuous_api.py`, `set_tp_seed`),
and reports the log-probability of the chosen token alone (`model_runner.py`, `_sample`).  A logits processor
gets each row of logits with its request, so `RequestSampler` chooses the tokens: a sample depends on its own
request and seed, and is drawn as our own decoder draws it.
"""

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
"""For a token, before requests are looked at again."""


@dataclass
class _LiveRequest:
    """A sequence that transformers continues."""

    joining: NewSequence
    random: np.random.Generator
    """Its stream, as `Continuation.random`."""
    sampled: deque[float] = field(default_factory=deque)
    """Log-probability of each token that was chosen and not told."""
    num_told: int = 0


class RequestSampler(ContinuousBatchingLogitsProcessor):
    """Choose the next token of each request and mask all others."""

    supported_kwargs = {"request": _LiveRequest}
    ignored_kwargs = ()

    def __init__(self) -> None:
        self._requests: list[_LiveRequest] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> torch.Tensor:
        """Take note of the requests whose logits come next, in the order of the rows."""
        self._requests = [one.state.logit_processor_kwargs["request"] for one in requests_with_new_token]
        return torch.zeros(len(self._requests), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Return logits [rows, V] that leave one token to each row."""
        samplings = [one.joining.sampling for one in self._requests]
        tokens = scores.argmax(dim=-1)
        logprobs = torch.log_softmax(scores.double(), dim=-1).gather(1, tokens[:, None])[:, 0]
        if drawn := [row for row, sampling in enumerate(samplings) if sampling.temperature]:
            shares = compute_distributions(scores[drawn], [samplings[row] for row in drawn])
            found = draw_tokens(shares, [self._requests[row].random.random() for row in drawn])
            tokens[drawn] = torch.tensor(found, device=tokens.device)
            logprobs[drawn] = shares.gather(1, tokens[drawn, None])[:, 0].log()
        for one, logprob in zip(self._requests, logprobs.tolist(), strict=True):
            one.sampled.append(logprob)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


@torch.no_grad()
def continue_transformers(model: Any, batching: Batching, longest: int, office: RequestSource) -> None:
    """Continue what the office asks for, until it orders the end.

    Args:
        model: as `load_hf` gives it.
        batching: what bounds memory.
        longest: tokens of the longest sequence, prompt and continuation.
        office: who asks.

    Raises:
        RuntimeError: transformers' thread ended, or gave up a request.
    """
    slots, pages, pass_tokens = compute_cache_sizes(batching.batch_size, longest, batching)
    # the sampler is called between the forward pass and the choice, in one order
    sizes = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS, num_blocks=pages, max_requests_per_batch=slots, max_batch_tokens=pass_tokens,
        use_async_batching=False, use_cuda_graph=False)
    asked = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    manager = model.init_continuous_batching(asked, sizes)
    manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([RequestSampler()]))
    manager.logit_processor.tensors_required = 1
    manager.start()
    live: dict[int, _LiveRequest] = {}
    try:
        while not (orders := office.choose_changes(slots - len(live), not live)).ends:
            for number in orders.leaving:
                if live.pop(number, None) is not None:
                    manager.cancel_request(str(number))
            for joining in orders.joining:
                live[joining.number] = _join(manager, joining)
            if live and (news := _next_tokens(manager, live)):
                office.report_tokens(news)
    finally:
        manager.stop(hard_stop=True)


def _join(manager: Any, joining: NewSequence) -> _LiveRequest:
    sampling = joining.sampling
    random = np.random.Generator(np.random.Philox(key=[sampling.seed, joining.stream]))
    request = _LiveRequest(joining, random)
    manager.add_request(list(joining.prompt), str(joining.number), sampling.max_new_tokens, streaming=True,
                        eos_token_id=list(joining.end_ids) or -1, request=request)
    return request


def _next_tokens(manager: Any, live: dict[int, _LiveRequest]) -> list[TokenEvent]:
    """Return the tokens that transformers has written; waits for some, and not for long."""
    outputs = [manager.get_result(timeout=WAIT_S)]
    while outputs[-1] is not None:
        outputs.append(manager.get_result(timeout=0))
    if len(outputs) == 1 and not manager.is_running():
        error = manager.background_thread_status.fatal_error
        raise RuntimeError("transformers' continuous batching has ended") from error
    news = []
    for output in outputs[:-1]:
        number = int(output.request_id)
        if (request := live.get(number)) is None:  # it has left
            continue
        if output.error is not None:
            raise RuntimeError(f"transformers' continuous batching gave a request up: {output.error}")
        for token in output.generated_tokens[request.num_told:]:
            news.append(_news(number, request, token))
        if news and news[-1].number == number and news[-1].reason is not None:
            del live[number]
    return news


def _news(number: int, request: _LiveRequest, token: int) -> TokenEvent:
    logprob = request.sampled.popleft()
    request.num_told += 1
    reason = None
    if token in request.joining.end_ids:
        reason = STOP
    elif request.num_told >= request.joining.sampling.max_new_tokens:
        reason = LENGTH
    return TokenEvent(number, token, logprob, reason)
