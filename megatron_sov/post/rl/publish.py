"""From the store to a round that is trained: the last attempt at each response, with what the reward said of
it; groups get advantages, and their responses become documents.

A round is published once, by a rename, and never changes: whoever resumes trains what was trained.  Responses
that came after their round was published each join a round that is published later, once, with the advantage
that their own group gives them.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.base.artifacts import (
    MANIFEST, ArtifactWriter, disk_errors, manifest_sha256, new_artifact, read_manifest)
from megatron_sov.base.documents import ROLLOUTS
from megatron_sov.base.documents.groups import is_learned, pair_of
from megatron_sov.base.documents.shard_files import ROUTES, RouteShape
from megatron_sov.base.errors import UserError, warn
from megatron_sov.base.sealed import read_json, write_json
from megatron_sov.chat.vocabulary import TOKENIZER_JSON, tokenizer_digest
from megatron_sov.engine.parallel.world import on_each, on_first
from megatron_sov.model.config import RolloutConfig, RunConfig
from megatron_sov.post.rl.advantages import LEARNS as KEPT, Group, advantages, left_out
from megatron_sov.post.rl.gathering import (
    LATE, LATE_FROM, Gathered, LateGroup, PublishedResponse, RolloutFacts, RoundOfStore, late_groups,
    late_responses)
from megatron_sov.post.rl.reward import NO_REWARD
from megatron_sov.post.rl.round_files import (
    DTYPE, RoundPiece, RoundShard, ShardWriter, WrittenShard, shards_of)
from megatron_sov.rollouts.prompts import PromptList, budget_of, round_pieces, too_long_in
from megatron_sov.rollouts.rows import LENGTH, Key, domain_of
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs import checkpoints
from megatron_sov.runs.rounds import LEARNS
from megatron_sov.train.data.described import source_record
from megatron_sov.train.data.requirements import replayed_routes
from megatron_sov.train.data.rounds import ADVANTAGE, DOMAINS, SHARE, SOURCE, folder_of_round
from megatron_sov.train.data.token_bytes import token_bytes
from megatron_sov.train.data.token_shards import CONTENT_VERSION

NO_PAIR = "no_pair"
"""Why a group is left out: no response that ended is better than its worst."""
SURPLUS = "surplus"
"""In the place of why a group is left out: it would learn, and the round is full."""
TRUNCATED = (LENGTH, "tokens", "unended")
"""Finish reasons of responses and episodes that the limit of tokens has cut off."""


def further_pieces(rounds: Path, number: int) -> int:
    """Return how many pieces of further prompts are asked of a round in the place of groups that do not learn
    (`policy.max_gen_batches`).

    Args:
        rounds: RUN/rounds.
        number: of the round, from 1.

    Raises:
        UserError: the note of it is damaged.
    """
    file = _further_file(rounds, number)
    return int(read_json(file, "delete it, and it is written anew", file.name)["pieces"]) if (
        file.is_file()) else 0


def published_numbers(config: RunConfig) -> tuple[str, ...]:
    """Return the columns of a run's rounds that have one number of each response."""
    groups = config.policy.learns_preferences and config.documents_of_unit == 1
    return (ADVANTAGE, SHARE) if groups else (ADVANTAGE,)


def is_published(rounds: Path, number: int) -> bool:
    return (folder_of_round(rounds, number) / MANIFEST).is_file()


def _further_file(rounds: Path, number: int) -> Path:
    folder = folder_of_round(rounds, number)
    return folder.with_name(f"{folder.name}.further.json")


@dataclass
class Publisher:
    """What the rounds of a run are published from."""

    config: RunConfig
    """Of the run, with its rounds."""
    rounds: Path
    """RUN/rounds."""
    store: Path
    """The store; whoever writes the first responses makes it."""
    prompts: PromptList
    """All of them."""
    reward_version: str
    tokenizer: Path
    """Folder of the tokenizer that the model has."""
    is_own: Callable[[int, str], bool] = lambda step, sha256: True
    """Whether a policy of a step is the run, as far as that is known."""
    _artifact: ArtifactWriter | None = None
    """The round under construction, on the process that completes it."""

    def publish(self, number: int) -> str:
        """Publish a round, unless it is; returns what it lacks, or "".  Called by all processes together, and
        each writes some of its files.

        Raises:
            UserError: the store holds something else, a response is longer than a row or of another
                temperature, or the disk is full.
        """
        with contextlib.ExitStack() as building:
            planned = on_first(partial(self._begin, number, building))
            if isinstance(planned, str):
                return planned
            writer = self._writer
            found = on_each(lambda rank, size: [writer.write(planned.folder, shard)
                                                for shard in planned.shards[rank::size]])
            # by rank, each of which had every n-th one
            written = [found[i % len(found)][i // len(found)] for i in range(len(planned.shards))]
            on_first(partial(self._complete, planned, written, building))
        return ""

    def _begin(self, number: int, building: contextlib.ExitStack) -> str | RoundPlan:
        """Return what a round is written from, in a folder that `building` ends; or what it lacks, or ""."""
        out = folder_of_round(self.rounds, number)
        # The manifest is written last and a round never changes: with it there is nothing to do.
        if (out / MANIFEST).is_file():
            return ""
        if not self._is_begun():
            return f"nobody has written to {self.store} yet"
        source = self._source(number)
        gathered = source.gather()
        if isinstance(gathered, str):
            return gathered
        self._refuse_nothing_judged(gathered)
        if asked := self._ask_further(source, gathered):
            return asked
        self._warn_of_other_policies(gathered)
        late = late_groups(self.rounds, source) if self.config.policy.missing_share else []
        chosen = self._chosen(gathered, late)
        content = self._content(source, gathered, late, chosen)
        self._clear(number)
        self._artifact = building.enter_context(new_artifact(out, "tokens"))
        (self._artifact.path / SOURCE).mkdir()
        return RoundPlan(self._artifact.path, tuple(shards_of(_pieces(gathered, late, chosen))), content)

    def _clear(self, number: int) -> None:
        """Delete what no resume needs of rounds before one: their tokens and columns, which can be made again
        from the store; a manifest says what a round was, and what has joined it."""
        folder = self.rounds.parent / checkpoints.CHECKPOINTS_OF_A_RUN
        begins = min(map(checkpoints.step_of, checkpoints.complete(folder)), default=0)
        rollout = self.config.rollout
        for old in range(1, min(begins // rollout.steps_per_round + 1, number - rollout.keep_rounds)):
            round_ = folder_of_round(self.rounds, old)
            if not (round_ / SOURCE).is_dir() or not all(
                    (self._opened.part_path(part["name"]) / MANIFEST).is_file()
                    for part in read_manifest(round_).content["store"]):
                continue
            with disk_errors(round_):
                for column in self.rounds.glob(f"{round_.name}.*.f32"):
                    column.unlink()
                shutil.rmtree(round_ / SOURCE)

    def _source(self, number: int) -> RoundOfStore:
        rollout, policy = self.config.rollout, self.config.policy
        own = math.ceil(rollout.prompts_per_round / rollout.piece_prompts)
        asked = further_pieces(self.rounds, number)
        # another run may have asked more of the store
        there = max((part.piece + 1 - own for part in self._opened.parts(number)), default=0)
        most = max(asked, there, (policy.parts.max_gen_batches - 1) * own)
        return RoundOfStore(
            self._opened, number, round_pieces(self._asked, rollout, number, most), own + asked,
            rollout.samples_per_prompt, self.reward_version, policy.missing_share)

    def _ask_further(self, source: RoundOfStore, gathered: Gathered) -> str:
        """Ask further prompts, where too few groups of a round learn; returns what is waited for, "": the
        round is full, or as full as it may be."""
        rollout, policy = self.config.rollout, self.config.policy
        if policy.parts.max_gen_batches == 1:
            return ""
        num_learn = sum(self._left_out(group) == KEPT for group in gathered.groups)
        lacking, asked = rollout.prompts_per_round - num_learn, len(source.prompts)
        # As many as fill the round at the share that has learned so far.
        wanted = min(lacking * asked / num_learn if num_learn else math.inf, rollout.prompts_per_round)
        own = math.ceil(rollout.prompts_per_round / rollout.piece_prompts)
        most = min(len(source.pieces), policy.parts.max_gen_batches * own)
        more = min(math.ceil(wanted / rollout.piece_prompts), most - source.num_pieces)
        told = (f"{num_learn} of {asked} groups of round {source.number} learn, and it is to have "
                f"{rollout.prompts_per_round}")
        if lacking <= 0:
            return ""
        if more <= 0:
            why = ("there are no more prompts" if most < policy.parts.max_gen_batches * own else
                   f"policy.max_gen_batches = {policy.parts.max_gen_batches}")
            warn(f"{told}; {why}: it is trained with these")
            return ""
        pieces = source.num_pieces - own + more
        file = _further_file(self.rounds, source.number)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"pieces": pieces}, file.name)
        count = sum(len(piece.prompts) for piece in source.pieces[source.num_pieces:][:more])
        return f"{told}: {count} further prompts are asked"

    def _left_out(self, group: Sequence[PublishedResponse]) -> str:
        """Return why a group is left out; `KEPT`."""
        reason = left_out(np.array([r.reward for r in group]), self.config.policy)
        if reason == KEPT and self.config.policy.learns_preferences:
            return self._learned_of(group, self._judge_groups([group])[0])[1]
        return reason

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
            why = next((f", the first because {said.reason}" for part in gathered.parts
                        for said in self._opened.read_rewards(self.reward_version, part.name)
                        if said.reward is None and said.reason), "")
            raise UserError(f"{self.store}: no response of round {gathered.number} has a reward ({told}{why})"
                            "; mend what the reward runs on, and have it judge again behind `megatron-sov rl "
                            f"store gc {self.store} --version {self.reward_version}`")

    def _warn_of_other_policies(self, gathered: Gathered) -> None:
        """Tell where responses were begun by another policy than the run is: a store gives what it has to
        whoever asks the same, and another run may have written it."""
        begun = {_begun_by(r.rollout) for group in gathered.groups for r in group if not r.rollout.attempt}
        for step, sha256 in sorted(begun):
            if not self.is_own(step, sha256):
                warn(f"{self.store}: responses of round {gathered.number} were begun by policy {sha256[:12]} "
                     f"of step {step}, which {self.rounds.parent} is not: where another run has written "
                     "them, give each run a store of its own")

    def _content(self, source: RoundOfStore, gathered: Gathered, late: Sequence[LateGroup], chosen: _Chosen
                 ) -> dict[str, Any]:
        """Return what the manifest says of a round but for its sources."""
        parts = [*gathered.parts, *{part.name: part for group in late
                                    for part in group.joining.values()}.values()]
        return {
            "content_version": CONTENT_VERSION, "tokenizer_sha256": source.store.tokenizer_digest,
            "vocab_size": source.store.vocab_size, "dtype": DTYPE, "eod": "none",
            "bos_id": None, "eos_id": None,  # a response begins and ends where its policy had it
            "round": gathered.number, "steps": chosen.steps, "groups": chosen.reasons,
            LATE: [list(key[:2]) for key in gathered.late], LATE_FROM: chosen.late_from,
            "unjudged": dict(gathered.unjudged), "reward_version": source.reward_version,
            "temperature": self.config.rollout.temperature,
            "policies": sorted({r.rollout.key.policy for group in gathered.groups for r in group}
                               | {key.policy for group in late for key in group.joining}),
            "store": [{"name": part.name, "rollouts": part.manifest_sha256, "rewards": manifest_sha256(
                source.store.part_path(part.name, source.reward_version))} for part in parts],
            "means": means_of(gathered, {prompt: domain_of(self._record(prompt))
                                         for prompt in source.prompts}, self.config.rollout,
                              has_reward=self.reward_version != NO_REWARD),
            **({DOMAINS: self._domains_of(gathered, late, chosen)} if self.config.policy.parts.opd_coeff
               else {})}

    def _domains_of(self, gathered: Gathered, late: Sequence[LateGroup], chosen: _Chosen
                    ) -> list[tuple[str, int]]:
        """Return the domains of a round's documents, each with how many lie together."""
        # in the order of `_pieces`
        keys = [r.rollout.key for responses in (*(found for _, found in late_responses(late)),
                                                *gathered.groups) for r in responses]
        domains = (domain_of(self._record(key.prompt)) for key in keys if key in chosen.advantages)
        return [(domain, len(list(together))) for domain, together in groupby(domains)]

    def _complete(self, planned: RoundPlan, written: Sequence[WrittenShard],
                  building: contextlib.ExitStack) -> None:
        """Write the manifest of a round whose files are on the disk, and give it its name."""
        artifact = self._artifact
        assert artifact is not None, "nothing is begun"
        shards = [{"prefix": shard.prefix, **made.counts}
                  for shard, made in zip(planned.shards, written, strict=True)]
        record = source_record(SOURCE, ROLLOUTS, self._writer.sidecars, shards)
        if self._routes is not None:
            record[ROUTES] = self._routes.record()
        artifact.content = {**planned.content, "sources": [record]}
        artifact.settings = {"rollout": self.config.to_dict()["rollout"],
                             "policy": self.config.to_dict()["policy"]}
        artifact.known_files = {name: file for made in written for name, file in made.files.items()}
        building.close()

    @cached_property
    def _asked(self) -> PromptList:
        """The prompts of which rounds are made: those that whoever writes has not set aside."""
        return self.prompts.without(too_long_in(self.store))

    @cached_property
    def _record(self) -> Callable[[str], Mapping[str, Any]]:
        """What gives the record of a prompt; those of a group are asked for one after the other."""
        return lru_cache(maxsize=64)(self.prompts.record_of)

    @cached_property
    def _routes(self) -> RouteShape | None:
        return replayed_routes(self.config)

    @cached_property
    def _writer(self) -> ShardWriter:
        return ShardWriter(self._opened, self.config.rollout.temperature, self.config.data.phases[0].seq_len,
                           self._routes, token_bytes(self.tokenizer, self.config.model.vocab_size),
                           published_numbers(self.config))

    def _chosen(self, gathered: Gathered, late: Sequence[LateGroup]) -> _Chosen:
        """Give each step's groups their advantages; late responses belong to the first step."""
        num_steps, reasons = self.config.rollout.steps_per_round, Counter[str]()
        learned = self._filling(gathered.groups, reasons)
        bounds = [len(learned) * step // num_steps for step in range(num_steps + 1)]
        found, late_from = self._joining(learned[:bounds[1]], late)
        steps: list[list[int]] = []
        shares: dict[Key, float] = {}
        for first, end in pairwise(bounds):
            groups = learned[first:end]
            for group, said in zip(groups, self._judge_groups(groups), strict=True):
                values, reason = self._learned_of(group, said)
                reasons[reason or LEARNS] += 1
                found |= values
                shares |= dict.fromkeys(values, 1 / max(1, len(group)))
            before = sum(steps[-1]) if steps else 0
            # `found` grows in the order of documents, so its length is where the next step begins.
            steps.append([before, len(found) - before])
        return _Chosen(found, shares, steps, dict(reasons), late_from)

    def _learned_of(self, group: Sequence[PublishedResponse], said: Group) -> tuple[dict[Key, float], str]:
        """Return the advantages of a group's responses that are learned, in the order of their documents, and
        why there are none."""
        if said.reason:
            return {}, said.reason
        values = said.advantages.tolist()
        if not self.config.policy.learns_preferences:
            return {r.rollout.key: value for r, value in zip(group, values, strict=True)
                    if not self._is_masked(r)}, ""
        keep = self.config.policy.keep_unfinished
        ended = [keep or r.rollout.finish_reason not in TRUNCATED for r in group]
        if self.config.documents_of_unit == 1:
            return {r.rollout.key: place for r, place, whole in zip(group, values, ended, strict=True)
                    if is_learned(place, whole)}, ""
        pair, _ = pair_of(values, ended, lambda i, j: self._is_same(group[i].rollout, group[j].rollout))
        return ({group[i].rollout.key: values[i] for i in pair}, "") if pair else ({}, NO_PAIR)

    def _is_same(self, one: RolloutFacts, other: RolloutFacts) -> bool:
        """Return whether two responses are the same tokens, which a reward has judged in two ways."""
        if one.num_tokens != other.num_tokens:
            return False
        first, second = (self._opened.table_of(self._opened.part(row.part), ("tokens",))["tokens"][row.row]
                         for row in (one, other))
        return bool(first == second)

    def _filling(self, groups: Sequence[Sequence[PublishedResponse]], reasons: Counter[str]
                 ) -> Sequence[Sequence[PublishedResponse]]:
        """Return the groups that a round is made of: its own, or where others stand in for them the first
        that learn, and count why the others are left out."""
        if self.config.policy.parts.max_gen_batches == 1:
            return groups
        why = [self._left_out(group) for group in groups]
        learning = [group for group, reason in zip(groups, why, strict=True) if reason == KEPT]
        kept = learning[:self.config.rollout.prompts_per_round]
        reasons.update(why)
        del reasons[KEPT]  # they are counted with their advantages
        if surplus := len(learning) - len(kept):
            reasons[SURPLUS] = surplus
        return kept

    def _is_masked(self, response: PublishedResponse) -> bool:
        return self.config.policy.mask_truncated and response.rollout.finish_reason in TRUNCATED

    def _judge_groups(self, groups: Sequence[Sequence[PublishedResponse]]) -> list[Group]:
        return advantages([np.array([r.reward for r in group]) for group in groups],
                          [np.array([r.rollout.num_written for r in group]) for group in groups],
                          self.config.policy, self.config.rollout.max_new_tokens,
                          [np.array([self._budget(r.rollout.key) for r in group], np.float64)
                           for group in groups])

    def _budget(self, key: Key) -> float:
        """Return the tokens that a response was asked to have; NaN: nobody asked."""
        asked = budget_of(self.config.rollout, key.prompt, self._record(key.prompt), key.sample)
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
            masked = {r.rollout.key for r in group.group if self._is_masked(r)}
            if not said.reason:
                found |= {key: values[key] for key in group.joining if key not in masked}
            told = {key: said.reason or ("truncated" if key in masked else "") for key in group.joining
                    } | dict(group.without)
            late_from += [[group.number, key.prompt, key.sample, why] for key, why in told.items()]
        return found, late_from


@dataclass(frozen=True)
class RoundPlan:
    """What all processes write a round from."""

    folder: Path
    """Which it is written in."""
    shards: tuple[RoundShard, ...]
    content: dict[str, Any]
    """Of the manifest, but for its sources."""


@dataclass(frozen=True)
class _Chosen:
    """What is trained of a round."""

    advantages: dict[Key, float]
    """Of each response that is trained; of a step's own ones in the order of documents."""
    shares: dict[Key, float]
    """1 / responses of the group, of each that is not late."""
    steps: list[list[int]]
    """First document and number of documents of each optimizer step."""
    reasons: dict[str, int]
    """`LEARNS`, or why not -> groups of the round itself."""
    late_from: list[list[Any]]
    """Responses of earlier rounds, see `LATE_FROM`."""


def _begun_by(row: RolloutFacts) -> tuple[int, str]:
    return row.first_version, row.key.policy


def _pieces(gathered: Gathered, late: Sequence[LateGroup], chosen: _Chosen) -> Iterator[RoundPiece]:
    """Yield the documents of a round."""
    # Late responses go first, since they belong to the first step, and steps are runs of documents.
    for _, responses in late_responses(late):
        yield from _piece(responses, chosen)
    piece_of = {part.name: part.piece for part in gathered.parts}
    # a pair's better response goes first, whatever its number
    order = {key: i for i, key in enumerate(chosen.advantages)}
    responses = [r for group in gathered.groups
                 for r in sorted(group, key=lambda r: order.get(r.rollout.key, 0))]
    for _, together in groupby(responses, key=lambda r: piece_of[r.rollout.part]):
        yield from _piece(together, chosen)


def _piece(responses: Iterable[PublishedResponse], chosen: _Chosen) -> Iterator[RoundPiece]:
    """Yield those of responses that are trained, where some are."""
    rows = [r.rollout for r in responses if r.rollout.key in chosen.advantages]
    parts = tuple(dict.fromkeys(row.part for row in rows))
    place = {name: i for i, name in enumerate(parts)}
    if rows:
        yield RoundPiece(parts, np.array([(place[row.part], row.row) for row in rows], np.int32),
                         {ADVANTAGE: np.array([chosen.advantages[row.key] for row in rows], np.float32),
                          SHARE: np.array([chosen.shares.get(row.key, 0.0) for row in rows], np.float32)},
                         sum(row.num_tokens for row in rows))


def means_of(gathered: Gathered, domains: Mapping[str, str], rollout: RolloutConfig, *, has_reward: bool
             ) -> dict[str, Any]:
    """Return means over the responses of a round that have a reward, trained or not.

    Args:
        gathered: the round.
        domains: prompt -> what it is about, "" where it does not say.
        rollout: says which optimizer step the round is trained from.
        has_reward: whether something judges; else there is no reward to tell, and not one of 0.
    """
    responses = [r for group in gathered.groups for r in group]
    if not responses:
        return {"responses": 0}
    components: dict[str, list[float]] = defaultdict(list)
    for r in responses:
        for name, value in r.components.items():
            if isinstance(value, int | float):  # a verifier may also say in words what it found
                components[name].append(value)
    num_written = sum(r.rollout.num_written for r in responses)
    trained_steps = (gathered.number - 1) * rollout.steps_per_round
    # Steps between the policy that wrote a token and the one that begins to train on it.
    behind = trained_steps * num_written - sum(r.rollout.sum_versions for r in responses)
    rewards: dict[str, list[float]] = defaultdict(list)
    for r in responses:
        rewards[domains[r.rollout.key.prompt]].append(r.reward)
    return {
        "responses": len(responses), **({"reward": _mean(r.reward for r in responses)} if has_reward else {}),
        "components": {name: _mean(values) for name, values in sorted(components.items())},
        "response_tokens": _mean(r.rollout.num_written for r in responses),
        "truncated": _mean(r.rollout.finish_reason == LENGTH for r in responses),
        "staleness_steps": behind / max(1, num_written), "domains": {
            name: {"responses": len(values), **({"reward": _mean(values)} if has_reward else {})}
            for name, values in sorted(rewards.items()) if name}}


def _mean(values: Iterable[float]) -> float:
    found = np.fromiter(values, np.float64)
    return float(found.mean()) if len(found) else 0.0
