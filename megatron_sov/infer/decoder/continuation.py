"""Generation state per prompt, and the spans that a prompt adds to decoding rows."""

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
    """A prompt and the tokens generated for it."""

    index: int
    """Prompt index in the request."""
    tokens: list[int]
    """Prompt and continuation."""
    prompt_tokens: int
    limit: int
    """`Sampling.max_new_tokens`."""
    sampling: Sampling
    """Settings for choosing tokens."""
    stop: StopRule
    """Ends the continuation before `limit`."""
    stream: int
    """Random stream; determines the samples together with the seed."""
    encoder_inputs: EncoderInputs | None = None
    """Image and audio inputs, relative to the first prompt token."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each new token."""
    read: int = 0
    """Tokens in the KV cache."""
    routes: list[tuple[int, np.ndarray]] = field(default_factory=list)
    """First token and routes [tokens, layers, top_k] per span; later routes of a token count."""

    @cached_property
    def random(self) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.sampling.seed, self.stream]))

    @cached_property
    def prompt(self) -> bytes:
        """Cache key that equal prompts share; empty if the cache cannot be shared."""
        if self.prompt_tokens == 1:  # nothing to copy
            return b""
        tokens = np.array(self.tokens[:self.prompt_tokens], np.int64).tobytes()
        # Placeholders of different images are the same tokens, so the encoder inputs are part of the key.
        return tokens + hash_inputs(self.encoder_inputs) if self.encoder_inputs else tokens

    def span(self, slot: int, count: int) -> CacheSpan:
        """Return the span for the next `count` tokens, with their encoder inputs."""
        return CacheSpan(slot, self.read, self.tokens[self.read:self.read + count],
                         slice_inputs(self.encoder_inputs, self.read, count) or None)

    @property
    def has_ended(self) -> bool:
        """Whether the continuation reached `limit` or its stop rule."""
        new_tokens = self.tokens[self.prompt_tokens:]
        return bool(new_tokens) and (len(new_tokens) >= self.limit or self.stop.is_met(new_tokens))

    @property
    def in_prompt(self) -> bool:
        """Whether prompt tokens remain to be read."""
        return self.read < self.prompt_tokens

    def join_routes(self, shape: RouteShape) -> np.ndarray:
        """Return the expert routes [tokens - 1, layers, top_k]; the last token, never read, has none."""
        rows = shape.build_unrecorded(len(self.tokens) - 1)
        for first, span_routes in self.routes:
            rows[first:first + len(span_routes)] = span_routes[:len(rows) - first]
        return rows


@dataclass
class RowItem:
    """Span that a sequence occupies in a decoding row."""

    sequence: Continuation
    span: CacheSpan
    start: int
    """Row index at which the span begins."""

    @property
    def predicts(self) -> bool:
        """Whether the last token predicts a new token: in a decoding step, and at the end of a prompt."""
        return (not self.sequence.in_prompt
                or self.span.past + len(self.span.tokens) == self.sequence.prompt_tokens)

    @property
    def last_index(self) -> int:
        """Row index of the last token of the span."""
        return self.start + len(self.span.tokens) - 1


def record_routes(items: Sequence[RowItem], routes: torch.Tensor) -> None:
    rows = routes.numpy()
    for item in items:
        count = len(item.span.tokens)
        item.sequence.routes.append((item.span.past, rows[item.start:item.start + count]))
