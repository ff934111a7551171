"""What an optimizer step of reinforcement learning has learned from: its responses, what they were worth, who
wrote and judged them, and how large a part of the step each was."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.base.artifacts import damaged_files, read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import RunConfig
from megatron_sov.post.rl.publish import is_published
from megatron_sov.post.rl.reward import NO_REWARD
from megatron_sov.rollouts.rows import UNFINISHED, RewardRow, Rollout, domain_of
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs.checkpoints import refuse_missing
from megatron_sov.runs.folder import ROUNDS, RunFolder
from megatron_sov.runs.obs.events import final_steps, read_events
from megatron_sov.train.data.rounds import ADVANTAGE, BEHAVIOUR, Round, RoundDocuments, folder_of_round

FIELDS = ("record", "prompt_tokens", "tokens", "logprobs", "versions", "finish_reason", "response")


@dataclass(frozen=True)
class LearnedResponse:
    """A response of a step."""

    part: str
    """Part of the store that it stands in."""
    row: int
    """In that part, from 0."""
    prompt: str
    """Digest of the prompt."""
    sample: int
    domain: str
    versions: tuple[int, int]
    """First and last optimizer step of the weights that wrote it."""
    num_tokens: int
    """That policies wrote."""
    reward: float | None
    components: Mapping[str, float]
    group_rewards: tuple[float, ...]
    """Of all judged responses to the prompt."""
    advantage: float | None
    """None: the run learns from no reward."""
    share: float | None
    """Of the step, with the advantage's sign (`shares`); None: see `ExplainedStep.no_shares`."""
    response: str


@dataclass(frozen=True)
class ExplainedStep:
    """A step, and what it has learned from."""

    step: int
    round: int
    step_of_round: int
    """From 1."""
    reward_version: str
    policies: tuple[str, ...]
    """Digests of the weights that began the round's responses."""
    groups: Mapping[str, int]
    """Of the round: "learns", or why its responses are not learned -> groups."""
    recorded: Mapping[str, Any]
    """The step's event; empty: it is not learned, or was taken back."""
    loss_at_start: float | None
    """Policy loss where no ratio has moved, which the first step of a round has, but for what a correction of
    an engine's numbers weighs."""
    no_shares: str
    """Why responses have no share, and the step no such loss; empty: they have."""
    responses: tuple[LearnedResponse, ...]
    """Those of the largest part first."""


def explain(run: Path, step: int, store: Path) -> ExplainedStep:
    """Return what a step has learned from.

    Args:
        run: of reinforcement learning.
        step: optimizer step, from 1.
        store: of its responses.

    Raises:
        UserError: it is no such run or step, a file of the round is not what was learned, or the store has
            other responses or rewards.
    """
    config = RunFolder(run).config()
    if config is None or not config.rollout.rounds:
        refuse_missing(run)
        raise UserError(f"{run}: is no run of reinforcement learning; name the --run of `rl run` or "
                        "`rl train`")
    number, index = divmod(step - 1, config.rollout.steps_per_round)
    number, rounds = number + 1, run / ROUNDS
    if number <= config.rollout.rounds and not config.policy.is_on_policy(config.rollout.seed, number):
        raise UserError(f"STEP {step}: is of round {number}, which policy.on_policy_share = "
                        f"{config.policy.on_policy_share:g} had learn from --data and not from responses; "
                        "name a step of another round")
    if step < 1 or not is_published(rounds, number):
        last = max((n for n in range(1, config.rollout.rounds + 1) if is_published(rounds, n)), default=0)
        raise UserError(f"STEP {step}: {run} has the rounds 1 to {last} of "
                        f"{config.rollout.steps_per_round} steps each")
    _refuse_damaged(folder_of_round(rounds, number), config)
    documents = RoundDocuments(rounds, config.model.vocab_size)
    opened = documents.read(number, config.data.phases[0].seq_len, config.rollout.steps_per_round)
    content = read_manifest(opened.path, "tokens").content
    try:
        made = [(str(part["name"]), str(part["rollouts"]), str(part["rewards"])) for part in content["store"]]
        version, policies = str(content["reward_version"]), tuple(map(str, content["policies"]))
        groups = {str(reason): int(count) for reason, count in content["groups"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{opened.path}: its manifest is damaged ({type(e).__name__} {e}); take the round "
                        "from a copy of the run") from None
    responses, loss = _responses(config, opened, opened.steps[index], _Stored(store, version, made))
    events = {event["step"]: event for event in final_steps(list(read_events(run / "events.jsonl")))}
    responses.sort(key=lambda found: -abs(found.share or 0.0))
    return ExplainedStep(step, number, index + 1, version, policies, groups, events.get(step, {}), loss,
                         no_shares(config), tuple(responses))


def _refuse_damaged(path: Path, config: RunConfig) -> None:
    """Refuse a round whose files are not what was learned, or are there no more."""
    files = read_manifest(path, "tokens").files
    if files and not any((path / name).exists() for name in files):
        raise UserError(f"{path}: has its manifest alone, since rollout.keep_rounds = "
                        f"{config.rollout.keep_rounds} clears older ones; `megatron-sov rl replay` makes it "
                        "again")
    if damaged := damaged_files(path):
        raise UserError(f"{damaged[0]}; take the round from a copy of the run")


def no_shares(config: RunConfig) -> str:
    """Return why what responses count in a step of a run is not known here, in a sentence; empty: it is."""
    policy = config.policy
    if config.objective.name != "policy":
        return f"objective.name = {config.objective.name} has a loss of its own, which nobody here can divide"
    if policy.learns_distributions:
        return f"policy.method = {policy.method} learns a teacher's distributions, and no rewards"
    if policy.learns_preferences:
        return (f"policy.method = {policy.method} learns pairs or groups by the loss of `preference`, which "
                "is no sum over responses; of a pair the better has advantage 1, the worse -1")
    if policy.parts.opd_coeff:
        return (f"policy.opd_coeff = {policy.parts.opd_coeff:g} adds to each token what a teacher says of "
                "it, which stands in no round")
    return ""


def shares(advantages: np.ndarray, num_tokens: np.ndarray, logprobs: np.ndarray, config: RunConfig
           ) -> tuple[np.ndarray, float]:
    """Return what each response of a step counts in the gradient of its policy loss, as shares of the sum of
    absolute values, and the loss itself, both where no ratio has moved: there the gradient is minus the sum
    of weight times advantage times the gradient of a label's log-probability, whatever the clip
    (`post.policy.surrogate`).

    Args:
        advantages: [n] float64.
        num_tokens: [n]: labels of each.
        logprobs: [n]: sum of each one's log-probabilities, in nats, which cispo's loss has as a factor.
        config: whose `policy.aggregation` weighs labels (`post.policy.denominator`).
    """
    parts, counted = config.policy.parts, num_tokens > 0
    # of each label
    weights = {"token": 1 / max(num_tokens.sum(), 1),
               "sequence": 1 / np.maximum(num_tokens, 1) / max(counted.sum(), 1),
               "constant": 1 / max(counted.sum(), 1) / config.rollout.max_new_tokens}[parts.aggregation]
    pulls = weights * num_tokens * advantages
    loss = weights * advantages * (logprobs if parts.clip == "cispo" else num_tokens)
    return pulls / (np.abs(pulls).sum() or 1.0), -float(loss.sum())


class _Stored:
    """The rows that a round was made of, by what they are."""

    def __init__(self, path: Path, version: str, made: Sequence[tuple[str, str, str]]) -> None:
        """Read all of them.

        Args:
            path: the store.
            version: of the reward.
            made: name of each part, and the hashes of its responses and rewards.
        """
        self._store, self._version = RolloutStore.open(path), version
        self._rows: defaultdict[bytes, deque[tuple[str, int, Rollout]]] = defaultdict(deque)
        self._said: dict[Any, RewardRow] = {}
        self._groups: defaultdict[tuple[int, str], list[float]] = defaultdict(list)
        for part in made:
            self._add(*part)

    def _add(self, name: str, sha256: str, rewards_sha256: str) -> None:
        part = self._store.part_of_round(name, sha256)
        for i, row in enumerate(self._store.read_all(name, FIELDS)[0]):
            if row.finish_reason != UNFINISHED:
                self._rows[_identity(np.concatenate([row.prompt_tokens, row.tokens]), np.concatenate([
                    np.zeros(len(row.prompt_tokens), np.float32), row.logprobs]))].append((name, i, row))
        if self._store.part(name, self._version).manifest_sha256 != rewards_sha256:
            raise UserError(f"{self._store.part_path(name, self._version)}: are other rewards than the round "
                            "was made of; give the store of the run, as it was then")
        if self._version == NO_REWARD:  # the zeros of its rows mean nothing
            return
        for said in self._store.read_rewards(self._version, name, part):
            self._said[said.key, said.attempt] = said
            if said.reward is not None:
                self._groups[part.round, said.key.prompt].append(said.reward)

    def find(self, tokens: np.ndarray, logprobs: np.ndarray) -> tuple[str, int, Rollout]:
        """Return part, row and response of a document, whose like are given one after the other.

        Args:
            tokens: [n] of prompt and response.
            logprobs: [n], 0 of the prompt's.

        Raises:
            UserError: there is none.
        """
        if not (found := self._rows[_identity(tokens, logprobs)]):
            raise UserError(f"{self._store.path}: has no response that a document of the round is; the store "
                            "or the round is damaged (`rl store verify`)")
        return found.popleft()

    def judged(self, row: Rollout) -> RewardRow | None:
        return self._said.get((row.key, row.attempt))

    def group(self, row: Rollout) -> tuple[float, ...]:
        return tuple(self._groups[row.round, row.key.prompt])


def _identity(tokens: np.ndarray, logprobs: np.ndarray) -> bytes:
    return tokens.astype(np.int32).tobytes() + logprobs.astype(np.float32).tobytes()


def _responses(config: RunConfig, opened: Round, of_step: range, stored: _Stored
               ) -> tuple[list[LearnedResponse], float | None]:
    if opened.documents is None or not of_step:
        return [], None
    read = opened.documents
    rows, advantages, counts, sums = [], [], [], []
    for document in range(of_step.stop):
        count = int(opened.starts[document + 1] - opened.starts[document])
        # those before are looked for too: of alike ones each is another row
        logprobs = read.column(BEHAVIOUR, document, 0, count)
        found = stored.find(read.tokens(document, 0, count), logprobs)
        if document in of_step:
            labels = read.loss_weights(document, 0, count) > 0
            rows.append(found)
            advantages.append(float(read.column(ADVANTAGE, document, 0, count)[labels][:1].sum()))
            counts.append(int(labels.sum()))
            sums.append(float(logprobs[labels].sum(dtype=np.float64)))
    parts, loss = shares(np.array(advantages), np.array(counts), np.array(sums), config)
    has_shares, has_advantages = not no_shares(config), config.policy.parts.advantage != "none"
    return [_learned(row, said, advantage if has_advantages else None, float(part) if has_shares else None,
                     stored)
            for row, said, advantage, part in zip(
                rows, [stored.judged(row) for _, _, row in rows], advantages, parts, strict=True)
            ], loss if has_shares else None


def _learned(place: tuple[str, int, Rollout], said: RewardRow | None, advantage: float | None,
             share: float | None, stored: _Stored) -> LearnedResponse:
    part, index, row = place
    versions: Sequence[int] = row.written_versions.tolist() or (0,)
    return LearnedResponse(
        part, index, row.key.prompt, row.key.sample, domain_of(row.record), (min(versions), max(versions)),
        row.num_written, None if said is None else said.reward, {} if said is None else said.components,
        stored.group(row), advantage, share, row.response)
