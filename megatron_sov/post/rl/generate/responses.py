"""Single-turn responses: prompts become rows with exactly the tokens that the engine generated."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_sov.base.documents import BadRecord, Conversation
from megatron_sov.base.documents.shard_files import merge_routes
from megatron_sov.base.errors import UserError
from megatron_sov.chat.marks import prepend_mark
from megatron_sov.infer.engine import Engine
from megatron_sov.infer.prompts import PromptEncoder
from megatron_sov.infer.request import GenerationBounds, GenerationResult, Sampling, StopRule
from megatron_sov.model.config.post_training import RolloutConfig
from megatron_sov.post.rl.generate.pieces import SampleAttempt, never_yield
from megatron_sov.rollouts.prompts import RolloutPrompt, compute_stream, sampling_digest
from megatron_sov.rollouts.rows import LENGTH, STOP, UNFINISHED, Key, Rollout

CHUNK_PROMPTS = 1024
"""Prompts per chunk in `measure_long_prompts`, to bound the memory."""
NO_TOKENS: dict[str, Any] = {
    "tokens": np.zeros(0, np.int32), "logprobs": np.zeros(0, np.float32), "versions": np.zeros(0, np.int32),
    "response": ""}
"""Fields for a response without tokens."""


@dataclass(frozen=True)
class GeneratedTokens:
    """Tokens that an engine appended to a row."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    reason: str
    """`STOP`, `LENGTH` or `UNFINISHED`."""
    versions: Sequence[int]
    """Policy step per token."""
    routes: np.ndarray | None
    """[tokens read, layers, K] experts of prompt and response but its last token; None: not requested."""


@dataclass(frozen=True)
class ResponseSource:
    """Generates responses for attempts. All processes of an engine call `write` together and get the rows."""

    encoder: PromptEncoder
    """Prompt encoder with the policies' tokenizer."""
    rollout: RolloutConfig
    engine_name: str
    plain: bool
    """Whether prompts are continued without the chat template."""
    chosen_by: dict[str, Any]
    """See `RolloutSource.chosen_by`."""
    clock_s: Callable[[], float] = time.monotonic
    with_routes: bool = False
    """Whether rows keep expert routes."""

    def measure_long_prompts(self, prompts: Sequence[RolloutPrompt]) -> dict[str, int]:
        """Return prompt id -> token count for prompts longer than `rollout.max_prompt_tokens`.

        All prompts are measured before the first round, because a run cannot replace a prompt of a late
        round. Raises `UserError`: a prompt is empty, the chat template rejects it, or all prompts are too
        long.
        """
        too_long: dict[str, int] = {}
        shortest: list[int] = []
        for first in range(0, len(prompts), CHUNK_PROMPTS):
            chunk = list(prompts[first:first + CHUNK_PROMPTS])
            ids = self.encoder.encode_prompts([self._read_prompt(prompt) for prompt in chunk])
            lengths = list(map(len, ids))
            self._check_not_empty(chunk, lengths)
            shortest.append(min(lengths))
            too_long |= {prompt.id: length for prompt, length in zip(chunk, lengths, strict=True)
                         if length > self.rollout.max_prompt_tokens}
        if len(too_long) == len(prompts):
            raise UserError(f"{prompts[0].option}: all {len(prompts):,} prompts have more tokens than "
                            f"rollout.max_prompt_tokens = {self.rollout.max_prompt_tokens:,}, the shortest "
                            f"{min(shortest):,}; raise it")
        return too_long

    def write(self, engine: Engine, attempts: Sequence[SampleAttempt],
              should_yield: Callable[[], bool] = never_yield) -> list[list[Rollout]]:
        """Generate the attempts' rows together; see `writers.RolloutSource.write`."""
        began_s, ends_s = time.time(), self.clock_s() + self.rollout.deadline_s
        pairs = [(attempt, row) for attempt in attempts
                 for row in attempt.unfinished or self._build_rows(attempt, began_s)]
        rows = [row for _, row in pairs]
        # The length limit counts the tokens of all attempts.
        limits = [self.rollout.max_new_tokens - len(row.tokens) for row in rows]
        options: dict[str, Any] = {}
        if self.rollout.deadline_s:
            # Engines without `GenerationBounds` serve runs without a deadline.
            options["bounds"] = GenerationBounds(limits, lambda: self.clock_s() >= ends_s or should_yield())
        sampling = build_sampling(self.rollout, max(limits), with_routes=self.with_routes)
        # The stream depends on the attempt: a continuation must not repeat earlier random numbers.
        streams = [compute_stream(row.round, row.key.prompt, row.key.sample, attempt.number)
                   for attempt, row in pairs]
        generated = engine.generate([[*row.prompt_tokens.tolist(), *row.tokens.tolist()] for row in rows],
                                    sampling, stop=StopRule(self.encoder.end_ids), streams=streams, **options)
        longer_rows = [(attempt, self._append_generated(row, generated, index, limits[index], attempt))
                       for index, (attempt, row) in enumerate(pairs)]
        return [[row for owner, row in longer_rows if owner is attempt] for attempt in attempts]

    def encode_prompt(self, prompt: RolloutPrompt) -> list[int]:
        return self._encode_prompts([prompt])[0]

    def begin(self, attempt: SampleAttempt) -> list[Rollout]:
        """Return an attempt's rows before the first token."""
        return list(attempt.unfinished) or self._build_rows(attempt, time.time())

    def build_row_sampling(self, row: Rollout) -> Sampling:
        """Return the sampling for the rest of a row: all attempts share `rollout.max_new_tokens`."""
        return build_sampling(self.rollout, self.rollout.max_new_tokens - len(row.tokens),
                              with_routes=self.with_routes)

    def append_tokens(self, row: Rollout, attempt: SampleAttempt, generated: GeneratedTokens) -> Rollout:
        tokens = np.concatenate([row.tokens, np.array(generated.tokens, np.int32)])
        return replace(
            row, attempt=attempt.number, tokens=tokens, finish_reason=generated.reason, ended_s=time.time(),
            # Rounding may leave log p of a certain token slightly above 0.
            logprobs=np.concatenate([row.logprobs, np.minimum(np.array(generated.logprobs, np.float32), 0)]),
            versions=np.concatenate([row.versions, np.array(generated.versions, np.int32)]),
            response=prepend_mark(self.encoder.decode(tokens.tolist()),
                                  self.encoder.opened_thoughts(row.prompt_tokens.tolist())),
            routes=merge_routes(row.routes, generated.routes, len(row.prompt_tokens) + len(tokens) - 1))

    def _append_generated(self, row: Rollout, generated: GenerationResult, index: int, limit: int,
                          attempt: SampleAttempt) -> Rollout:
        """Append continuation `index` of a batch, at most `limit` tokens, to a row."""
        # Engines without `GenerationBounds` generate up to the largest limit in the batch.
        tokens, logprobs = generated.continuations[index][:limit], generated.logprobs[index][:limit]
        reason = STOP if generated.finish_reasons[index] == STOP else LENGTH
        if len(generated.continuations[index]) > limit:
            reason = LENGTH
        # Shorter than the limit without a stop token: cut off by the deadline.
        elif reason == LENGTH and self.rollout.deadline_s and len(tokens) < limit:
            reason = UNFINISHED
        routes = None if generated.routes is None else generated.routes[index]
        return self.append_tokens(row, attempt, GeneratedTokens(
            tokens, logprobs, reason, [attempt.policy.step] * len(tokens), routes))

    def _build_rows(self, attempt: SampleAttempt, began_s: float) -> list[Rollout]:
        piece = attempt.piece
        ids = dict(zip((prompt.id for prompt in piece.prompts), self._encode_prompts(piece.prompts),
                       strict=True))
        rows = []
        for prompt, key in build_keys(attempt, self.rollout, self.chosen_by):
            rows.append(Rollout(
                key, piece.round, attempt=0, record=prompt.record,
                prompt_tokens=np.array(ids[prompt.id], np.int32), finish_reason=UNFINISHED,
                temperature=choose_logprob_temperature(self.rollout), engine=self.engine_name,
                began_s=began_s, ended_s=began_s, **NO_TOKENS))
        return rows

    def _encode_prompts(self, prompts: Sequence[RolloutPrompt]) -> list[list[int]]:
        ids = self.encoder.encode_prompts([self._read_prompt(prompt) for prompt in prompts])
        self._check_not_empty(prompts, list(map(len, ids)))
        return ids

    def _check_not_empty(self, prompts: Sequence[RolloutPrompt], lengths: Sequence[int]) -> None:
        for prompt, length in zip(prompts, lengths, strict=True):
            if not length:
                raise UserError(f"{prompt.option}: {prompt.place} is empty; write at least one character")

    def _read_prompt(self, prompt: RolloutPrompt) -> str | Conversation:
        text = prompt.record.get("prompt")
        if self.plain and isinstance(text, str):
            return text
        try:
            return prompt.conversation()
        except BadRecord as e:
            raise UserError(f"{prompt.option}: {prompt.place}: {e}") from None


def build_keys(attempt: SampleAttempt, rollout: RolloutConfig, chosen_by: dict[str, Any]
               ) -> list[tuple[RolloutPrompt, Key]]:
    """Return (prompt, key) per new response, ordered by prompt and sample."""
    sampling = compute_sampling_digest(rollout, attempt.piece.round, chosen_by)
    return [(prompt, Key(prompt.id, sample, attempt.policy.sha256, sampling))
            for prompt in attempt.piece.prompts for sample in range(rollout.samples_per_prompt)]


def choose_logprob_temperature(rollout: RolloutConfig) -> float:
    """Return the temperature for log-probabilities: `rollout.temperature`, or 1 for greedy sampling (0)."""
    return rollout.temperature or 1.0


def build_sampling(rollout: RolloutConfig, max_new_tokens: int, *, with_routes: bool) -> Sampling:
    """Return the engine's sampling; `RolloutConfig` checks which trainers may use top_p < 1."""
    return Sampling(max_new_tokens, rollout.temperature, top_p=rollout.top_p, seed=rollout.seed,
                    for_training=True, allow_truncation=rollout.top_p < 1, with_routes=with_routes)


def compute_sampling_digest(rollout: RolloutConfig, round: int, more: dict[str, Any]) -> str:
    """Return the sampling settings' digest for the keys in a round.

    Args:
        rollout: every setting that changes tokens; piece size and deadline do not.
        round: from 1.
        more: JSON values: chat template, environment and limits.
    """
    settings = dict(more)
    if rollout.top_p < 1:
        settings["top_p"] = rollout.top_p
    return sampling_digest({
        **settings, "round": round, "seed": rollout.seed, "temperature": rollout.temperature,
        "max_new_tokens": rollout.max_new_tokens, "max_prompt_tokens": rollout.max_prompt_tokens})
