"""State of a prompt during generation, and its spans in decoding rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from megatron_sov.base.documents.shard_files import RouteShape
from megatron_sov.engine.model.cache_rows import CacheSpan
from megatron_sov.infer.request import Sampling, StopRule
from megatron_sov.model.modality import EncoderInputs, hash_inputs, slice_inputs


@dataclass
class Continuation:
    """A prompt with its continuation so far."""

    index: int
    """Index of the prompt in the request."""
    tokens: list[int]
    """Prompt and continuation."""
    prompt_tokens: int
    """Length of the prompt."""
    limit: int
    """Limit of new tokens."""
    sampling: Sampling
    """Settings for choosing tokens."""
    stop: StopRule
    """Ends the continuation before `limit`."""
    stream: int
    """Random stream; determines the samples together with the seed."""
    encoder_inputs: EncoderInputs | None = None
    """Image and audio inputs of the prompt, relative to its first token."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each new token."""
    read: int = 0
    """Number of tokens in the cache."""
    drafts: list[int] = field(default_factory=list)
    """Drafted next tokens, not yet judged."""
    routes: list[tuple[int, np.ndarray]] = field(default_factory=list)
    """First token and routes [tokens, layers, top_k] of each span; for tokens read twice, the later routes
    count."""
    guesses: torch.Tensor | None = None
    """Distribution of each draft [drafts, V], on the last pipeline stage when sampling."""

    @cached_property
    def random(self) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.sampling.seed, self.stream]))

    @cached_property
    def prompt(self) -> bytes:
        """Key of the prompt for sharing its cache; empty if the prompt cannot be shared."""
        # The prediction layer's cache is not copied, and a prompt of one token has nothing to copy.
        if self.sampling.num_drafts or self.prompt_tokens == 1:
            return b""
        tokens = np.array(self.tokens[:self.prompt_tokens], np.int64).tobytes()
        # Placeholders of different images are the same tokens, so the encoder inputs are part of the key.
        return tokens + hash_inputs(self.encoder_inputs) if self.encoder_inputs else tokens

    def span(self, slot: int, count: int) -> CacheSpan:
        """Return the span of the next `count` tokens, with their encoder inputs."""
        return CacheSpan(slot, self.read, self.tokens[self.read:self.read + count],
                         slice_inputs(self.encoder_inputs, self.read, count) or None)

    @property
    def has_ended(self) -> bool:
        """The continuation reached `limit` or its stop rule."""
        written = self.tokens[self.prompt_tokens:]
        return bool(written) and (len(written) >= self.limit or self.stop.ends(written))

    @property
    def in_prompt(self) -> bool:
        """Some tokens of the prompt have not been read."""
        return self.read < self.prompt_tokens

    def join_routes(self, shape: RouteShape) -> np.ndarray:
        """Return the routes of all tokens except the last, which was not read."""
        rows = shape.absent(len(self.tokens) - 1)
        for first, span_routes in self.routes:
            # Later spans win: they replace the routes of rejected drafts.
            rows[first:first + len(span_routes)] = span_routes[:len(rows) - first]
        return rows


@dataclass
class RowItem:
    """Span of a sequence in a decoding row."""

    sequence: Continuation
    span: CacheSpan
    start: int
    """Row index of the first token."""

    @property
    def places(self) -> list[int]:
        """Row indices that predict a token: all in a decoding step, the last in the final span of a
        prompt."""
        end = self.start + len(self.span.tokens)
        # Decoding step: the newest token and each draft predict.
        if not self.sequence.in_prompt:
            return list(range(self.start, end))
        return [end - 1] if self.span.past + len(self.span.tokens) == self.sequence.prompt_tokens else []


def record_routes(items: Sequence[RowItem], routes: torch.Tensor) -> None:
    rows = routes.numpy()
    for item in items:
        count = len(item.span.tokens)
        item.sequence.routes.append((item.span.past, rows[item.start:item.start + count]))
