"""From the store to a round that is trained: the last attempt at each response, with what the reward said of
it; groups get advantages, and their responses become documents.

A round is published once, by a rename, and never changes: whoever resumes trains what was trained.  Responses
that came after their round was published each join a round that is published later, once, with the advantage
that their own group gives them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.base.artifacts import MANIFEST, manifest_sha256, new_artifact, read_manifest
from megatron_sov.base.documents import ROLLOUTS
from megatron_sov.base.documents.shard_files import ROUTES, IndexedWriter, RouteShape
from megatron_sov.base.errors import UserError, warn
from megatron_sov.chat.encode import TYPE_PROMPT, TYPE_RESPONSE
from megatron_sov.chat.vocabulary import TOKENIZER_JSON, tokenizer_digest
from megatron_sov.model.config import RolloutConfig, RunConfig
from megatron_sov.post.rl.advantages import Group, advantages
from megatron_sov.rollouts.prompts import RolloutPrompt, budget_of, round_prompts
from megatron_sov.rollouts.rows import (
    LENGTH, UNFINISHED, Key, RewardRow, Rollout, RolloutPart, domain_of, later)
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs import checkpoints
from megatron_sov.runs.rounds import LEARNS
from megatron_sov.train.data.requirements import replayed_routes
from megatron_sov.train.data.rounds import ADVANTAGE, BEHAVIOUR, SOURCE, folder_of_round
from megatron_sov.train.data.token_bytes import token_bytes
from megatron_sov.train.data.token_shards import CONTENT_VERSION, COUNTS, source_record

LIGHT = ("versions", "finish_reason")
"""Columns that say what is there and how long it is."""
KEPT_OUT = "kept_out"
"""Status of a response whose last attempt breaks a rule of the store."""


@dataclass(frozen=True)
class PublishedResponse:
    """One response of a group that has a reward."""

    rollout: Rollout
    judged: RewardRow

    @property
    def reward(self) -> float:
        assert self.judged.reward is not None, f"{self.rollout.key} has no reward"
        return self.judged.reward


@dataclass(frozen=True)
class Gathered:
    """A round that is complete, or as complete as it has to be; of rollouts the `LIGHT` columns alone."""

    number: int
    """Of the round, from 1."""
    groups: tuple[tuple[PublishedResponse, ...], ...]
    """Responses to each prompt of the round, in order of prompts and of samples; some may have none."""
    late: tuple[Key, ...]
    """Responses that are not finished, and not trained."""
    unjudged: Mapping[str, int]
    """Status -> responses without a reward, which are not trained."""
    parts: tuple[RolloutPart, ...]
    """Where all of this stands."""


@dataclass(frozen=True)
class RoundOfStore:
    """Where a round's responses are looked for."""

    store: RolloutStore
    number: int
    """Of the round, from 1."""
    prompts: Sequence[str]
    """Ids of its prompts, in order."""
    piece_prompts: int
    """Prompts of a piece."""
    samples_per_prompt: int
    """Responses to each prompt."""
    reward_version: str
    missing_share: float
    """Share of its groups that may go without their unfinished responses."""

    def gather(self) -> Gathered | str:
        """Return the round, or what it still lacks.

        Raises:
            UserError: the store holds responses to other prompts, or in other pieces, or a part is damaged.
        """
        parts = self.store.parts(self.number)
        self._refuse_other_pieces(parts)
        if lacking := self._lacking(parts):
            return lacking
        rows, num_kept_out = self._last_rows(parts)
        late = tuple(row.key for row in rows if row.finish_reason == UNFINISHED)
        # Only late responses are waited for: what the reward failed on does not come by waiting.
        waiting = len({key.prompt for key in late})
        if waiting > self.missing_share * len(self.prompts):
            return (f"{waiting} of {len(self.prompts)} groups wait for responses that are not finished "
                    f"(policy.missing_share = {self.missing_share:g})")
        judged = self.store.judgements(self.reward_version, parts)
        unjudged = Counter({KEPT_OUT: num_kept_out} if num_kept_out else {})
        # A place for every prompt: one without responses still counts as a group of its step.
        groups: dict[str, list[PublishedResponse]] = {prompt: [] for prompt in self.prompts}
        for row in sorted(rows, key=lambda row: row.key.sample):
            said = judged.get((row.key, row.attempt))
            if row.finish_reason == UNFINISHED:
                continue
            if said is None or said.reward is None:
                unjudged["missing" if said is None else said.status] += 1
                continue
            groups[row.key.prompt].append(PublishedResponse(row, said))
        return Gathered(self.number, tuple(map(tuple, groups.values())), late, dict(unjudged), tuple(parts))

    def _lacking(self, parts: Sequence[RolloutPart]) -> str:
        count = -(-len(self.prompts) // self.piece_prompts)
        # Attempt 0 has a row for every response of a piece, finished or not.
        written = {part.piece for part in parts if part.attempt == 0}
        unwritten = [piece for piece in range(count) if piece not in written]
        if unwritten:
            return f"{len(unwritten)} of {count} pieces are not written yet, the first is {unwritten[0]}"
        unjudged = [part.name for part in parts if not self.store.has(part.name, self.reward_version)]
        if unjudged:
            return (f"{len(unjudged)} of {len(parts)} parts are not judged yet by reward version "
                    f"{self.reward_version[:12]}, the first is {unjudged[0]}")
        return ""

    def _last_rows(self, parts: Sequence[RolloutPart]) -> tuple[list[Rollout], int]:
        """Return the last attempt at each response, and the number of those that are kept out: what stands
        behind an unfinished row stands in its place, sound or not, and nobody goes on with it again."""
        rows: list[Rollout] = []
        kept_out: set[tuple[Key, int]] = set()
        for part in parts:
            found, problems = self.store.read_all(part.name, LIGHT)
            self._refuse_other_prompts(part, found)
            rows += found
            kept_out |= {(row.key, row.attempt) for row, problem in zip(found, problems, strict=True)
                         if problem}
        last = later(rows)
        sound = [row for row in last if (row.key, row.attempt) not in kept_out]
        return sound, len(last) - len(sound)

    def _prompts_of(self, piece: int) -> Sequence[str]:
        return self.prompts[piece * self.piece_prompts:(piece + 1) * self.piece_prompts]

    def _refuse_other_pieces(self, parts: Sequence[RolloutPart]) -> None:
        """Raise `UserError` where a part was cut otherwise: some pieces would be taken for the whole
        round."""
        for part in parts:
            num_rows = len(self._prompts_of(part.piece)) * self.samples_per_prompt
            if part.num_rows > num_rows or (part.attempt == 0 and part.num_rows != num_rows):
                raise UserError(f"{part.path}: has {part.num_rows:,} responses, and rollout.piece_prompts = "
                                f"{self.piece_prompts} with rollout.samples_per_prompt = "
                                f"{self.samples_per_prompt} make {num_rows:,}; give the settings that "
                                "they were written with, or another --store")

    def _refuse_other_prompts(self, part: RolloutPart, rows: Sequence[Rollout]) -> None:
        others = {row.key.prompt for row in rows}.difference(self._prompts_of(part.piece))
        if others:
            raise UserError(f"{self.store.path}: round {self.number} holds responses to prompt "
                            f"{min(others)}, which is none of piece {part.piece} now; pass the --prompts and "
                            "rollout settings that they were written with, or another --store")


PREFIX, DTYPE = f"{SOURCE}/train-00000", "int32"
SIDECARS = {"loss": "float32", "type": "uint8", BEHAVIOUR: "float32", ADVANTAGE: "float32"}
LATE, LATE_FROM = "late", "late_from"
"""In a round's manifest: what was left out of it, as [prompt, sample]; and what of earlier rounds has joined
it, as [round, prompt, sample, why it is not learned, or ""]."""


@dataclass(frozen=True)
class Publisher:
    """What the rounds of a run are published from."""

    config: RunConfig
    """Of the run, with its rounds."""
    rounds: Path
    """RUN/rounds."""
    store: Path
    """The store; whoever writes the first responses makes it."""
    prompts: Sequence[RolloutPrompt]
    """All of them."""
    reward_version: str
    tokenizer: Path
    """Folder of the tokenizer that the model has."""

    def publish(self, number: int) -> str:
        """Publish a round, unless it is; returns what it lacks, or "".

        Raises:
            UserError: the store holds something else, a response is longer than a row or of another
                temperature, or the disk is full.
        """
        out = folder_of_round(self.rounds, number)
        # The manifest is written last and a round never changes: with it there is nothing to do.
        if (out / MANIFEST).is_file():
            return ""
        if not self._is_begun():
            return f"nobody has written to {self.store} yet"
        rollout = self.config.rollout
        ids = [prompt.id for prompt in round_prompts(self.prompts, rollout, number)]
        source = RoundOfStore(self._opened, number, ids, rollout.piece_prompts, rollout.samples_per_prompt,
                              self.reward_version, self.config.policy.missing_share)
        gathered = source.gather()
        if isinstance(gathered, str):
            return gathered
        self._refuse_nothing_judged(gathered)
        self._warn_of_other_policies(gathered)
        self._write_round(source, gathered, out)
        return ""

    def refuse_other_store(self) -> None:
        """Refuse what lies where the store is to be and is none of this model's; one that is not begun yet
        is fine.

        Raises:
            UserError: it is no store, or one of another tokenizer.
        """
        if self._is_begun():
            _ = self._opened

    def _is_begun(self) -> bool:
        return self.store.exists() and (not self.store.is_dir() or any(self.store.iterdir()))

    @cached_property
    def _opened(self) -> RolloutStore:
        """The store, once it is begun: opened once, so that it also tells once what it keeps out."""
        store = RolloutStore.open(self.store)
        if store.vocab_size > self.config.model.vocab_size:
            raise UserError(f"{self.store}: its tokenizer has {store.vocab_size} ids, the model only "
                            f"model.vocab_size = {self.config.model.vocab_size}; pass the store that this "
                            "model's policies write to")
        if store.tokenizer_digest != tokenizer_digest(self.tokenizer):
            raise UserError(f"{self.store}: is written in another tokenizer ({store.tokenizer_digest[:24]}) "
                            f"than {self.tokenizer / TOKENIZER_JSON}; pass the store that this model's "
                            "policies write to")
        return store

    def _refuse_nothing_judged(self, gathered: Gathered) -> None:
        """Raise `UserError` where the reward has failed throughout: a run would pass over one round after the
        other."""
        if gathered.unjudged and not any(gathered.groups):
            told = ", ".join(f"{count:,} {status}" for status, count in gathered.unjudged.items())
            raise UserError(f"{self.store}: no response of round {gathered.number} has a reward ({told}); "
                            "mend what the reward runs on, and have it judge again behind `megatron-sov rl "
                            f"store gc {self.store} --version {self.reward_version}`")

    def _warn_of_other_policies(self, gathered: Gathered) -> None:
        """Tell where responses were begun by none of the run's checkpoints: a store gives what it has to
        whoever asks the same, and another run may have written it."""
        folder = self.rounds.parent / checkpoints.CHECKPOINTS_OF_A_RUN
        newest = checkpoints.latest(folder)
        last = 0 if newest is None else checkpoints.step_of(newest)
        begun = {_begun_by(r.rollout) for group in gathered.groups for r in group if not r.rollout.attempt}
        for step, sha256 in sorted(begun):
            own = folder / f"step-{step}"
            if step > last or (step and (own / MANIFEST).is_file() and manifest_sha256(own) != sha256):
                warn(f"{self.store}: responses of round {gathered.number} were begun by policy {sha256[:12]} "
                     f"of step {step}, which is no checkpoint of {self.rounds.parent}: where another run has "
                     "written them, give each run a store of its own")

    def _write_round(self, source: RoundOfStore, gathered: Gathered, out: Path) -> None:
        late = late_groups(self.rounds, source) if self.config.policy.missing_share else []
        chosen = self._chosen(gathered, late)
        parts = [*gathered.parts, *{part.name: part for group in late
                                    for part in group.joining.values()}.values()]
        with new_artifact(out, "tokens") as artifact:
            # Late responses go first, since they belong to the first step, and steps are runs of documents.
            rows = chain(late_rows(source.store, late), _rows(source, gathered))
            counts = self._write(artifact.path / PREFIX, rows, chosen.advantages)
            record = source_record(SOURCE, ROLLOUTS, self._sidecars, [{"prefix": PREFIX, **counts}])
            if self._routes is not None:
                record[ROUTES] = self._routes.record()
            artifact.content = {
                "content_version": CONTENT_VERSION, "tokenizer_sha256": source.store.tokenizer_digest,
                "vocab_size": source.store.vocab_size, "dtype": DTYPE, "eod": "none",
                "bos_id": None, "eos_id": None,  # a response begins and ends where its policy had it
                "sources": [record], "round": gathered.number,
                "steps": chosen.steps, "groups": chosen.reasons,
                LATE: [list(key[:2]) for key in gathered.late], LATE_FROM: chosen.late_from,
                "unjudged": dict(gathered.unjudged), "reward_version": source.reward_version,
                "temperature": self.config.rollout.temperature,
                "policies": sorted({r.rollout.key.policy for group in gathered.groups for r in group}
                                   | {key.policy for group in late for key in group.joining}),
                "store": [{"name": part.name, "rollouts": part.manifest_sha256, "rewards": manifest_sha256(
                    source.store.part_path(part.name, source.reward_version))} for part in parts],
                "means": means_of(gathered, {prompt: domain_of(self._records[prompt])
                                             for prompt in source.prompts}, self.config.rollout)}
            artifact.settings = {"rollout": self.config.to_dict()["rollout"],
                                 "policy": self.config.to_dict()["policy"]}

    @cached_property
    def _records(self) -> dict[str, Mapping[str, Any]]:
        return {prompt.id: prompt.record for prompt in self.prompts}

    @cached_property
    def _routes(self) -> RouteShape | None:
        return replayed_routes(self.config)

    @property
    def _sidecars(self) -> dict[str, str]:
        return SIDECARS | ({ROUTES: self._routes.dtype} if self._routes is not None else {})

    @cached_property
    def _bytes_of_token(self) -> np.ndarray:
        return token_bytes(self.tokenizer, self.config.model.vocab_size)

    def _chosen(self, gathered: Gathered, late: Sequence[LateGroup]) -> _Chosen:
        """Give each step's groups their advantages; late responses belong to the first step."""
        rollout = self.config.rollout
        size = rollout.prompts_per_round // rollout.steps_per_round
        found, late_from = self._joining(gathered.groups[:size], late)
        reasons: dict[str, int] = {}
        steps: list[list[int]] = []
        for first in range(0, rollout.prompts_per_round, size):
            groups = gathered.groups[first:first + size]
            for group, said in zip(groups, self._judge_groups(groups), strict=True):
                reasons[said.reason or LEARNS] = reasons.get(said.reason or LEARNS, 0) + 1
                if not said.reason:
                    found |= {r.rollout.key: float(value)
                              for r, value in zip(group, said.advantages, strict=True)}
            before = sum(steps[-1]) if steps else 0
            # `found` grows in the order of documents, so its length is where the next step begins.
            steps.append([before, len(found) - before])
        return _Chosen(found, steps, reasons, late_from)

    def _judge_groups(self, groups: Sequence[Sequence[PublishedResponse]]) -> list[Group]:
        return advantages([np.array([r.reward for r in group]) for group in groups],
                          [np.array([r.rollout.num_written for r in group]) for group in groups],
                          self.config.policy, self.config.rollout.max_new_tokens,
                          [np.array([self._budget(r.rollout.key) for r in group], np.float64)
                           for group in groups])

    def _budget(self, key: Key) -> float:
        """Return the tokens that a response was asked to have; NaN: nobody asked."""
        asked = budget_of(self.config.rollout, key.prompt, self._records[key.prompt], key.sample)
        return np.nan if asked is None else asked

    def _joining(self, beside: Sequence[Sequence[PublishedResponse]], late: Sequence[LateGroup]
                 ) -> tuple[dict[Key, float], list[list[Any]]]:
        """Return the advantages of late responses, and what the manifest says of them.

        Args:
            beside: groups of the step that they join, over which advantages may be normalised.
            late: the groups that they belong to.
        """
        found: dict[Key, float] = {}
        late_from: list[list[Any]] = []
        # Judged with the groups of the step that they join: advantages may be normalised over the step.
        judged = self._judge_groups([*beside, *(group.group for group in late)])[len(beside):]
        for group, said in zip(late, judged, strict=True):
            values = {r.rollout.key: float(value)
                      for r, value in zip(group.group, said.advantages, strict=True)}
            if not said.reason:
                found |= {key: values[key] for key in group.joining}
            told = dict.fromkeys(group.joining, said.reason) | dict(group.without)
            late_from += [[group.number, key.prompt, key.sample, why] for key, why in told.items()]
        return found, late_from

    def _write(self, prefix: Path, rows: Iterator[Rollout], chosen: dict[Key, float]) -> dict[str, int]:
        """Write those rows that are chosen as documents; returns what they count."""
        counts = dict.fromkeys(COUNTS, 0)
        prefix.parent.mkdir()
        with IndexedWriter(prefix, DTYPE, self._sidecars) as writer:
            # Rows come a piece at a time, and only those that learn are written.
            for row in (row for row in rows if row.key in chosen):
                ids = np.concatenate([row.prompt_tokens, row.tokens])
                self._refuse_other_temperature(row)
                self._refuse_too_long(row, len(ids))
                writer.write(np.array([len(ids)], np.int32), {
                    "bin": ids, **_labels(row, chosen[row.key]), **self._routes_of(row, len(ids))})
                counts["num_documents"] += 1
                counts["num_tokens"] += len(ids)
                counts["num_bytes"] += int(self._bytes_of_token[ids].sum())
        return counts

    def _routes_of(self, row: Rollout, num_tokens: int) -> dict[str, np.ndarray]:
        if self._routes is None:
            return {}
        where = f"round {row.round}: sample {row.key.sample} of prompt {row.key.prompt}"
        if row.routes is None:
            raise UserError(f"{where} has no routes, and policy.router_replay replays them; write responses "
                            "with an engine that tells them, or leave the setting out")
        if problem := self._routes.problem(row.routes):
            raise UserError(f"{where} {problem}; it was written by another model")
        return {ROUTES: self._routes.of_document(row.routes, num_tokens)}

    def _refuse_other_temperature(self, row: Rollout) -> None:
        ours = self.config.rollout.temperature
        if row.temperature != ours:
            raise UserError(f"round {row.round}: sample {row.key.sample} of prompt {row.key.prompt} was "
                            f"written at temperature {row.temperature:g}, and rollout.temperature = "
                            f"{ours:g}: its log-probabilities would be compared with those of another "
                            "distribution; set it to what they were written with, or pass another --store")

    def _refuse_too_long(self, row: Rollout, num_tokens: int) -> None:
        seq_len = self.config.data.phases[0].seq_len
        if num_tokens > seq_len:
            raise UserError(f"round {row.round}: sample {row.key.sample} of prompt {row.key.prompt} has "
                            f"{num_tokens} tokens with its prompt, and a row data.phases.0.seq_len = "
                            f"{seq_len}; a response is never cut: make rows longer")


@dataclass(frozen=True)
class _Chosen:
    """What is trained of a round."""

    advantages: dict[Key, float]
    """Of each response that is trained."""
    steps: list[list[int]]
    """First document and number of documents of each optimizer step."""
    reasons: dict[str, int]
    """`LEARNS`, or why not -> groups of the round itself."""
    late_from: list[list[Any]]
    """Responses of earlier rounds, see `LATE_FROM`."""


def _begun_by(row: Rollout) -> tuple[int, str]:
    written = row.written_versions
    return int(written[0]) if len(written) else 0, row.key.policy


def _rows(source: RoundOfStore, gathered: Gathered) -> Iterator[Rollout]:
    """Yield the round's responses, whole, by prompt and sample, a piece in memory at a time."""
    place = {prompt: i for i, prompt in enumerate(source.prompts)}
    for _, rows, _ in source.store.pieces(gathered.parts):
        yield from sorted(rows, key=lambda row: (place[row.key.prompt], row.key.sample))


def _labels(row: Rollout, advantage: float) -> dict[str, np.ndarray]:
    """Return the sidecars of a response's document: a number for each token as a label."""
    # Tokens of tools and prompts are in the document, and are no labels.
    written = np.concatenate([np.zeros(len(row.prompt_tokens), bool), row.is_written])
    logprobs = np.concatenate([np.zeros(len(row.prompt_tokens), np.float32), row.logprobs])
    return {"loss": written.astype(np.float32), "type": np.where(written, TYPE_RESPONSE, TYPE_PROMPT),
            BEHAVIOUR: logprobs, ADVANTAGE: np.where(written, advantage, 0.0)}


def means_of(gathered: Gathered, domains: Mapping[str, str], rollout: RolloutConfig) -> dict[str, Any]:
    """Return means over the responses of a round that have a reward, trained or not.

    Args:
        gathered: the round.
        domains: prompt -> what it is about, "" where it does not say.
        rollout: says which optimizer step the round is trained from.
    """
    responses = [r for group in gathered.groups for r in group]
    if not responses:
        return {"responses": 0}
    components: dict[str, list[float]] = defaultdict(list)
    for r in responses:
        for name, value in r.judged.components.items():
            if isinstance(value, int | float):  # a verifier may also say in words what it found
                components[name].append(value)
    written = [r.rollout.written_versions for r in responses]
    trained_steps = (gathered.number - 1) * rollout.steps_per_round
    # Steps between the policy that wrote a token and the one that begins to train on it.
    behind = trained_steps - np.concatenate(written)
    rewards: dict[str, list[float]] = defaultdict(list)
    for r in responses:
        rewards[domains[r.rollout.key.prompt]].append(r.reward)
    return {
        "responses": len(responses), "reward": _mean(r.reward for r in responses),
        "components": {name: _mean(values) for name, values in sorted(components.items())},
        "response_tokens": _mean(len(w) for w in written),
        "truncated": _mean(r.rollout.finish_reason == LENGTH for r in responses),
        "staleness_steps": _mean(behind), "domains": {
            name: {"responses": len(values), "reward": _mean(values)}
            for name, values in sorted(rewards.items()) if name}}


def _mean(values: Iterable[float]) -> float:
    found = np.fromiter(values, np.float64)
    return float(found.mean()) if len(found) else 0.0


@dataclass(frozen=True)
class LateGroup:
    """Late responses to one prompt that have been judged since, with all others of their group."""

    number: int
    """Round that they were written for, from 1."""
    group: tuple[PublishedResponse, ...]
    """All responses of the group that have a reward, by sample: what the late ones are compared with."""
    joining: Mapping[Key, RolloutPart]
    """Late responses that have a reward, with the parts that they stand in."""
    without: Mapping[Key, str]
    """Late responses that the reward has looked at and not judged -> its status."""


def late_groups(rounds: Path, source: RoundOfStore) -> list[LateGroup]:
    """Return what may join a round, by round and in the order in which it was left out.

    Args:
        rounds: RUN/rounds, with the rounds before it.
        source: of the round that is to be published.

    Raises:
        UserError: a manifest or a part cannot be read.
    """
    return [group for number, waiting in _waiting(rounds, source.number).items() if waiting
            for group in _judged_since(replace(source, number=number), waiting)]


def late_rows(store: RolloutStore, groups: Sequence[LateGroup]) -> Iterator[Rollout]:
    """Yield the late responses of groups, whole, a part in memory at a time."""
    parts = {part.name: part for group in groups for part in group.joining.values()}
    keys = {(part.name, key) for group in groups for key, part in group.joining.items()}
    for name in parts:
        yield from (row for row in store.read_rollouts(name) if (name, row.key) in keys)


def _waiting(rounds: Path, before: int) -> dict[int, list[tuple[str, int]]]:
    """Return what was left out of each published round and has joined none yet: prompts and samples."""
    found: dict[int, list[tuple[str, int]]] = {}
    joined: set[tuple[int, str, int]] = set()
    for number in range(1, before):
        folder = folder_of_round(rounds, number)
        if (folder / MANIFEST).is_file():
            content = read_manifest(folder, "tokens").content
            found[number] = [(prompt, sample) for prompt, sample in content.get(LATE, ())]
            # A late response joins once, even where no advantage came of it.
            joined |= {(first, prompt, sample) for first, prompt, sample, _ in content.get(LATE_FROM, ())}
    return {number: [late for late in left_out if (number, *late) not in joined]
            for number, left_out in found.items()}


def _judged_since(source: RoundOfStore, waiting: Sequence[tuple[str, int]]) -> Iterator[LateGroup]:
    """Yield the groups of a round with late responses that the reward has looked at."""
    store, parts = source.store, source.store.parts(source.number)
    last: dict[Key, tuple[Rollout, RolloutPart]] = {}
    for part in sorted(parts, key=lambda part: part.attempt):
        # By attempt, so the last one at each response stays.
        last |= {row.key: (row, part) for row in store.read_rollouts(part.name, LIGHT)}
    judged = store.judgements(source.reward_version, parts)
    said = {row.key: judged[row.key, row.attempt] for row, _ in last.values()
            if row.finish_reason != UNFINISHED and (row.key, row.attempt) in judged}
    for prompt in dict.fromkeys(prompt for prompt, _ in waiting):
        late = [key for key in said if key.prompt == prompt and (prompt, key.sample) in waiting]
        group = tuple(PublishedResponse(last[key][0], said[key]) for key in sorted(said,
                                                                                   key=lambda key: key.sample)
                      if key.prompt == prompt and said[key].reward is not None)
        if late:
            yield LateGroup(source.number, group,
                            {key: last[key][1] for key in late if said[key].reward is not None},
                            {key: said[key].status for key in late if said[key].reward is None})
