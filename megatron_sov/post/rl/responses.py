"""What an engine wrote, token for token, as rows of responses; a deadline cuts them off anywhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_sov.base.documents import BadRecord, Conversation
from megatron_sov.base.documents.shard_files import joined_routes
from megatron_sov.base.errors import UserError
from megatron_sov.chat.marks import prepend_mark
from megatron_sov.infer.asking import Asker
from megatron_sov.infer.engine import Engine
from megatron_sov.infer.request import Bounds, Generated, Sampling, StopRule
from megatron_sov.model.config.post_training import RolloutConfig
from megatron_sov.post.rl.generate import SampleAttempt, never
from megatron_sov.rollouts.prompts import RolloutPrompt, budget_of, sampling_digest, stream_of
from megatron_sov.rollouts.rows import LENGTH, STOP, UNFINISHED, Key, Rollout

CHUNK_PROMPTS = 1024
"""Whose token ids are in memory at a time when all prompts are looked at."""
NO_TOKENS: dict[str, Any] = {
    "tokens": np.zeros(0, np.int32), "logprobs": np.zeros(0, np.float32), "versions": np.zeros(0, np.int32),
    "response": ""}
"""Of a response that has not begun."""


@dataclass(frozen=True)
class ResponseSource:
    """Writes attempts; called by all processes of an engine together, each of which gets all rows."""

    asker: Asker
    """Of the policies' tokenizer."""
    rollout: RolloutConfig
    engine_name: str
    """Told in the rows."""
    plain: bool
    """Whether prompts are continued as they are, without the chat template."""
    chosen_by: dict[str, Any]
    """What tokens are chosen by beside the settings of `rollout`, for the key."""
    clock_s: Callable[[], float] = time.monotonic
    """Which the deadline is on."""
    with_routes: bool = False
    """Whether rows keep which experts their tokens went to."""

    def too_long(self, prompts: Sequence[RolloutPrompt]) -> dict[str, int]:
        """Return the tokens of the prompts that are too long, by id, before the first is asked: one of a late
        round would end a run that takes neither other prompts nor another limit any more.

        Raises:
            UserError: one is empty, or the template refuses it; or all are too long.
        """
        found: dict[str, int] = {}
        shortest: list[int] = []
        for first in range(0, len(prompts), CHUNK_PROMPTS):
            chunk = list(prompts[first:first + CHUNK_PROMPTS])
            lengths = list(map(self._longest, chunk,
                               self.asker.ask([self._text(prompt) for prompt in chunk])))
            self._refuse_empty(chunk, lengths)
            shortest.append(min(lengths))
            found |= {prompt.id: length for prompt, length in zip(chunk, lengths, strict=True)
                      if length > self.rollout.max_prompt_tokens}
        if len(found) == len(prompts):
            raise UserError(f"{prompts[0].option}: all {len(prompts):,} prompts have more tokens than "
                            f"rollout.max_prompt_tokens = {self.rollout.max_prompt_tokens:,}, the shortest "
                            f"{min(shortest):,}; raise it")
        return found

    def write(self, engine: Engine, attempts: Sequence[SampleAttempt],
              gives_way: Callable[[], bool] = never) -> list[list[Rollout]]:
        """Return the rows of attempts that are written together, see `generate.Writer`.

        Raises:
            UserError: a prompt is too long, or the template refuses it.
        """
        began_s, ends_s = time.time(), self.clock_s() + self.rollout.deadline_s
        asked = [(attempt, row) for attempt in attempts
                 for row in attempt.begun or self._begin_rows(attempt, began_s)]
        rows = [row for _, row in asked]
        # The longest response is counted over all attempts at it.
        limits = [self.rollout.max_new_tokens - len(row.tokens) for row in rows]
        more: dict[str, Any] = {}
        if self.rollout.deadline_s:
            # Only with a deadline: engines without `Bounds` are asked without it.
            more["bounds"] = Bounds(limits, lambda: self.clock_s() >= ends_s or gives_way())
        sampling = sampling_of(self.rollout, max(limits), with_routes=self.with_routes)
        # By the attempt too: what goes on must not repeat the random numbers of its beginning.
        streams = [stream_of(row.round, row.key.prompt, row.key.sample, attempt.number)
                   for attempt, row in asked]
        found = engine.generate([[*row.prompt_tokens.tolist(), *row.tokens.tolist()] for row in rows],
                                sampling, stop=StopRule(self.asker.end_ids), streams=streams, **more)
        longer = [(attempt, self._longer(row, found, number, limits[number], attempt))
                  for number, (attempt, row) in enumerate(asked)]
        return [[row for its, row in longer if its is attempt] for attempt in attempts]

    def _begin_rows(self, attempt: SampleAttempt, began_s: float) -> list[Rollout]:
        piece = attempt.piece
        ids = dict(zip((prompt.id for prompt in piece.prompts), self._asked(piece.prompts), strict=True))
        return [Rollout(key, piece.round, 0, prompt.record,
                        np.array([*ids[prompt.id], *self._begins(prompt, key.sample)], np.int32),
                        finish_reason=UNFINISHED, temperature=distribution_of(self.rollout),
                        engine=self.engine_name, began_s=began_s, ended_s=began_s, **NO_TOKENS)
                for prompt, key in fresh_keys(attempt, self.rollout, self.chosen_by)]

    def _asked(self, prompts: Sequence[RolloutPrompt]) -> list[list[int]]:
        found = self.asker.ask([self._text(prompt) for prompt in prompts])
        self._refuse_empty(prompts, list(map(self._longest, prompts, found)))
        return found

    def _begins(self, prompt: RolloutPrompt, sample: int) -> list[int]:
        """Return the words with which a response begins that is told how long to be."""
        asked = budget_of(self.rollout, prompt.id, prompt.record, sample)
        if asked is None or not self.rollout.budget_text:
            return []
        return self.asker.encode(self.rollout.budget_text.replace("{tokens}", str(asked)))

    def _longest(self, prompt: RolloutPrompt, ids: Sequence[int]) -> int:
        """Return the tokens of a prompt, given its own, with the longest words that are put behind it."""
        size = self.rollout.samples_per_prompt // max(1, len(self.rollout.budgets_tokens))
        samples = range(0, self.rollout.samples_per_prompt, size)
        return len(ids) + (max(len(self._begins(prompt, sample)) for sample in samples) if len(ids) else 0)

    def _refuse_empty(self, prompts: Sequence[RolloutPrompt], lengths: Sequence[int]) -> None:
        for prompt, length in zip(prompts, lengths, strict=True):
            if not length:
                raise UserError(f"{prompt.option}: {prompt.place} is empty; write at least one character")

    def _text(self, prompt: RolloutPrompt) -> str | Conversation:
        text = prompt.record.get("prompt")
        if self.plain and isinstance(text, str):
            return text
        try:
            return prompt.conversation()
        except BadRecord as e:
            raise UserError(f"{prompt.option}: {prompt.place}: {e}") from None

    def _longer(self, row: Rollout, found: Generated, number: int, limit: int,
                attempt: SampleAttempt) -> Rollout:
        # an engine without `Bounds` is asked for the longest of all
        written, logprobs = found.continuations[number][:limit], found.logprobs[number][:limit]
        reason = STOP if found.finish_reasons[number] == STOP else LENGTH
        if len(found.continuations[number]) > limit:
            reason = LENGTH
        # Shorter than its limit and not stopped by a token: the deadline cut it off.
        elif reason == LENGTH and self.rollout.deadline_s and len(written) < limit:
            reason = UNFINISHED
        routes = None if found.routes is None else found.routes[number]
        return self.grown(row, attempt, WrittenTokens(
            written, logprobs, reason, [attempt.policy.step] * len(written), routes))

    def ids_of(self, prompt: RolloutPrompt) -> list[int]:
        return self._asked([prompt])[0]

    def begin(self, attempt: SampleAttempt) -> list[Rollout]:
        """Return the rows of an attempt as they are before it.

        Raises:
            UserError: a prompt is too long, or the template refuses it.
        """
        return list(attempt.begun) or self._begin_rows(attempt, time.time())

    def sampling_of(self, row: Rollout) -> Sampling:
        """Return how the rest of a row is asked for: the longest response is counted over all attempts."""
        return sampling_of(self.rollout, self.rollout.max_new_tokens - len(row.tokens),
                           with_routes=self.with_routes)

    def grown(self, row: Rollout, attempt: SampleAttempt, more: WrittenTokens) -> Rollout:
        """Return a row with what was written behind it."""
        tokens = np.concatenate([row.tokens, np.array(more.tokens, np.int32)])
        return replace(
            row, attempt=attempt.number, tokens=tokens, finish_reason=more.reason, ended_s=time.time(),
            # rounding may leave a certain token's a little above 0
            logprobs=np.concatenate([row.logprobs, np.minimum(np.array(more.logprobs, np.float32), 0)]),
            versions=np.concatenate([row.versions, np.array(more.versions, np.int32)]),
            response=prepend_mark(self.asker.decode(tokens.tolist()),
                                  self.asker.opened_thoughts(row.prompt_tokens.tolist())),
            routes=joined_routes(row.routes, more.routes, len(row.prompt_tokens) + len(tokens) - 1))


@dataclass(frozen=True)
class WrittenTokens:
    """What an engine has put behind a row."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    """Of each."""
    reason: str
    """`STOP`, `LENGTH` or `UNFINISHED`."""
    versions: Sequence[int]
    """Step of the policy that wrote each."""
    routes: np.ndarray | None
    """Of all that was read, prompt and row too; None: not asked for."""


def fresh_keys(attempt: SampleAttempt, rollout: RolloutConfig, chosen_by: dict[str, Any]
               ) -> list[tuple[RolloutPrompt, Key]]:
    """Return prompt and key of each response that begins in an attempt, by prompt and sample."""
    sampling = key_digest(rollout, attempt.piece.round, chosen_by)
    return [(prompt, Key(prompt.id, sample, attempt.policy.sha256, sampling))
            for prompt in attempt.piece.prompts for sample in range(rollout.samples_per_prompt)]


def distribution_of(rollout: RolloutConfig) -> float:
    """Return the temperature that the log-probabilities of responses belong to: where the most probable
    tokens are taken they are the model's own."""
    return rollout.temperature or 1.0


def sampling_of(rollout: RolloutConfig, max_new_tokens: int, *, with_routes: bool) -> Sampling:
    """Return how tokens are asked for; settings refuse a part of the distribution where a trainer compares
    with all of it."""
    return Sampling(max_new_tokens, rollout.temperature, top_p=rollout.top_p, seed=rollout.seed,
                    for_training=True, allow_truncation=rollout.top_p < 1, with_routes=with_routes)


def key_digest(rollout: RolloutConfig, round: int, more: dict[str, Any]) -> str:
    """Return what stands in the key of a round's responses for the settings that their tokens are chosen by.

    Args:
        rollout: of which the length of a piece and the deadline decide nothing.
        round: from 1.
        more: JSON values: chat template, environment and its limits.
    """
    told = {"budget_text": rollout.budget_text, "budgets_tokens": list(rollout.budgets_tokens)}
    return sampling_digest({
        **more, **(told if rollout.budget_text else {}),
        **({"top_p": rollout.top_p} if rollout.top_p < 1 else {}), "round": round, "seed": rollout.seed,
        "temperature": rollout.temperature, "max_new_tokens": rollout.max_new_tokens,
        "max_prompt_tokens": rollout.max_prompt_tokens})
