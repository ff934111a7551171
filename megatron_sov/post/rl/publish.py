"""From the store to a round that is trained: the last attempt at each response, with what the reward said of
it; groups get advantages, and their responses become documents.

A round is published once, by a rename, and never changes: whoever resumes trains what was trained.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from itertools import compress, groupby, pairwise
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
from megatron_sov.base.settings import by_name
from megatron_sov.chat.vocabulary import TOKENIZER_JSON, tokenizer_digest
from megatron_sov.engine.parallel.world import on_each, on_first
from megatron_sov.model.config import RunConfig
from megatron_sov.post.rl.advantages import (
    LEARNS as KEPT, Group, group_advantages, has_advantage, step_advantages)
from megatron_sov.post.rl.gathering import (
    Gathered, GatheredPiece, JudgedGroup, PublishedResponse, RolloutFacts, RoundOfStore, means_of)
from megatron_sov.post.rl.reward import NO_REWARD
from megatron_sov.post.rl.round_files import (
    DTYPE, RoundPiece, RoundShard, ShardWriter, WrittenShard, shards_of)
from megatron_sov.rollouts.prompts import PromptList, budget_of, round_pieces, sampling_digest, too_long_in
from megatron_sov.rollouts.rows import LENGTH, Key, RolloutPart, domain_of
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs import checkpoints
from megatron_sov.runs.rounds import TRAINED_GROUPS
from megatron_sov.train.data.described import source_record
from megatron_sov.train.data.requirements import replayed_routes
from megatron_sov.train.data.rounds import ADVANTAGE, DOMAINS, SHARE, SOURCE, folder_of_round
from megatron_sov.train.data.token_bytes import token_bytes
from megatron_sov.train.data.token_shards import CONTENT_VERSION

NO_PAIR = "no_pair"
"""Why a group is left out: no response that ended is better than its worst."""
SURPLUS = "surplus"
"""In the place of why a group is left out: it would learn, and the round is full."""
NO_ADVANTAGE = "no_advantage"
"""Why a group that is trained does not learn: the advantages of its trained responses are all 0."""
PROMPTS = "prompts"
"""In a round's manifest: digest of the prompts that rounds are made of, in their order."""
CHOSEN_BY = "chosen_by"
"""In a round's manifest: what tokens were chosen by beside the settings; see `Writer.chosen_by`."""
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
    groups = config.policy.learns_preferences and config.documents_per_unit == 1
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
    chosen_by: Mapping[str, Any] = field(default_factory=dict)
    """What tokens are chosen by; empty: other jobs write, and it is theirs."""
    _has_compared: bool = False
    _artifact: ArtifactWriter | None = None
    """The round under construction, on the process that completes it."""

    def publish(self, number: int) -> str:
        """Publish a round, unless it is; returns what it lacks, or "".  Called by all processes together, and
        each judges some of its pieces and writes some of its files.

        Raises:
            UserError: the store holds something else, a response is longer than a row or of another
                temperature, or the disk is full.
        """
        with contextlib.ExitStack() as building:
            begun = on_first(partial(self._begin, number))
            if isinstance(begun, str):
                return begun
            source = self._source(number, begun)
            shares = on_each(partial(self._gather, source, begun))
            planned = on_first(partial(self._plan, source, begun, shares, building))
            if isinstance(planned, str):
                return planned
            writer = self._writer
            found = on_each(lambda rank, size: [writer.write(planned.folder, shard)
                                                for shard in planned.shards[rank::size]])
            # by rank, each of which had every n-th one
            written = [found[i % len(found)][i // len(found)] for i in range(len(planned.shards))]
            on_first(partial(self._complete, planned, written, building))
        return ""

    def _begin(self, number: int) -> str | _Begun:
        """Return what of the store a round is made from; or what it lacks, or ""."""
        # The manifest is written last and a round never changes: with it there is nothing to do.
        if is_published(self.rounds, number):
            return ""
        if not self._is_begun():
            return f"nobody has written to {self.store} yet"
        self._compare_with_before(number)
        rollout, policy = self.config.rollout, self.config.policy
        own = math.ceil(rollout.prompts_per_round / rollout.piece_prompts)
        asked = further_pieces(self.rounds, number)
        # another run may have asked more of the store
        there = max((part.piece + 1 - own for part in self._opened.parts(number)), default=0)
        begun = _Begun(max(asked, there, (policy.parts.max_gen_batches - 1) * own), own + asked)
        parts = self._source(number, begun).parts()
        return parts if isinstance(parts, str) else replace(begun, parts=tuple(parts))

    def _compare_with_before(self, number: int) -> None:
        """Refuse other prompts than the round before was made of, since the order goes on behind it, and
        prompts that are asked otherwise; and tell once of another reward or environment, as a newer version
        of this program may have.

        Raises:
            UserError: they are others.
        """
        if self._has_compared:
            return
        last = next((n for n in range(number - 1, 0, -1) if is_published(self.rounds, n)), 0)
        if not last:
            return
        self._has_compared, folder = True, folder_of_round(self.rounds, last)
        before = read_manifest(folder, "tokens").content
        if before.get(PROMPTS, self._prompts_digest) != self._prompts_digest:
            raise UserError(f"{folder}: was made of other prompts, or in another order; pass the "
                            "--prompts that the run began with, or choose another --run")
        if before["reward_version"] != self.reward_version:
            warn(f"{folder}: was judged by reward version {before['reward_version'][:12]}, and round "
                 f"{number} will be by {self.reward_version[:12]}: the reward's code or settings changed, "
                 "and rewards of the two may not be compared")
        self._compare_asking(folder, before.get(CHOSEN_BY, {}))

    def _compare_asking(self, folder: Path, before: Mapping[str, Any]) -> None:
        # other jobs note nothing
        then, now = ({name: value for name, value in by_name(asked) if value != {}}
                     for asked in (before, self.chosen_by if before else {}))
        for name in sorted(then.keys() | now.keys() if now else ()):
            if (was := then.get(name)) == (given := now.get(name)):
                continue
            told = f"{folder}: was written with {name} = {was}, and the next round would be with {given}"
            if name != "environment" or was is None or given is None:
                raise UserError(f"{told}; resume with what the run began with, or choose another --run and "
                                "--store")
            warn(f"{told}: the environment's code or settings changed, and episodes of the two may not be "
                 "compared")

    @cached_property
    def _prompts_digest(self) -> str:
        return sampling_digest({"ids": self._asked.ids})

    def _gather(self, source: RoundOfStore, begun: _Begun, rank: int, size: int) -> list[GatheredPiece]:
        """Return the pieces that one of several processes looks at."""
        # attempts of a response are always in parts of its own piece
        parts = defaultdict[int, dict[int, RolloutPart]](dict)
        for i, part in enumerate(begun.parts):
            parts[part.piece][i] = part
        found = [source.gather(piece, parts[piece], self._judged,
                               lambda prompt: domain_of(self._record(prompt)))
                 for piece in range(begun.num_pieces)[rank::size]]
        self._tokens.cache_clear()
        return found

    def _plan(self, source: RoundOfStore, begun: _Begun, shares: Sequence[Sequence[GatheredPiece]],
              building: contextlib.ExitStack) -> str | RoundPlan:
        """Return what a round is written from, in a folder that `building` ends; or what it lacks."""
        number, out = source.number, folder_of_round(self.rounds, source.number)
        gathered = Gathered(number, begun.parts, tuple(sorted(
            (piece for share in shares for piece in share), key=lambda piece: piece.number)))
        if waits := source.waits(gathered):
            return waits
        self._refuse_nothing_judged(gathered)
        if asked := self._ask_further(source, gathered):
            return asked
        self._warn_of_other_policies(gathered)
        chosen = self._chosen(gathered)
        content = self._content(source, gathered, chosen)
        self._clear(number)
        self._artifact = building.enter_context(new_artifact(out, "tokens"))
        (self._artifact.path / SOURCE).mkdir()
        return RoundPlan(self._artifact.path, tuple(shards_of(_pieces(gathered, chosen))), content)

    def _clear(self, number: int) -> None:
        """Delete what no resume needs of rounds before one: their tokens and columns, which can be made again
        from the store; a manifest says what a round was, and what has joined it."""
        folder = self.rounds.parent / checkpoints.CHECKPOINTS_FOLDER
        begins = min(map(checkpoints.checkpoint_step, checkpoints.list_complete(folder)), default=0)
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

    def _source(self, number: int, begun: _Begun) -> RoundOfStore:
        rollout = self.config.rollout
        return RoundOfStore(
            self._opened, number, round_pieces(self._asked, rollout, number, begun.more), begun.num_pieces,
            rollout.samples_per_prompt, self.reward_version)

    def _ask_further(self, source: RoundOfStore, gathered: Gathered) -> str:
        """Ask further prompts, where too few groups of a round learn; returns what is waited for, "": the
        round is full, or as full as it may be."""
        rollout, policy = self.config.rollout, self.config.policy
        if policy.parts.max_gen_batches == 1:
            return ""
        num_learn = gathered.reasons.count(KEPT)
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
        if not store.is_written_in(self.tokenizer):
            raise UserError(f"{self.store}: is written in another tokenizer ({store.tokenizer_digest[:24]}) "
                            f"than {self.tokenizer / TOKENIZER_JSON} "
                            f"({tokenizer_digest(self.tokenizer)[:24]}); pass the store that this model's "
                            "policies write to")
        return store

    def _refuse_nothing_judged(self, gathered: Gathered) -> None:
        """Raise `UserError` where the reward has failed throughout: a run would pass over one round after the
        other."""
        if gathered.unjudged and not len(gathered.rows):
            told = ", ".join(f"{count:,} {status}" for status, count in gathered.unjudged.items())
            why = next((f", the first because {said.reason}" for part in gathered.parts
                        for said in self._opened.read_rewards(self.reward_version, part.name, part)
                        if said.reward is None and said.reason), "")
            mend = ("mend what the reward runs on, and have it judge again behind `megatron-sov rl store gc "
                    f"{self.store} --version {self.reward_version}`")
            if {*gathered.unjudged} == {"refused"}:
                mend = ("give --prompts what the reward reads (a field of another name by --columns "
                        "TARGET=FIELD), and begin with another --run and --store")
            raise UserError(f"{self.store}: no response of round {gathered.number} has a reward ({told}{why})"
                            f"; {mend}")

    def _warn_of_other_policies(self, gathered: Gathered) -> None:
        """Tell where responses were begun by another policy than the run is: a store gives what it has to
        whoever asks the same, and another run may have written it."""
        for step, sha256 in sorted(set[tuple[int, str]]().union(*(piece.begun for piece in gathered.pieces))):
            if not self.is_own(step, sha256):
                warn(f"{self.store}: responses of round {gathered.number} were begun by policy {sha256[:12]} "
                     f"of step {step}, which {self.rounds.parent} is not: where another run has written "
                     "them, give each run a store of its own")

    def _content(self, source: RoundOfStore, gathered: Gathered, chosen: _Chosen) -> dict[str, Any]:
        """Return what the manifest says of a round but for its sources."""
        return {
            "content_version": CONTENT_VERSION, "tokenizer_sha256": source.store.tokenizer_digest,
            "vocab_size": source.store.vocab_size, "dtype": DTYPE, "eod": "none",
            "bos_id": None, "eos_id": None,  # a response begins and ends where its policy had it
            "round": gathered.number, "steps": chosen.steps, "groups": chosen.reasons,
            PROMPTS: self._prompts_digest, **({CHOSEN_BY: dict(self.chosen_by)} if self.chosen_by else {}),
            "unjudged": gathered.unjudged, "reward_version": source.reward_version,
            "temperature": self.config.rollout.temperature,
            "policies": sorted(set[str]().union(*(piece.policies for piece in gathered.pieces))),
            "store": [{"name": part.name, "rollouts": part.manifest_sha256, "rewards": manifest_sha256(
                source.store.part_path(part.name, source.reward_version))} for part in gathered.parts],
            "means": means_of(gathered, self.config.rollout, None if self.reward_version == NO_REWARD
                              else self.config.policy.right_from),
            **({DOMAINS: self._domains_of(gathered, chosen)} if self.config.policy.parts.opd_coeff
               else {})}

    def _domains_of(self, gathered: Gathered, chosen: _Chosen) -> list[tuple[str, int]]:
        """Return the domains of a round's documents, each with how many lie together."""
        # in the order of `_pieces`
        domains = compress(gathered.domain_of_row, chosen.is_trained.tolist())
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
    def _tokens(self) -> Any:
        """What gives the column of tokens of a part; the groups of a piece are looked at one after the
        other, and are mostly in the same one."""
        return lru_cache(maxsize=2)(
            lambda part: self._opened.table_of(self._opened.part(part), ("tokens",))["tokens"])

    @cached_property
    def _routes(self) -> RouteShape | None:
        return replayed_routes(self.config)

    @cached_property
    def _writer(self) -> ShardWriter:
        return ShardWriter(self._opened, self.config.rollout.temperature, self.config.data.phases[0].seq_len,
                           self._routes, token_bytes(self.tokenizer, self.config.model.vocab_size),
                           published_numbers(self.config))

    def _chosen(self, gathered: Gathered) -> _Chosen:
        """Give each step's groups their advantages."""
        num_steps, reasons, rows = self.config.rollout.steps_per_round, Counter[str](), gathered.rows
        groups = [Group(rows["advantage"][place], reason)
                  for place, reason in zip(gathered.groups, gathered.reasons, strict=True)]
        learned = self._filling(gathered, reasons)
        bounds = [len(learned) * step // num_steps for step in range(num_steps + 1)]
        values, is_trained = np.zeros(len(rows), np.float32), np.zeros(len(rows), bool)
        steps: list[list[int]] = []
        num_found = 0
        for first, end in pairwise(bounds):
            step = learned[first:end]
            for i, said in zip(step, step_advantages([groups[i] for i in step], self.config.policy),
                               strict=True):
                if said.reason:
                    reasons[said.reason] += 1
                    continue
                place = gathered.groups[i]
                values[place], is_trained[place] = said.advantages, rows["order"][place] >= 0
                trained = values[place][is_trained[place]]
                learns = has_advantage(trained) or not self.config.policy.learns_from_rewards
                reasons[TRAINED_GROUPS if learns else NO_ADVANTAGE] += 1
                num_found += len(trained)
            before = sum(steps[-1]) if steps else 0
            steps.append([before, num_found - before])
        return _Chosen(values, is_trained, steps, dict(reasons))

    def _learned_of(self, group: Sequence[PublishedResponse], said: Group) -> tuple[list[int], str]:
        """Return which of a group's responses are learned, in the order of their documents, and why none
        is."""
        if said.reason:
            return [], said.reason
        if not self.config.policy.learns_preferences:
            return [i for i, r in enumerate(group) if not self._is_masked(r.rollout)], ""
        keep, values = self.config.policy.keep_unfinished, said.advantages.tolist()
        ended = [keep or r.rollout.finish_reason not in TRUNCATED for r in group]
        if self.config.documents_per_unit == 1:
            return [i for i, (place, whole) in enumerate(zip(values, ended, strict=True))
                    if is_learned(place, whole)], ""
        pair, _ = pair_of(values, ended, lambda i, j: self._is_same(group[i].rollout, group[j].rollout))
        return (list(pair), "") if pair else ([], NO_PAIR)

    def _is_same(self, one: RolloutFacts, other: RolloutFacts) -> bool:
        """Return whether two responses are the same tokens, which a reward has judged in two ways."""
        if one.num_tokens != other.num_tokens:
            return False
        first, second = (self._tokens(row.part)[row.row] for row in (one, other))
        return bool(first == second)

    def _judged(self, groups: Sequence[Sequence[PublishedResponse]]) -> list[JudgedGroup]:
        return [JudgedGroup(said.advantages, *self._learned_of(group, said))
                for group, said in zip(groups, self._judge_groups(groups), strict=True)]

    def _filling(self, gathered: Gathered, reasons: Counter[str]) -> Sequence[int]:
        """Return which groups a round is made of: its own, or where others stand in for them the first that
        learn, and count why the others are left out."""
        if self.config.policy.parts.max_gen_batches == 1:
            return range(len(gathered.groups))
        learning = [i for i, reason in enumerate(gathered.reasons) if reason == KEPT]
        kept = learning[:self.config.rollout.prompts_per_round]
        reasons.update(gathered.reasons)
        del reasons[KEPT]  # they are counted with their advantages
        if surplus := len(learning) - len(kept):
            reasons[SURPLUS] = surplus
        return kept

    def _is_masked(self, response: RolloutFacts) -> bool:
        return self.config.policy.mask_truncated and response.finish_reason in TRUNCATED

    def _judge_groups(self, groups: Sequence[Sequence[PublishedResponse]]) -> list[Group]:
        return group_advantages([np.array([r.reward for r in group]) for group in groups],
                                [np.array([r.rollout.num_written for r in group]) for group in groups],
                                self.config.policy, self.config.rollout.max_new_tokens,
                                [np.array([self._budget(r.rollout.key) for r in group], np.float64)
                                 for group in groups])

    def _budget(self, key: Key) -> float:
        """Return the tokens that a response was asked to have; NaN: nobody asked."""
        asked = budget_of(self.config.rollout, key.prompt, self._record(key.prompt), key.sample)
        return np.nan if asked is None else asked

@dataclass(frozen=True)
class _Begun:
    """What of the store a round is made from, as the first process found it."""

    more: int
    """Pieces of further prompts that the round may have."""
    num_pieces: int
    """That are asked."""
    parts: tuple[RolloutPart, ...] = ()


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

    advantages: np.ndarray
    """[rows of the round] float32."""
    is_trained: np.ndarray
    """[rows of the round] bool."""
    steps: list[list[int]]
    """First document and number of documents of each optimizer step."""
    reasons: dict[str, int]
    """`LEARNS`, or why not -> groups of the round itself."""


def _pieces(gathered: Gathered, chosen: _Chosen) -> Iterator[RoundPiece]:
    """Yield the documents of a round."""
    counts = np.array([place.stop - place.start for place in gathered.groups])
    ends = np.cumsum([0, *(len(piece.rows) for piece in gathered.pieces)]).tolist()
    for first, end in pairwise(ends):
        trained = first + np.flatnonzero(chosen.is_trained[first:end])
        if len(trained):
            # a pair's better response goes first, whatever its number
            trained = trained[np.lexsort((gathered.rows["order"][trained], gathered.group_of_row[trained]))]
            rows = gathered.rows[trained]
            parts, places = np.unique(rows["part"], return_inverse=True)
            yield RoundPiece(tuple(gathered.parts[i].name for i in parts.tolist()),
                             np.stack([places, rows["row"]], 1).astype(np.int32),
                             {ADVANTAGE: chosen.advantages[trained],
                              SHARE: (1 / counts[gathered.group_of_row[trained]]).astype(np.float32)},
                             int(rows["tokens"].sum()))
