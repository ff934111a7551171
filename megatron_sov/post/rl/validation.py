"""Validates a run's policies on held-out prompts, and records sample responses.

A validation runs every `rollout.validation_every_rounds` rounds, before the first and after the last round.
Responses and rewards have a separate store, RUN/validation; its round r has the responses of the policy that
generates round r of the training. A killed run repeats at most a piece, and computes no recorded figure
again. The random numbers of a response depend on the prompt, so that validations leave the training
bit-identical.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.engine.parallel.world import run_on_main
from megatron_sov.eval.pass_at_k import ScoredResponses
from megatron_sov.model.config import RolloutConfig
from megatron_sov.post.rl.generate.live import LiveRollouts
from megatron_sov.post.rl.generate.responses import compute_sampling_digest
from megatron_sov.post.rl.reward import NO_REWARD
from megatron_sov.rollouts.prompts import PromptList, sampling_digest
from megatron_sov.rollouts.rows import RewardRow, Rollout, read_domain
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs.obs.events import EVENTS, read_events
from megatron_sov.runs.obs.validation import RESPONSES, ROUND_SAMPLES, VALIDATION, format_validation
from megatron_sov.runs.rounds import Policy
from megatron_sov.train.feed import FeedView

MAX_TABLES = 100
"""Limit for rounds, and for validations, with recorded samples (`SampledRounds`)."""
MAX_SAMPLE_CHARACTERS = 2000
"""Length limit for a prompt, and for a response, in a recorded sample."""
_COLUMNS = ("record", "tokens", "versions", "finish_reason", "response")


@dataclass(kw_only=True)
class Validation:
    """Validates a run's policies; every process has an object, and all processes call `validate` together.
    """

    run: Path
    rollouts: LiveRollouts
    """Generates and judges responses in RUN/validation."""
    rollout: RolloutConfig
    num_responses: int
    """Responses in a complete validation."""
    right_from: float
    """`policy.right_from`, the smallest reward of a right response."""
    samples: "SampledRounds"
    measured_by: Mapping[str, str]
    """Digests from `digest_conditions`: figures with other digests belong to another curve."""
    _recorded_steps: set[int] | None = None
    """Steps with a recorded validation, on rank 0."""
    _has_read_events: bool = False

    def validate(self, view: FeedView, number: int, policy: Policy, asked_to_stop: Callable[[], bool]
                 ) -> str | None:
        """Validate the policy that generates a round, if a validation is due and not recorded.

        Args:
            view: the run, whose model is the policy.
            number: number of the round, from 1; the number of rounds plus 1 stands for the last policy.
            policy: identity of the live weights.
            asked_to_stop: polled after each piece and each judged part.

        Returns:
            None if the validation is recorded or not due; otherwise the reason to end the run first.

        Raises:
            UserError: earlier validations used other prompts, another reward or other sampling settings.
        """
        # Checked before the first round, due or not: no training may continue a mixed curve.
        if not self._has_read_events:
            run_on_main(view.world, self._read_events)
            self._has_read_events = True
        if not self._is_due(number) or run_on_main(view.world, partial(self._is_recorded, view.step)):
            return None
        figures = self.rollouts.write(view, number, policy, asked_to_stop)
        figures |= self.rollouts.judge(view, number, asked_to_stop)
        reason: str | None = run_on_main(view.world, partial(self._record_figures, view, number, figures))
        return reason

    def _is_due(self, number: int) -> bool:
        every, trained = self.rollout.validation_every_rounds, number - 1
        return trained in (0, self.rollout.rounds) or (every > 0 and trained % every == 0)

    def _read_events(self) -> None:
        events = [event for event in read_events(self.run / EVENTS) if event["event"] == VALIDATION]
        if events and "measured_by" in events[-1]:
            earlier = events[-1]["measured_by"]
            changed = [name for name, digest in self.measured_by.items() if earlier.get(name) != digest]
            if changed:
                raise UserError(f"{self.run}: its policies up to step {events[-1]['step']} were validated "
                                f"with other {' and '.join(changed)}, and one curve would mix both; pass "
                                "the earlier ones, leave --validation out, or begin another --run")
        # A resumed run repeats steps bit for bit: recorded validations remain valid.
        self._recorded_steps = {event["step"] for event in events}

    def _is_recorded(self, step: int) -> bool:
        assert self._recorded_steps is not None, "events are not read"
        return step in self._recorded_steps

    def _record_figures(self, view: FeedView, number: int, seconds: Mapping[str, float]) -> str | None:
        assert self._recorded_steps is not None, "events are not read"
        store, version = self.rollouts.settings.store.open(), self.rollouts.reward.version
        figures = compute_figures(store, number, version, self.right_from)
        if figures["num_samples"] < self.num_responses:
            return (f"asked to stop while validating the policy of step {view.step}: "
                    f"{figures['num_samples']:,} of {self.num_responses:,} responses are judged")
        # Samples first: a kill between the two events repeats the samples and loses no figure.
        self.samples.record(view, store, number, version, VALIDATION)
        view.events.write(VALIDATION, step=view.step, round=number, text=format_validation(figures),
                          measured_by=dict(self.measured_by), **figures, **seconds)
        self._recorded_steps.add(view.step)
        return None


def digest_conditions(*, prompts: PromptList, reward_version: str, rollout: RolloutConfig,
                      chosen_by: dict[str, Any], right_from: float) -> dict[str, str]:
    """Return digests for `prompts`, `reward` and `sampling`, the conditions of a validation."""
    sampling = {"samples": rollout.samples_per_prompt,
                "tokens": compute_sampling_digest(rollout, 0, chosen_by)}
    return {"prompts": sampling_digest({"ids": sorted(prompts.ids)}),
            "reward": sampling_digest({"version": reward_version, "right_from": right_from}),
            "sampling": sampling_digest(sampling)}


def compute_figures(store: RolloutStore, number: int, version: str, right_from: float) -> dict[str, Any]:
    """Compute a validation's figures, over all prompts and per domain."""
    total, domains, is_judged = _Tally(), defaultdict[str, _Tally](_Tally), version != NO_REWARD
    for parts, rows, _ in store.iter_pieces(store.parts(number), _COLUMNS):
        judgements = store.read_judgements(version, parts)
        for row in rows:
            judgement = judgements.get((row.key, row.attempt))
            if judgement is not None:
                total.add(row, judgement, right_from)
                domains[read_domain(row.record)].add(row, judgement, right_from)
    if not total.tokens:
        return {"num_samples": 0}
    figures = total.to_json(is_judged=is_judged)
    figures["domains"] = {name: tally.to_json(is_judged=is_judged)
                          for name, tally in sorted(domains.items()) if name}
    return figures


@dataclass
class _Tally:
    """Sums over the responses in a validation or a domain."""

    judged: ScoredResponses = field(default_factory=ScoredResponses)
    tokens: list[int] = field(default_factory=list)
    components: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, row: Rollout, judgement: RewardRow, right_from: float) -> None:
        self.tokens.append(row.num_written)
        self.judged.add(row.key.prompt, {
            "status": judgement.status, "reward": judgement.reward, "components": judgement.components,
            "finish_reason": row.finish_reason}, right_from)
        if judgement.reward is not None:
            for name, value in judgement.components.items():
                self.components[name].append(value)

    def to_json(self, *, is_judged: bool) -> dict[str, Any]:
        """Return the figures as JSON values; only lengths if no reward `is_judged`."""
        judged = self.judged
        has_reward = is_judged and any(prompt.num_scored for prompt in judged.prompts.values())
        figures = judged.figures() if has_reward else {}
        return {"num_prompts": len(judged.prompts), "num_samples": len(self.tokens),
                "statuses": dict(judged.statuses), "reward": figures.get("mean_reward"),
                "pass_at_k": figures.get("pass_at_k", []),
                "components": {name: fmean(values) for name, values in sorted(self.components.items())},
                "response_tokens": fmean(self.tokens), "truncated": judged.num_at_limit / judged.num_ended}


@dataclass(frozen=True)
class SampledRounds:
    """Limits for the sample responses recorded as events `RESPONSES`."""

    num_rows: int
    """Responses per round; 0: record no samples."""
    num_rounds: int
    """Rounds in the run, of which about `MAX_TABLES` are recorded."""

    def record(self, view: FeedView, store: RolloutStore, number: int, version: str, kind: str = ROUND_SAMPLES
               ) -> None:
        """Record the first responses to `num_rows` prompts in a round, if the round is due."""
        every = -(-self.num_rounds // MAX_TABLES)
        if not self.num_rows or ((number - 1) % every and number != self.num_rounds):
            return
        samples: list[tuple[Rollout, RewardRow | None]] = []
        for parts, rows, _ in store.iter_pieces(store.parts(number), _COLUMNS):
            judgements = {} if version == NO_REWARD else store.read_judgements(version, parts)
            samples += [(row, judgements.get((row.key, row.attempt))) for row in rows]
            if sum(not row.key.sample for row, _ in samples) >= self.num_rows:
                break
        samples.sort(key=lambda sample: sample[0].key.sample)  # stable: prompts keep their order
        view.events.write(RESPONSES, step=view.step, of=kind, round=number,
                          rows=[_format_sample(*sample) for sample in samples[:self.num_rows]])


def _format_sample(row: Rollout, judgement: RewardRow | None) -> dict[str, Any]:
    prompt = row.record.get("messages", row.record.get("prompt", row.record))
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
    return {"prompt": _shorten_text(text), "response": _shorten_text(row.response),
            "reward": None if judgement is None else judgement.reward,
            "components": {} if judgement is None else dict(judgement.components),
            "tokens": row.num_written, "ended": row.finish_reason}


def _shorten_text(text: str) -> str:
    more = len(text) - MAX_SAMPLE_CHARACTERS
    return text if more <= 0 else f"{text[:MAX_SAMPLE_CHARACTERS]} … ({more:,} more characters)"
