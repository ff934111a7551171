"""Publishes rounds: judged groups in the rollout store get advantages, and responses become documents.

`Publisher.publish` renames the folder of a round once and never changes it afterwards: a resumed run trains
on the same documents.
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
    MANIFEST, ArtifactWriter, create_artifact, manifest_sha256, read_manifest, translate_disk_errors)
from megatron_sov.base.documents import ROLLOUTS
from megatron_sov.base.documents.groups import choose_pair, should_train
from megatron_sov.base.documents.shard_files import CONTENT_VERSION, ROUTES, RouteShape, build_source_record
from megatron_sov.base.errors import UserError, warn
from megatron_sov.base.sealed import read_sealed_json, write_sealed_json
from megatron_sov.base.settings import iter_leaves
from megatron_sov.chat.vocabulary import TOKENIZER_JSON, tokenizer_digest
from megatron_sov.engine.parallel.world import run_on_each_rank, run_on_first
from megatron_sov.model.config import RunConfig
from megatron_sov.post.rl.publish.advantages import (
    LEARNS as GROUP_LEARNS, GroupAdvantages, compute_advantages, compute_step_advantages, has_advantage)
from megatron_sov.post.rl.publish.groups import (
    JudgedGroup, JudgedPiece, JudgedResponse, JudgedRound, RolloutFacts, StoredRound)
from megatron_sov.post.rl.publish.metrics import compute_means
from megatron_sov.post.rl.publish.shards import (
    DTYPE, RoundPiece, RoundShard, ShardWriter, WrittenShard, split_into_shards)
from megatron_sov.post.rl.reward import NO_REWARD
from megatron_sov.rollouts.prompts import PromptList, read_too_long, sampling_digest
from megatron_sov.rollouts.round_order import plan_round_pieces
from megatron_sov.rollouts.rows import LENGTH, RolloutPart, read_domain
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs import checkpoints
from megatron_sov.runs.rounds import TRAINED_GROUPS
from megatron_sov.train.data.requirements import build_replay_shape
from megatron_sov.train.data.rounds import (
    ADVANTAGE, DOCUMENT_DOMAINS, GROUP_SHARE, ROUNDS_SOURCE, round_folder)
from megatron_sov.train.data.token_bytes import count_token_bytes

NO_PAIR = "no_pair"
"""Why a group does not learn: no finished response is better than the worst response."""
SURPLUS = "surplus"
"""Why a group is not used: the round is full."""
NO_ADVANTAGE = "no_advantage"
"""Why a group does not learn: all trained responses have advantage 0."""
PROMPTS = "prompts"
"""Manifest field: digest over the prompts for all rounds, in order."""
CHOSEN_BY = "chosen_by"
"""Manifest field: see `RolloutSource.chosen_by`."""
TRUNCATED = (LENGTH, "tokens", "unended")
"""Finish reasons for responses and episodes that a token limit cut off."""


@dataclass(kw_only=True)
class Publisher:
    """Publishes a run's rounds; every process has an object."""

    config: RunConfig
    rounds: Path
    """RUN/rounds."""
    store: Path
    """Rollout store, which the first writer creates."""
    prompts: PromptList
    reward_version: str
    tokenizer: Path
    is_own: Callable[[int, str], bool] = lambda step, sha256: True
    """(step, digest) -> whether a policy may belong to this run, see `RunPolicies.is_own`."""
    chosen_by: Mapping[str, Any] = field(default_factory=dict)
    """See `RolloutSource.chosen_by`; {} if other jobs generate."""
    _has_compared: bool = False
    _artifact: ArtifactWriter | None = None
    """The round under construction, on rank 0."""

    def publish(self, number: int) -> str:
        """Publish a round if it is complete; return a description of missing parts, or "" if it is published.

        All processes call `publish` together; they share the pieces to judge and the shards to write. Raises
        `UserError`: the store contains other rounds, a response is longer than a row or has another
        temperature, or the disk is full.
        """
        with contextlib.ExitStack() as building:
            inputs = run_on_first(partial(self._find_inputs, number))
            if isinstance(inputs, str):  # a description of missing parts
                return inputs
            source = self._open_round(number, inputs)
            shares = run_on_each_rank(partial(self._judge_round, source, inputs))
            plan = run_on_first(partial(self._plan_round, source, inputs, shares, building))
            if isinstance(plan, str):
                return plan
            writer = self._shard_writer
            written_by_rank = run_on_each_rank(
                lambda rank, size: [writer.write(plan.folder, shard) for shard in plan.shards[rank::size]])
            # Rank r wrote the shards r, r + size, ...
            num_ranks = len(written_by_rank)
            written = [written_by_rank[i % num_ranks][i // num_ranks] for i in range(len(plan.shards))]
            run_on_first(partial(self._complete_round, plan, written, building))
        return ""

    def check_store(self) -> None:
        """Check that `store` is missing, empty, or a rollout store with the model's tokenizer."""
        if self._store_exists():
            _ = self._opened_store

    def _find_inputs(self, number: int) -> str | _RoundInputs:
        """Find a round's parts, or describe missing parts; "" if the round is published."""
        # The manifest is written last, and a published round never changes.
        if is_published(self.rounds, number):
            return ""
        if not self._store_exists():
            return f"no job has written to {self.store} yet"
        self._compare_with_previous(number)
        rollout, policy = self.config.rollout, self.config.policy
        num_pieces = math.ceil(rollout.prompts_per_round / rollout.piece_prompts)
        requested = read_further_pieces(self.rounds, number)
        # Another run may have requested more pieces in the same store.
        stored = max((part.piece + 1 - num_pieces for part in self._opened_store.parts(number)), default=0)
        num_further = max(requested, stored, (policy.parts.max_gen_batches - 1) * num_pieces)
        inputs = _RoundInputs(num_further, num_pieces + requested)
        parts = self._open_round(number, inputs).parts()
        return parts if isinstance(parts, str) else replace(inputs, parts=tuple(parts))

    def _compare_with_previous(self, number: int) -> None:
        """Compare prompts, reward and sampling with the previous round, once per process.

        Other prompts or sampling settings raise `UserError`, because rounds continue the order of prompts.
        Another reward or environment warns, because a new version of this program may have changed it.
        """
        if self._has_compared:
            return
        last = next((n for n in range(number - 1, 0, -1) if is_published(self.rounds, n)), 0)
        if not last:
            return
        self._has_compared, folder = True, round_folder(self.rounds, last)
        previous = read_manifest(folder, "tokens").content
        if previous.get(PROMPTS, self._prompts_digest) != self._prompts_digest:
            raise UserError(f"{folder}: was made of other prompts, or in another order; pass the "
                            "--prompts that the run began with, or choose another --run")
        if previous["reward_version"] != self.reward_version:
            warn(f"{folder}: was judged by reward version {previous['reward_version'][:12]}, and round "
                 f"{number} will be by {self.reward_version[:12]}: the code or settings of the reward "
                 "changed, and their rewards are not comparable")
        self._compare_sampling(folder, previous.get(CHOSEN_BY, {}))

    def _compare_sampling(self, folder: Path, previous: Mapping[str, Any]) -> None:
        """Raise `UserError` for changed settings; warn if only the version of the environment changed."""
        # Rounds by other jobs record no settings.
        if not previous or not self.chosen_by:
            return
        previous_settings = {name: value for name, value in iter_leaves(previous) if value != {}}
        current_settings = {name: value for name, value in iter_leaves(self.chosen_by) if value != {}}
        for name in sorted(previous_settings.keys() | current_settings.keys()):
            previous_value, current_value = previous_settings.get(name), current_settings.get(name)
            if previous_value == current_value:
                continue
            change = (f"{folder}: was generated with {name} = {previous_value}, and the next round would be "
                      f"with {current_value}")
            if name != "environment" or previous_value is None or current_value is None:
                raise UserError(f"{change}; resume with the settings that began the run, or choose another "
                                "--run and --store")
            warn(f"{change}: the code or settings of the environment changed, and their episodes are not "
                 "comparable")

    @cached_property
    def _prompts_digest(self) -> str:
        return sampling_digest({"ids": self._used_prompts.ids})

    def _open_round(self, number: int, inputs: _RoundInputs) -> StoredRound:
        rollout = self.config.rollout
        return StoredRound(
            store=self._opened_store, number=number, num_pieces=inputs.num_pieces,
            pieces=plan_round_pieces(self._used_prompts, rollout, number, inputs.num_further),
            samples_per_prompt=rollout.samples_per_prompt, reward_version=self.reward_version)

    def _judge_round(self, source: StoredRound, inputs: _RoundInputs, rank: int, size: int
                     ) -> list[JudgedPiece]:
        """Judge pieces rank, rank + size, ... in a round."""
        # All attempts at a response are in parts with the same piece number.
        parts = defaultdict[int, dict[int, RolloutPart]](dict)
        for i, part in enumerate(inputs.parts):
            parts[part.piece][i] = part
        pieces = [source.judge_piece(piece, parts[piece], self._judge_groups, self._find_domain)
                  for piece in range(inputs.num_pieces)[rank::size]]
        self._read_tokens.cache_clear()
        return pieces

    def _find_domain(self, prompt: str) -> str:
        return read_domain(self._read_record(prompt))

    def _plan_round(self, source: StoredRound, inputs: _RoundInputs, shares: Sequence[Sequence[JudgedPiece]],
                    building: contextlib.ExitStack) -> str | RoundPlan:
        """Plan the files in a folder that `building` renames on exit, or describe missing responses.
        `shares`: the pieces that each rank judged."""
        number, out = source.number, round_folder(self.rounds, source.number)
        pieces = sorted((piece for share in shares for piece in share), key=lambda piece: piece.number)
        gathered = JudgedRound(number, inputs.parts, tuple(pieces))
        if reason := source.describe_wait(gathered):
            return reason
        self._check_rewards(gathered)
        if reason := self._request_further(source, gathered):
            return reason
        self._warn_about_foreign_policies(gathered)
        selection = self._select_responses(gathered)
        content = self._build_content(source, gathered, selection)
        self._prune_rounds(number)
        self._artifact = building.enter_context(create_artifact(out, "tokens"))
        (self._artifact.path / ROUNDS_SOURCE).mkdir()
        shards = split_into_shards(_iter_pieces(gathered, selection))
        return RoundPlan(self._artifact.path, tuple(shards), content)

    def _prune_rounds(self, number: int) -> None:
        """Delete tokens and columns in old rounds that no resume needs and the store can rebuild. The
        manifests remain as records."""
        complete = checkpoints.list_complete(self.rounds.parent / checkpoints.CHECKPOINTS_FOLDER)
        oldest_step = min(map(checkpoints.checkpoint_step, complete), default=0)
        rollout = self.config.rollout
        first_resumable = oldest_step // rollout.steps_per_round + 1
        for old in range(1, min(first_resumable, number - rollout.keep_rounds)):
            folder = round_folder(self.rounds, old)
            if not (folder / ROUNDS_SOURCE).is_dir():
                continue
            parts = read_manifest(folder).content["store"]
            if not all((self._opened_store.part_path(part["name"]) / MANIFEST).is_file() for part in parts):
                continue
            with translate_disk_errors(folder):
                for column in self.rounds.glob(f"{folder.name}.*.f32"):
                    column.unlink()
                shutil.rmtree(folder / ROUNDS_SOURCE)

    def _request_further(self, source: StoredRound, gathered: JudgedRound) -> str:
        """Request further prompts if too few groups in a round learn (dynamic sampling, DAPO, arXiv
        2503.14476, section 3.2); return the reason to wait, or ""."""
        rollout, policy = self.config.rollout, self.config.policy
        if policy.parts.max_gen_batches == 1:
            return ""
        num_learn = gathered.reasons.count(GROUP_LEARNS)
        num_missing, num_prompts = rollout.prompts_per_round - num_learn, len(source.prompts)
        if num_missing <= 0:
            return ""
        # Request enough prompts to fill the round if the share of learning groups does not change.
        num_requested = min(num_missing * num_prompts / num_learn if num_learn else math.inf,
                            rollout.prompts_per_round)
        num_pieces = math.ceil(rollout.prompts_per_round / rollout.piece_prompts)
        max_pieces = min(len(source.pieces), policy.parts.max_gen_batches * num_pieces)
        num_new_pieces = min(math.ceil(num_requested / rollout.piece_prompts), max_pieces - source.num_pieces)
        state = (f"{num_learn} of {num_prompts} groups of round {source.number} learn, and the round needs "
                 f"{rollout.prompts_per_round}")
        if num_new_pieces <= 0:
            reason = f"policy.max_gen_batches = {policy.parts.max_gen_batches}"
            if max_pieces < policy.parts.max_gen_batches * num_pieces:
                reason = "no prompts are left"
            warn(f"{state}; {reason}: the run trains on these groups")
            return ""
        file = _further_file(self.rounds, source.number)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_sealed_json(file, {"pieces": source.num_pieces - num_pieces + num_new_pieces}, file.name)
        count = sum(len(piece.prompts) for piece in source.pieces[source.num_pieces:][:num_new_pieces])
        return f"{state}: {count} further prompts are requested"

    def _store_exists(self) -> bool:
        return self.store.exists() and (not self.store.is_dir() or any(self.store.iterdir()))

    @cached_property
    def _opened_store(self) -> RolloutStore:
        """The store, opened once: warnings about invalid rows appear once."""
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

    def _check_rewards(self, gathered: JudgedRound) -> None:
        """Raise `UserError` if no response has a reward: the run would skip every round."""
        if len(gathered.rows) or not gathered.unjudged:
            return
        counts = ", ".join(f"{count:,} {status}" for status, count in gathered.unjudged.items())
        rewards = (reward for part in gathered.parts
                   for reward in self._opened_store.read_rewards(self.reward_version, part.name, part))
        reason = next((f", the first because {reward.reason}" for reward in rewards
                       if reward.reward is None and reward.reason), "")
        fix = ("repair the programs and services of the reward, and judge again after `megatron-sov rl store "
               f"gc {self.store} --version {self.reward_version}`")
        if {*gathered.unjudged} == {"refused"}:
            fix = ("add the fields that the reward reads to --prompts (or rename fields by --columns "
                   "TARGET=FIELD), and begin with another --run and --store")
        raise UserError(f"{self.store}: no response of round {gathered.number} has a reward "
                        f"({counts}{reason}); {fix}")

    def _warn_about_foreign_policies(self, gathered: JudgedRound) -> None:
        """Warn if a policy outside this run began responses: a store serves all runs with equal settings."""
        begun = set[tuple[int, str]]().union(*(piece.begun for piece in gathered.pieces))
        for step, sha256 in sorted(begun):
            if not self.is_own(step, sha256):
                warn(f"{self.store}: policy {sha256[:12]} of step {step} began responses of round "
                     f"{gathered.number} and does not belong to {self.rounds.parent}: if another run wrote "
                     "them, give each run a separate --store")

    def _build_content(self, source: StoredRound, gathered: JudgedRound, selection: _Selection
                       ) -> dict[str, Any]:
        """Return the manifest content except `sources`."""
        right_from = None if self.reward_version == NO_REWARD else self.config.policy.right_from
        parts = [{"name": part.name, "rollouts": part.manifest_sha256, "rewards": manifest_sha256(
            source.store.part_path(part.name, source.reward_version))} for part in gathered.parts]
        content = {
            "content_version": CONTENT_VERSION, "tokenizer_sha256": source.store.tokenizer_digest,
            "vocab_size": source.store.vocab_size, "dtype": DTYPE, "eod": "none",
            "bos_id": None, "eos_id": None,  # responses begin and end as their policy generated them
            "round": gathered.number, "steps": selection.steps, "groups": selection.reasons,
            PROMPTS: self._prompts_digest}
        if self.chosen_by:
            content[CHOSEN_BY] = dict(self.chosen_by)
        content |= {
            "unjudged": gathered.unjudged, "reward_version": source.reward_version,
            "temperature": self.config.rollout.temperature,
            "policies": sorted(set[str]().union(*(piece.policies for piece in gathered.pieces))),
            "store": parts, "means": compute_means(gathered, self.config.rollout, right_from)}
        if self.config.policy.parts.opd_coeff:
            content[DOCUMENT_DOMAINS] = _list_domains(gathered, selection)
        return content

    def _complete_round(self, plan: RoundPlan, written: Sequence[WrittenShard],
                        building: contextlib.ExitStack) -> None:
        """Write the manifest after the shards, and rename the folder."""
        artifact = self._artifact
        assert artifact is not None, "no round is under construction"
        shards = [{"prefix": shard.prefix, **files.counts}
                  for shard, files in zip(plan.shards, written, strict=True)]
        record = build_source_record(ROUNDS_SOURCE, ROLLOUTS, self._shard_writer.sidecars, shards)
        if self._route_shape is not None:
            record[ROUTES] = self._route_shape.record()
        artifact.content = {**plan.content, "sources": [record]}
        artifact.settings = {"rollout": self.config.to_dict()["rollout"],
                             "policy": self.config.to_dict()["policy"]}
        artifact.hashed_files = {name: file for files in written for name, file in files.files.items()}
        building.close()

    @cached_property
    def _used_prompts(self) -> PromptList:
        """Prompts for the rounds, without the overlong prompts that generating jobs recorded."""
        return self.prompts.exclude(read_too_long(self.store))

    @cached_property
    def _read_record(self) -> Callable[[str], Mapping[str, Any]]:
        """Prompt id -> record, cached: consecutive calls mostly concern one group."""
        return lru_cache(maxsize=64)(self.prompts.read_record)

    @cached_property
    def _read_tokens(self) -> Any:
        """Part name -> column of tokens, cached: consecutive calls mostly concern one part."""
        return lru_cache(maxsize=2)(
            lambda part: self._opened_store.read_columns(self._opened_store.part(part),
                                                         ("tokens",))["tokens"])

    @cached_property
    def _route_shape(self) -> RouteShape | None:
        return build_replay_shape(self.config)

    @cached_property
    def _shard_writer(self) -> ShardWriter:
        return ShardWriter(
            store=self._opened_store, temperature=self.config.rollout.temperature,
            seq_len=self.config.data.phases[0].seq_len, routes=self._route_shape,
            bytes_of_token=count_token_bytes(self.tokenizer, self.config.model.vocab_size),
            numbers=list_number_columns(self.config))

    def _select_responses(self, gathered: JudgedRound) -> _Selection:
        """Distribute a round's groups over the optimizer steps, and compute the advantages per step."""
        num_steps, reasons, rows = self.config.rollout.steps_per_round, Counter[str](), gathered.rows
        groups = [GroupAdvantages(rows["advantage"][rows_of_group], reason)
                  for rows_of_group, reason in zip(gathered.groups, gathered.reasons, strict=True)]
        used_groups = self._choose_groups(gathered, reasons)
        bounds = [len(used_groups) * step // num_steps for step in range(num_steps + 1)]
        advantages, is_trained = np.zeros(len(rows), np.float32), np.zeros(len(rows), bool)
        steps: list[list[int]] = []
        num_documents = 0
        for first, end in pairwise(bounds):
            indices = used_groups[first:end]
            step_advantages = compute_step_advantages([groups[i] for i in indices], self.config.policy)
            for i, group in zip(indices, step_advantages, strict=True):
                if group.reason:
                    reasons[group.reason] += 1
                    continue
                rows_of_group = gathered.groups[i]
                advantages[rows_of_group] = group.advantages
                is_trained[rows_of_group] = rows["order"][rows_of_group] >= 0
                trained_advantages = advantages[rows_of_group][is_trained[rows_of_group]]
                is_learning = has_advantage(trained_advantages) or not self.config.policy.learns_from_rewards
                reasons[TRAINED_GROUPS if is_learning else NO_ADVANTAGE] += 1
                num_documents += len(trained_advantages)
            first_document = sum(steps[-1]) if steps else 0
            steps.append([first_document, num_documents - first_document])
        return _Selection(advantages, is_trained, steps, dict(reasons))

    def _choose_groups(self, gathered: JudgedRound, reasons: Counter[str]) -> Sequence[int]:
        """Return the group indices to use: all, or with further prompts the first groups that learn.
        `reasons` counts the excluded groups."""
        if self.config.policy.parts.max_gen_batches == 1:
            return range(len(gathered.groups))
        learning = [i for i, reason in enumerate(gathered.reasons) if reason == GROUP_LEARNS]
        used = learning[:self.config.rollout.prompts_per_round]
        reasons.update(gathered.reasons)
        del reasons[GROUP_LEARNS]  # counted with their advantages
        if surplus := len(learning) - len(used):
            reasons[SURPLUS] = surplus
        return used

    def _judge_groups(self, groups: Sequence[Sequence[JudgedResponse]]) -> list[JudgedGroup]:
        group_advantages = compute_advantages(
            [np.array([r.reward for r in group]) for group in groups],
            [np.array([r.rollout.num_written for r in group]) for group in groups],
            self.config.policy, self.config.rollout.max_new_tokens)
        return [JudgedGroup(advantages.advantages, *self._choose_responses(group, advantages))
                for group, advantages in zip(groups, group_advantages, strict=True)]

    def _choose_responses(self, group: Sequence[JudgedResponse], advantages: GroupAdvantages
                          ) -> tuple[list[int], str]:
        """Return (indices of the responses to train on, in document order; reason if there are none)."""
        if advantages.reason:
            return [], advantages.reason
        policy = self.config.policy
        is_truncated = [response.rollout.finish_reason in TRUNCATED for response in group]
        if not policy.learns_preferences:
            masks = policy.mask_truncated
            return [i for i, truncated in enumerate(is_truncated) if not (masks and truncated)], ""
        values = advantages.advantages.tolist()
        may_be_best = [policy.keep_unfinished or not truncated for truncated in is_truncated]
        if self.config.documents_per_unit == 1:
            return [i for i, (value, may_win) in enumerate(zip(values, may_be_best, strict=True))
                    if should_train(value, may_win)], ""
        pair, _ = choose_pair(values, may_be_best,
                              lambda i, j: self._has_equal_tokens(group[i].rollout, group[j].rollout))
        return (list(pair), "") if pair else ([], NO_PAIR)

    def _has_equal_tokens(self, first: RolloutFacts, second: RolloutFacts) -> bool:
        """Return whether two responses have the same tokens: a pair of them would teach nothing."""
        if first.num_tokens != second.num_tokens:
            return False
        first_tokens, second_tokens = (self._read_tokens(row.part)[row.row] for row in (first, second))
        return bool(first_tokens == second_tokens)


@dataclass(frozen=True)
class _RoundInputs:
    """Parts in the store for a round, listed by rank 0."""

    num_further: int
    """Pieces of further prompts that the round may have."""
    num_pieces: int
    """Pieces in use, requested further pieces included."""
    parts: tuple[RolloutPart, ...] = ()


@dataclass(frozen=True)
class RoundPlan:
    """Files to write for a round."""

    folder: Path
    """Temporary folder."""
    shards: tuple[RoundShard, ...]
    content: dict[str, Any]
    """Manifest content except `sources`."""


@dataclass(frozen=True)
class _Selection:
    """Responses of a round to train on; rows are those of `JudgedRound.rows`."""

    advantages: np.ndarray
    """[rows] float32."""
    is_trained: np.ndarray
    """[rows] bool."""
    steps: list[list[int]]
    """[first document, document count] per optimizer step."""
    reasons: dict[str, int]
    """`TRAINED_GROUPS`, or why groups do not learn -> number of groups."""


def read_further_pieces(rounds: Path, number: int) -> int:
    """Read the number of requested pieces of further prompts for a round (`policy.max_gen_batches`)."""
    file = _further_file(rounds, number)
    if not file.is_file():
        return 0
    return int(read_sealed_json(file, "delete it, and it is written again", file.name)["pieces"])


def _further_file(rounds: Path, number: int) -> Path:
    folder = round_folder(rounds, number)
    return folder.with_name(f"{folder.name}.further.json")


def list_number_columns(config: RunConfig) -> tuple[str, ...]:
    """Return the names of the columns with a number per response."""
    learns_groups = config.policy.learns_preferences and config.documents_per_unit == 1
    return (ADVANTAGE, GROUP_SHARE) if learns_groups else (ADVANTAGE,)


def is_published(rounds: Path, number: int) -> bool:
    return (round_folder(rounds, number) / MANIFEST).is_file()


def _list_domains(gathered: JudgedRound, selection: _Selection) -> list[tuple[str, int]]:
    """Return the documents' domains, in the order of `_iter_pieces`; (domain, number of documents) stands for
    consecutive documents of a domain."""
    domains = compress(gathered.row_domains, selection.is_trained.tolist())
    return [(domain, len(list(repeats))) for domain, repeats in groupby(domains)]


def _iter_pieces(gathered: JudgedRound, selection: _Selection) -> Iterator[RoundPiece]:
    """Yield a round's training documents, piece by piece."""
    group_sizes = np.array([rows.stop - rows.start for rows in gathered.groups])
    bounds = np.cumsum([0, *(len(piece.rows) for piece in gathered.pieces)]).tolist()
    for first, end in pairwise(bounds):
        trained = first + np.flatnonzero(selection.is_trained[first:end])  # indices in `gathered.rows`
        if not len(trained):
            continue
        # The better response in a pair comes first.
        trained = trained[np.lexsort((gathered.rows["order"][trained], gathered.row_groups[trained]))]
        rows = gathered.rows[trained]
        parts, row_parts = np.unique(rows["part"], return_inverse=True)
        yield RoundPiece(
            parts=tuple(gathered.parts[i].name for i in parts.tolist()),
            places=np.stack([row_parts, rows["row"]], 1).astype(np.int32),
            numbers={ADVANTAGE: selection.advantages[trained],
                     GROUP_SHARE: (1 / group_sizes[gathered.row_groups[trained]]).astype(np.float32)},
            num_tokens=int(rows["tokens"].sum()))
