"""What a generator knows of a prompt that it continues, and of the part of it that a row reads."""

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
    """A prompt and what has been written behind it."""

    index: int
    """Place of the prompt in the list."""
    tokens: list[int]
    """Prompt and continuation."""
    prompt_tokens: int
    """Length of the prompt."""
    limit: int
    """Longest continuation."""
    sampling: Sampling
    """How its tokens are chosen."""
    stop: StopRule
    """What ends it before it is as long as allowed."""
    stream: int
    """Number of its stream of random numbers, which with the seed decides them."""
    encoder_inputs: EncoderInputs | None = None
    """Pictures and sounds that its prompt shows, placed from its first token; None: none."""
    logprobs: list[float] = field(default_factory=list)
    """Of each token of the continuation."""
    read: int = 0
    """Tokens that the cache holds."""
    drafts: list[int] = field(default_factory=list)
    """Tokens that may come next."""
    routes: list[tuple[int, np.ndarray]] = field(default_factory=list)
    """First token and routes [tokens, layers, top_k] of each span that was read; what was read twice went
    where it went the last time."""
    guesses: torch.Tensor | None = None
    """[drafts, V]: what each draft was drawn from; on the last pipeline stage, when sampling."""

    @cached_property
    def random(self) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.sampling.seed, self.stream]))

    @cached_property
    def prompt(self) -> bytes:
        """The prompt, by which those that have the same are found; empty: it is read by itself."""
        # of one token nothing is left to copy; the prediction layer has its own cache, which is written later
        if self.sampling.num_drafts or self.prompt_tokens == 1:
            return b""
        tokens = np.array(self.tokens[:self.prompt_tokens], np.int64).tobytes()
        # Placeholders of two pictures are the same tokens: what is shown is a part of the prompt.
        return tokens + hash_inputs(self.encoder_inputs) if self.encoder_inputs else tokens

    def span(self, slot: int, count: int) -> CacheSpan:
        """Return the next `count` tokens that are read, with the pictures and sounds that they stand for."""
        return CacheSpan(slot, self.read, self.tokens[self.read:self.read + count],
                         slice_inputs(self.encoder_inputs, self.read, count) or None)

    @property
    def has_ended(self) -> bool:
        """Whether it is as long as allowed, or something has ended it."""
        written = self.tokens[self.prompt_tokens:]
        return bool(written) and (len(written) >= self.limit or self.stop.ends(written))

    @property
    def in_prompt(self) -> bool:
        """Whether some of the prompt has not been read."""
        return self.read < self.prompt_tokens

    def all_routes(self, shape: RouteShape) -> np.ndarray:
        """Return the routes of every token but the last, which is not read."""
        rows = shape.absent(len(self.tokens) - 1)
        for first, found in self.routes:
            # Later spans win: of a refused draft, the routes of what took its place stay.
            rows[first:first + len(found)] = found[:len(rows) - first]
        return rows


@dataclass
class RowItem:
    """A span of a row."""

    sequence: Continuation
    span: CacheSpan
    start: int
    """Row index of its first token."""

    @property
    def places(self) -> list[int]:
        """Row indices behind which tokens are chosen: all of a step, the last of a prompt's last span."""
        end = self.start + len(self.span.tokens)
        # A step: every place predicts, the newest token's and each draft's.
        if not self.sequence.in_prompt:
            return list(range(self.start, end))
        return [end - 1] if self.span.past + len(self.span.tokens) == self.sequence.prompt_tokens else []


def keep_routes(items: Sequence[RowItem], routes: torch.Tensor) -> None:
    rows = routes.numpy()
    for item in items:
        count = len(item.span.tokens)
        item.sequence.routes.append((item.span.past, rows[item.start:item.start + count]))
