"""Asks held-out prompts of the policy that a run trains, every so many rounds, before the first and behind
the last one, and tells how it does under the run's own reward; and tells samples of responses.

Responses and rewards stand in a store of their own, RUN/validation, whose round r is by the policy that
writes round r of the training.  So a kill costs at most a piece, and what is told is not done again.  Random
numbers of a response follow from its prompt, and steps draw their own: training does not change by a bit.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from megatron_sov.base.errors import UserError
from megatron_sov.engine.parallel.world import on_main
from megatron_sov.eval.pass_at_k import JudgedItem
from megatron_sov.model.config import RolloutConfig
from megatron_sov.post.rl.responses import key_digest
from megatron_sov.post.rl.reward import NO_REWARD
from megatron_sov.rollouts.prompts import PromptList, sampling_digest
from megatron_sov.rollouts.rows import RewardRow, Rollout, domain_of
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs.obs.events import EVENTS, read_events
from megatron_sov.runs.obs.validation import RESPONSES, ROUND_SAMPLES, VALIDATION, format_validation
from megatron_sov.runs.rounds import Policy
from megatron_sov.train.stages.feed import FeedView

MAX_TABLES = 100
"""Of a run's rounds, and of its validations: those of which samples are told."""
MAX_SAMPLE_CHARACTERS = 2000
"""Of a prompt, and of a response, in a sample."""
_COLUMNS = ("record", "tokens", "versions", "finish_reason", "response")


@dataclass(frozen=True)
class SampledRounds:
    """Which responses of a store's rounds are told, and how many."""

    num_rows: int
    """Responses of a round; 0: none are told."""
    num_rounds: int
    """Of the run."""

    def tell(self, view: FeedView, store: RolloutStore, number: int, version: str, of: str = ROUND_SAMPLES
             ) -> None:
        """Tell samples of a round, where it is one of those that are told: the first of each prompt.

        Args:
            view: the run, whose events are written.
            store: has the responses.
            number: of the round, from 1.
            version: of the reward, or the beginning of it.
            of: what they are samples of.
        """
        every = -(-self.num_rounds // MAX_TABLES)
        if not self.num_rows or ((number - 1) % every and number != self.num_rounds):
            return
        kept: list[tuple[Rollout, RewardRow | None]] = []
        for here, rows, _ in store.pieces(store.parts(number), _COLUMNS):
            said = {} if version == NO_REWARD else store.judgements(version, here)
            kept += [(row, said.get((row.key, row.attempt))) for row in rows]
            if sum(not row.key.sample for row, _ in kept) >= self.num_rows:
                break
        kept.sort(key=lambda one: one[0].key.sample)  # stable: prompts stay in their order
        view.events.write(RESPONSES, step=view.step, of=of, round=number,
                          rows=[_sample(*one) for one in kept[:self.num_rows]])


def _sample(row: Rollout, said: RewardRow | None) -> dict[str, Any]:
    asked = row.record.get("messages", row.record.get("prompt", row.record))
    return {"prompt": _cut(asked if isinstance(asked, str) else json.dumps(asked, ensure_ascii=False)),
            "response": _cut(row.response), "reward": None if said is None else said.reward,
            "components": {} if said is None else dict(said.components), "tokens": row.num_written,
            "ended": row.finish_reason}


def _cut(text: str) -> str:
    more = len(text) - MAX_SAMPLE_CHARACTERS
    return text if more <= 0 else f"{text[:MAX_SAMPLE_CHARACTERS]} … ({more:,} more characters)"


@dataclass
class _Tally:
    """Of the responses of a validation, or of a domain of it."""

    judged: JudgedItem = field(default_factory=JudgedItem)
    tokens: list[int] = field(default_factory=list)
    components: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, row: Rollout, said: RewardRow, right_from: float) -> None:
        self.tokens.append(row.num_written)
        self.judged.add(row.key.prompt, {
            "status": said.status, "reward": said.reward, "components": said.components,
            "finish_reason": row.finish_reason}, right_from)
        if said.reward is not None:
            for name, value in said.components.items():
                self.components[name].append(value)

    def plain(self, *, is_judged: bool) -> dict[str, Any]:
        """Return the figures as JSON values; without a reward there are only those of lengths."""
        judged = self.judged
        has_reward = is_judged and any(prompt.num_scored for prompt in judged.prompts.values())
        figures = judged.figures() if has_reward else {}
        return {"num_prompts": len(judged.prompts), "num_samples": len(self.tokens),
                "statuses": dict(judged.statuses), "reward": figures.get("mean_reward"),
                "pass_at_k": figures.get("pass_at_k", []),
                "components": {name: fmean(values) for name, values in sorted(self.components.items())},
                "response_tokens": fmean(self.tokens), "truncated": judged.num_at_limit / judged.num_ended}


def validation_figures(store: RolloutStore, number: int, version: str, right_from: float) -> dict[str, Any]:
    """Return the figures of a validation, and of each domain that its prompts name.

    Args:
        store: has its responses, and their rewards.
        number: of its round.
        version: of the reward.
        right_from: least reward of a right response.
    """
    whole, domains, is_judged = _Tally(), defaultdict[str, _Tally](_Tally), version != NO_REWARD
    for here, rows, _ in store.pieces(store.parts(number), _COLUMNS):
        said = store.judgements(version, here)
        for row in rows:
            if (judged := said.get((row.key, row.attempt))) is not None:
                for tally in (whole, domains[domain_of(row.record)]):
                    tally.add(row, judged, right_from)
    return {"num_samples": 0} if not whole.tokens else {
        **whole.plain(is_judged=is_judged), "domains": {
            name: found.plain(is_judged=is_judged) for name, found in sorted(domains.items()) if name}}


class RoundProducer(Protocol):
    """Writes and judges rounds of a store: `feed.Producer`."""

    version: str
    """Of the reward."""

    @property
    def store(self) -> Callable[[], RolloutStore]:
        """Return what opens the store, or makes it."""
        ...

    def produce(self, view: FeedView, number: int, policy: Policy, asked_to_stop: Callable[[], bool]
                ) -> Mapping[str, float]:
        """Write and judge what is missing of a round; returns figures for its event."""
        ...

    def close(self) -> None:
        """End what is at work."""
        ...


def measured_by(prompts: PromptList, reward_version: str, rollout: RolloutConfig, chosen_by: dict[str, Any],
                right_from: float) -> dict[str, str]:
    """Return what the figures of a validation depend on beside its policy, each by its digest.

    Args:
        prompts: that are asked; their order decides nothing.
        reward_version: of the reward's code and settings.
        rollout: by which they are asked, of `RolloutConfig.of_validation`.
        chosen_by: what tokens are chosen by beside it, see `Writer`.
        right_from: least reward of a right response.
    """
    return {"prompts": sampling_digest({"ids": sorted(prompts.ids)}),
            "reward": sampling_digest({"version": reward_version, "right_from": right_from}),
            "sampling": sampling_digest({"samples": rollout.samples_per_prompt,
                                         "tokens": key_digest(rollout, 0, chosen_by)})}


@dataclass
class Validation:
    """Validates a run's policies; one object on each process, all of which call it together."""

    run: Path
    """The run's folder."""
    asking: RoundProducer
    """Writes and judges the rounds of its store."""
    rollout: RolloutConfig
    """Of the run."""
    num_responses: int
    """Of a validation."""
    right_from: float
    """Least reward of a right response."""
    samples: SampledRounds
    measured_by: Mapping[str, str]
    """What figures depend on beside the policy: prompts, reward and sampling, each by its digest."""
    _told: set[int] | None = None
    """Steps whose policies are validated; read on the first process."""
    _is_read: bool = False

    def validate(self, view: FeedView, number: int, policy: Policy, asked_to_stop: Callable[[], bool]
                 ) -> str | None:
        """Validate the policy that is to write a round, where that is due and not done.

        Args:
            view: the run, whose model is the policy.
            number: of the round, from 1; one more than there are: the last policy.
            policy: that the model is.
            asked_to_stop: looked at behind each piece and each part that is judged.

        Returns:
            None: it is done or not due; else why the run has to end first.

        Raises:
            UserError: earlier policies of the run were validated by something else.
        """
        # with the first round, due or not: nothing is trained whose curve would be of two sets
        if not self._is_read:
            on_main(view.world, self._read_told)
            self._is_read = True
        if not self._is_due(number) or on_main(view.world, partial(self._is_told, view.step)):
            return None
        seconds = self.asking.produce(view, number, policy, asked_to_stop)
        told: str | None = on_main(view.world, partial(self._tell, view, number, seconds))
        return told

    def _is_due(self, number: int) -> bool:
        every, trained = self.rollout.validation_every_rounds, number - 1
        return trained in (0, self.rollout.rounds) or (every > 0 and trained % every == 0)

    def _read_told(self) -> None:
        told = [event for event in read_events(self.run / EVENTS) if event["event"] == VALIDATION]
        for before in (event["measured_by"] for event in told[-1:] if "measured_by" in event):
            others = [what for what, digest in self.measured_by.items() if before.get(what) != digest]
            if others:
                raise UserError(f"{self.run}: its policies up to step {told[-1]['step']} were validated with "
                                f"other {' and '.join(others)}, and one curve would be of both; give those "
                                "again, leave --validation out, or begin another --run")
        # a resumed run is what it was at each step, so that its validations are too
        self._told = {event["step"] for event in told}

    def _is_told(self, step: int) -> bool:
        assert self._told is not None, "nobody has looked what is told"
        return step in self._told

    def _tell(self, view: FeedView, number: int, seconds: Mapping[str, float]) -> str | None:
        assert self._told is not None, "nobody has looked what is told"
        store, version = self.asking.store(), self.asking.version
        figures = validation_figures(store, number, version, self.right_from)
        if figures["num_samples"] < self.num_responses:
            return (f"asked to stop while validating the policy of step {view.step}: "
                    f"{figures['num_samples']:,} of {self.num_responses:,} responses are judged")
        # samples first: a kill between the two tells them again, and no figure is missing
        self.samples.tell(view, store, number, version, VALIDATION)
        view.events.write(VALIDATION, step=view.step, round=number, text=format_validation(figures),
                          measured_by=dict(self.measured_by), **figures, **seconds)
        self._told.add(view.step)
        return None
