"""Brings the rounds that a run trains: waits for each, or writes and judges it by the model as it stands;
publishes it, and adds what the trainer says of it.

What the trainer says stands in RUN/rounds/0001.COLUMN.f32, a float32 for each token and a checksum of them
all, which is checked when they are read.  The policy's are computed anew whenever a run stands before the
round's first step; later its weights are others, and the file is what is read.  Of what is learned
first the policy's are those that the step computes itself: there they are NaN.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sov.base.artifacts import atomic_write, read_manifest, to_json
from megatron_sov.base.documents.shard_files import RouteShape
from megatron_sov.base.errors import UserError, warn
from megatron_sov.base.sealed import seal_damage
from megatron_sov.checkpoint import load
from megatron_sov.engine.model.local_shards import local_shards
from megatron_sov.engine.parallel import collectives
from megatron_sov.engine.parallel.values import sum_dict
from megatron_sov.engine.parallel.world import on_each, on_main
from megatron_sov.infer.decoder.generator import MegatronEngine
from megatron_sov.infer.request import Batching
from megatron_sov.judge.rewards.reward import Result
from megatron_sov.model.config import RolloutConfig, RunConfig
from megatron_sov.model.families.adapters import PREFIX
from megatron_sov.post.policy import OLD, REFERENCE, TEACHER, has_other_gradients
from megatron_sov.post.reference import write_logprobs
from megatron_sov.post.rl.advantages import has_advantage
from megatron_sov.post.rl.episodes import Episodes
from megatron_sov.post.rl.gathering import PASS_RATE, describe_groups, doubt_of_round, meters_of_round
from megatron_sov.post.rl.generate import Missing, PieceQueue, Writer, write_rounds
from megatron_sov.post.rl.publish import further_pieces
from megatron_sov.post.rl.requests import STEP_S, LiveServers, ResponseQueue, row_requests
from megatron_sov.post.rl.responses import ResponseSource, key_digest
from megatron_sov.post.rl.reward import JudgeRows, JudgingJob
from megatron_sov.post.rl.teachers import ScoringTeacher, identity_of, reverse_kl, write_teachers
from megatron_sov.post.rl.validation import SampledRounds, Validation
from megatron_sov.rollouts.prompts import PromptList, SetAside, list_set_aside, round_prompts
from megatron_sov.rollouts.rows import Rollout
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs import checkpoints
from megatron_sov.runs.checkpoints import hash_checkpoint_files
from megatron_sov.runs.folder import ROUNDS, RunFolder
from megatron_sov.runs.rounds import Policy, RunPolicies, can_generate_round
from megatron_sov.train.data.requirements import replayed_routes
from megatron_sov.train.data.rounds import ADVANTAGE, Round, RoundDocuments
from megatron_sov.train.stages.feed import FeedView
from megatron_sov.work.progress.locks import Claims

REFERENCE_NOTE = "reference.json"
"""File of RUN/rounds: which model `REFERENCE` is of."""
TEACHERS_NOTE = "teachers.json"
"""File of RUN/rounds: domain -> which teacher reads it."""


@dataclass(frozen=True)
class TrainerColumns:
    """The columns of a run."""

    names: tuple[str, ...]
    """`OLD`: log p(label) of the policy that begins a round; `REFERENCE`: of the model that the run starts
    from; `TEACHER`: of teachers; those that are needed."""
    temperature: float
    """What logits are divided by."""
    routes: RouteShape | None
    """Of routes that are replayed, by the policy alone: the reference routes as it does; None: none are."""
    with_reference: Callable[[FeedView, Callable[[], None]], None]
    """(run, compute): calls `compute` where the model has the reference's weights."""
    reference_sha256: str = ""
    """What stands for the reference's weights."""
    teachers: tuple[ScoringTeacher, ...] = ()
    """Of `TEACHER`."""

    def of_round(self, view: FeedView, number: int, opened: Round, *, is_first: bool
                 ) -> dict[str, np.ndarray]:
        """Return column -> a number for each token of a round; called by all processes together.

        Args:
            view: the run.
            number: of the round.
            opened: as `RoundDocuments.read` gives it.
            is_first: whether the next step is its first.

        Raises:
            UserError: the run stands inside of a round, and a column of it is not there; or its reference is
                another one than that of the rounds before.
        """
        if opened.documents is None:
            return {}
        if REFERENCE in self.names:
            on_main(view.world, partial(
                _refuse_other, opened.path.with_name(REFERENCE_NOTE), {"sha256": self.reference_sha256},
                "the run's divergence is from a model of {begun}, and --from is of {given}; resume --from "
                "the one that it began with"))
        if TEACHER in self.names:
            on_main(view.world, partial(
                _refuse_other, opened.path.with_name(TEACHERS_NOTE), identity_of(self.teachers),
                "the run's teachers are {begun}, and those of the command {given}; resume with the ones that "
                "it began with"))
        return {name: self._column(view, name, opened, is_first=is_first) for name in self.names}

    def _column(self, view: FeedView, name: str, opened: Round, *, is_first: bool) -> np.ndarray:
        file, count = file_of(opened.path, name), int(opened.starts[-1])
        # documents of which the step itself tells what is needed: what is learned first, at unchanged weights
        num_documents, passed = len(opened.starts) - 1, 0
        if name == OLD:
            passed = next((step.stop for i, step in enumerate(opened.steps) if i not in opened.idle),
                          num_documents)
        if passed == num_documents:
            return np.broadcast_to(np.float32(np.nan), count)
        # At the first step the live weights begin the round; later only the file has their numbers.
        is_anew = is_first and name == OLD
        of = on_main(view.world, partial(self._of, opened, name))
        damage = None if is_anew else on_main(view.world, partial(seal_damage, file, of))
        if is_anew or damage:
            # The weights that could compute it again are gone.
            if damage and name == OLD:
                raise UserError(f"{damage}; the run stands inside of the round: {_way_back(opened)}")
            if damage and view.world.is_main and file.exists():
                warn(f"{damage}; it is computed anew", view.events.write, step=view.step)
            assert opened.documents is not None, f"{opened.path} has no documents"
            write = partial(write_logprobs, view, opened.documents, passed,
                            view.config.data.phases[0].seq_len, view.config.train.micro_batch_size, file, of,
                            self.temperature, self.routes if name == OLD else None)
            # The policy is the live model; the others need their weights for a while.
            if name == OLD:
                write()
            elif name == TEACHER:
                write_teachers(view, self.teachers, opened, file, of, with_weights_of)
            else:
                self.with_reference(view, write)
        # A map: of the numbers of all rows a process reads those of its own.
        return np.memmap(file, np.float32, "r", shape=(count,))

    def _of(self, opened: Round, name: str) -> str:
        """Return what a column's checksum is bound to: the documents, and the models whose it is, where they
        are not the policy."""
        models = {REFERENCE: self.reference_sha256,
                  TEACHER: json.dumps(identity_of(self.teachers), sort_keys=True)}
        return f"{hash_checkpoint_files(opened.path)} {name} {models.get(name, '')}"


def _refuse_other(file: Path, given: Mapping[str, str], told: str) -> None:
    """Note which models the columns of a run are of, and raise `UserError` where they were others before.

    Args:
        file: the note.
        given: name -> what stands for a model's weights.
        told: what is wrong then, with {begun} and {given} in the place of models.
    """
    if not file.is_file():
        atomic_write(file, to_json(dict(given)))
        return
    try:
        begun = {name: str(digest) for name, digest in json.loads(file.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{file}: is damaged ({type(e).__name__}: {e}); restore it from a copy") from None
    if begun != given:
        raise UserError(f"{file}: {told.format(begun=_short(begun), given=_short(given))}")


def _short(models: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {digest[:12]}".strip() for name, digest in sorted(models.items()))


def _way_back(opened: Round) -> str:
    run = RunFolder(opened.path.parents[1])
    # Published rounds are trained again from whatever checkpoint there is, or from the start.
    before = checkpoints.latest_checkpoint_until(run.checkpoints,
                                                 (int(opened.path.name) - 1) * len(opened.steps))
    which = "all checkpoints" if before is None else f"the checkpoints behind {before.name}"
    return f"delete {which} in {run.checkpoints}, and give the same command with --resume"


def file_of(path: Path, name: str) -> Path:
    return path.with_name(f"{path.name}.{name}.f32")


def columns_of_run(config: RunConfig, needed: Collection[str], start: Path,
                   teachers: Sequence[ScoringTeacher] = ()) -> TrainerColumns:
    # a preference is of what the model is, and no correction of what it was sampled by
    temperature = 1.0 if config.policy.learns_preferences else config.rollout.temperature
    return TrainerColumns(tuple(name for name in needed if name in (OLD, REFERENCE, TEACHER)),
                          temperature, replayed_routes(config),
                          partial(with_weights_of, start),
                          hash_checkpoint_files(start) if REFERENCE in needed else "", tuple(teachers))


@torch.no_grad()
def with_weights_of(start: Path, view: FeedView, compute: Callable[[], None]) -> None:
    """Call `compute` while the model has a checkpoint's weights; called by all processes together, between
    two steps.

    A second model would need as much memory again; what is put aside here are the weights alone, and only
    while the others are there.

    Args:
        start: the checkpoint.
        view: the run, whose weights and optimizer are afterwards what they were before.
        compute: calls the model, forward only.
    """
    model = view.policy.model
    # What is put aside must be the newest weights, and no gather may write over those that are loaded.
    model.finish_param_gather()
    blocks = list(local_shards(model))
    aside, base = [block.data.clone() for block in blocks], model.adapter_base
    try:
        for block in blocks:
            if block.key.startswith(PREFIX):
                block.data.zero_()  # an adapter that is not in the checkpoint changes nothing then
        load.load_model(start, model)
        compute()
    finally:
        for block, data in zip(blocks, aside, strict=True):
            # After a failure too: the optimizer's state belongs to these weights.
            block.data.copy_(data)
        model.finish_writing()
        model.adapter_base = base


OFF_POLICY = "data"
"""In the place of a hash of documents: of a round that is not written."""
POLL_S = (1.0, 10.0)
"""Between two looks at what is not there yet: a tenth of what was waited so far, within these bounds."""
TOLD = ("groups", "unjudged", "reward_version", "policies", "means")
"""What of a round's manifest its event tells."""
Produce = Callable[[FeedView, int, Policy, Callable[[], bool]], Mapping[str, float]]
"""Writes and judges what is missing of a round by the policy that the run is, on all processes together,
unless it is asked to stop before the end; returns figures for its event."""


@dataclass
class RoundFeed:
    """A `train.stages.feed.Feed` of rounds."""

    rounds: RoundDocuments
    """The source that they are opened in."""
    rollout: RolloutConfig
    publish: Callable[[int], str]
    """Publishes a round (from 1), unless it is; returns what it lacks, or "".  Called by all
    processes together."""
    columns: TrainerColumns
    """What the trainer says of each document before it learns from it."""
    policies: RunPolicies
    """Those that the run is."""
    wait_s: float = 0.0
    """How long a round is waited for."""
    produce: Produce | None = None
    """None: other jobs write and judge."""
    store: Path | None = None
    """Where its responses are; who looks on finds them there.  None: it is not told."""
    end: Callable[[], None] = lambda: None
    """Ends what writes and judges."""
    validation: Validation | None = None
    """Of each policy before it writes, and of the last one; None: there is none."""
    samples: SampledRounds = SampledRounds(0, 0)
    """Responses of rounds that are told."""
    meters: Mapping[str, float] = field(default_factory=dict)
    """See `train.stages.feed.Feed`: of the round that is open."""
    _figures: Mapping[str, float] = field(default_factory=dict)
    _has_told: bool = False
    _doubts: bool = False
    """Whether few groups of the last round learn."""

    def bring(self, view: FeedView, asked_to_stop: Callable[[], bool]) -> str | None:
        """As `Feed.bring`: open the round of the next step."""
        if self.store is not None and not self._has_told and view.world.is_main:
            view.events.write("store", step=view.step, path=str(self.store.absolute()))
        self._has_told = True
        before, step = divmod(view.step, self.rollout.steps_per_round)
        number = before + 1
        # Later steps of a round find it open.
        if self.rounds.is_open(number):
            return None
        if not step:
            self.policies.at(view.step)  # which begins the round
            if (lacking := self._validate(view, number, asked_to_stop)) is not None:
                return lacking
        if not view.config.policy.is_on_policy(self.rollout.seed, number):
            if not step:  # the data are part of the settings that a policy is known by
                self.policies.begin(view.step, OFF_POLICY)
            self.meters = {}
            return None
        begin_s = time.monotonic()
        if (lacking := self._wait(view, number, asked_to_stop)) is not None:
            return lacking
        self._open(view, number, is_first=step == 0, waited_s=time.monotonic() - begin_s)
        return None

    def conclude(self, view: FeedView, asked_to_stop: Callable[[], bool]) -> str | None:
        """As `Feed.conclude`: validate the last policy."""
        return self._validate(view, view.step // self.rollout.steps_per_round + 1, asked_to_stop)

    def _validate(self, view: FeedView, number: int, asked_to_stop: Callable[[], bool]) -> str | None:
        return None if self.validation is None else self.validation.validate(
            view, number, self.policies.at(view.step), asked_to_stop)

    def close(self) -> None:
        """End what writes and judges, see `Feed`."""
        self.end()

    def needs_checkpoint(self, step: int) -> bool:
        """As `Feed.needs_checkpoint`: other jobs write by checkpoints."""
        return self.produce is None and step % self.rollout.steps_per_round == 0

    def state(self) -> dict[str, Any]:
        """As `Feed.state`."""
        return self.policies.state()

    def restore(self, state: dict[str, Any]) -> None:
        """As `Feed.restore`."""
        self.policies.restore(state)

    def _wait(self, view: FeedView, number: int, asked_to_stop: Callable[[], bool]) -> str | None:
        """Wait for a round to be published; returns None, or why it is waited for no longer."""
        begin_s, told = time.monotonic(), ""
        while lacking := self.publish(number):
            # A round whose groups do not learn asks further prompts: it lacks something else then.
            if lacking != told and (self.produce is not None or not told):
                told = lacking
                if self.produce is not None:
                    found = self.produce(view, number, self.policies.at(view.step), asked_to_stop)
                    self._figures = {name: self._figures.get(name, 0.0) + value
                                     for name, value in found.items()}
                    continue
                view.checkpointer.finish()  # the policy that is to write the round
                view.events.write("waiting", step=view.step, round=number, reason=lacking)
                if view.world.is_main and self.wait_s:
                    print(f"waits up to {self.wait_s:g} s for round {number}: {lacking}\n", end="",
                          file=sys.stderr, flush=True)
            waited_s = time.monotonic() - begin_s
            # one clock decides
            ends = sum_dict({"asked": float(asked_to_stop()),
                             "late": float(view.world.is_main and waited_s >= self.wait_s)},
                            collectives.all_reduce_world)
            if ends["asked"]:
                return f"asked to stop while waiting for round {number}: {lacking}"
            if ends["late"]:
                late = f"round {number} is not there yet: {lacking}"
                if self.wait_s:
                    late += (f"; it was waited for {self.wait_s:g} s: see whether `rl generate` and "
                             "`rl reward` are still at work, and give the same command with --resume")
                if view.world.is_main:
                    warn(late)  # it stands in the event `stop` as well
                return late
            time.sleep(min(max(waited_s / 10, POLL_S[0]), POLL_S[1]))
        return None

    def _open(self, view: FeedView, number: int, *, is_first: bool, waited_s: float) -> None:
        seq_len = view.config.data.phases[0].seq_len
        read = partial(self.rounds.read, number, seq_len, self.rollout.steps_per_round)
        on_each(partial(self.rounds.verify, number))  # what is wrong with it, everyone hears
        on_main(view.world, lambda: read() and None)
        opened = read()
        # One process decides: all pass over the same steps, or a collective would wait for ever.
        opened = replace(opened, idle=on_main(view.world, partial(self._idle_steps, view, number, opened)))
        made = self.columns.of_round(view, number, opened, is_first=is_first)
        self._pass_over_idle(view, number, opened)
        # Opened last: a failure before leaves the data order as it was.
        self.rounds.open(number, replace(opened, beside=made))
        self.policies.begin(view.step, on_main(view.world, partial(hash_checkpoint_files, opened.path)))
        if view.world.is_main:
            content = read_manifest(opened.path).content
            apart = reverse_kl(opened, made[TEACHER]) if TEACHER in made else {}
            view.events.write("round", step=view.step, round=number, waited_s=waited_s,
                              documents=opened.steps[-1].stop, **self._figures, **apart,
                              **{name: content.get(name) for name in TOLD})
            self._figures, self.meters = {}, meters_of_round(content)
            self._tell_rewards(view, number, content)
        if self.store is not None:
            on_main(view.world, partial(self._tell_samples, view, self.store, number, opened.path))

    def _tell_rewards(self, view: FeedView, number: int, content: Mapping[str, Any]) -> None:
        """Print the pass rate of the start before the first step, and warn of the first of several rounds of
        which few groups learn."""
        means = content.get("means") or {}
        if not view.step and PASS_RATE in means:
            print(f"pass rate before the first step: {means[PASS_RATE]:.1%} of {means['responses']:,} "
                  f"responses have a reward of at least policy.right_from = "
                  f"{view.config.policy.right_from:g}\n", end="", file=sys.stderr, flush=True)
        doubt = doubt_of_round(content, is_first=not view.step)
        if doubt and not self._doubts:
            warn(f"round {number}: {doubt}", view.events.write, step=view.step)
        self._doubts = bool(doubt)

    def _tell_samples(self, view: FeedView, store: Path, number: int, published: Path) -> None:
        version = str(read_manifest(published).content["reward_version"])
        self.samples.tell(view, RolloutStore.open(store), number, version)

    def _idle_steps(self, view: FeedView, number: int, opened: Round) -> frozenset[int]:
        """Return the steps of a round (from 0) that would change no weight: steps without text whose
        advantages are all 0, where nothing else has a gradient, and steps without documents."""
        policy, first = view.config.policy, (number - 1) * self.rollout.steps_per_round + 1
        learns_anyway = has_other_gradients(view.config)
        return frozenset(
            i for i, documents in enumerate(opened.steps)
            if not policy.has_text_at(self.rollout.seed, first + i)
            and not (documents and (learns_anyway or _has_advantage(opened, documents))))

    def _pass_over_idle(self, view: FeedView, number: int, opened: Round) -> None:
        """Have the ledger pass over the steps of a round that would change no weight."""
        first = (number - 1) * self.rollout.steps_per_round
        for step in sorted(first + i for i in opened.idle):
            if step < view.step:
                continue
            # In the ledger, so that a resumed run passes over the same steps.
            view.batches.ledger.pass_over(step, step + 1)
            if view.world.is_main:
                groups = describe_groups(read_manifest(opened.path).content.get("groups") or {})
                warn(f"round {number}: step {step + 1} is passed over, for no group of it learns (groups of "
                     f"the round: {groups})", view.events.write, step=step + 1)


def _has_advantage(opened: Round, documents: range) -> bool:
    """Return whether any document of a step has an advantage other than 0."""
    read = opened.documents
    return read is not None and any(
        has_advantage(read.column(ADVANTAGE, document, 0, int(read.lengths[document])))
        for document in documents)


@dataclass
class Producer:
    """Makes rounds; one object on each process of a run, all of which call it together."""

    store: Callable[[], RolloutStore]
    """Opens the store, or makes it."""
    prompts: PromptList
    """All that are asked."""
    aside: SetAside
    """Those that are not."""
    rollout: RolloutConfig
    run: Path
    """The run's folder."""
    writer: Writer
    """Makes rows."""
    batching: Batching
    """What bounds the memory of generation."""
    version: str
    """Of the reward."""
    judging: Callable[[], contextlib.AbstractContextManager[JudgeRows]]
    """The reward at work; begun on rank 0, with the first round."""
    provenance: Mapping[str, Any]
    """What stands in the manifests of parts."""
    max_gen_batches: int = 1
    """Of the policy: above 1 a round may ask further prompts."""
    servers: LiveServers | None = None
    """What writes in the place of the live model itself."""
    _policy: Policy | None = None
    """The one that the run is."""
    _requests: ResponseQueue | None = None
    _open: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _judge: JudgeRows | None = None
    _job: JudgingJob | None = None

    def produce(self, view: FeedView, number: int, policy: Policy, asked_to_stop: Callable[[], bool]
                ) -> dict[str, float]:
        """Write and judge what is missing of a round, and of those that its policy may write besides
        (`rollout.max_staleness`).

        Args:
            view: the run, whose model is the policy.
            number: of the round, from 1.
            policy: that the model is.
            asked_to_stop: looked at behind each piece and each part that is judged; rank 0's counts.

        Returns:
            Seconds of writing and of judging.
        """
        begin_s, self._policy = time.monotonic(), policy
        rounds = range(number, min(number + self.rollout.max_staleness, self.rollout.rounds) + 1)
        # made by one, before all open it
        on_main(view.world, lambda: list_set_aside(self.store().path, self.aside))
        told: dict[str, float] = {}
        if self.servers is None:
            engine = MegatronEngine(view.policy, self.batching)
            # The model is the policy itself: no weights are copied, only their version is noted.
            engine.update(None, policy.step)
            write_rounds(engine, _take_none, policy, self.writer, self._desk(rounds, asked_to_stop),
                         view.checkpointer.advance)
        else:
            told = self._write_by_servers(self.servers, view, rounds, policy, asked_to_stop)
        written_s = time.monotonic()
        on_main(view.world, lambda: self._begin_judging(rounds if self.servers is None else rounds[:1], view))
        # part by part: there is a limit to how long the others wait for a message
        while on_main(view.world, lambda: not asked_to_stop() and self._judge_part()):
            view.checkpointer.advance()
        return {"write_s": written_s - begin_s, "judge_s": time.monotonic() - written_s, **told}

    def _write_by_servers(self, servers: LiveServers, view: FeedView, rounds: range, policy: Policy,
                          asked_to_stop: Callable[[], bool]) -> dict[str, float]:
        """Have the first of some rounds written, and the others begun; returns figures for its event."""
        assert isinstance(self.writer, (ResponseSource, Episodes)), "it asks no servers"
        while on_main(view.world, lambda: not asked_to_stop() and servers.is_opening(STEP_S)):
            view.checkpointer.advance()
        if not on_main(view.world, lambda: servers.is_open):
            return {}
        servers.push(view, policy)
        on_main(view.world, lambda: self._queue(servers, rounds, asked_to_stop).begin(rounds, asked_to_stop))
        # while the servers write: nothing is published before
        servers.check(view, policy, self.writer.ids_of(round_prompts(self.prompts, self.rollout,
                                                                     rounds[0])[0]))

        def step() -> bool:
            requests = self._queue(servers, rounds, asked_to_stop)
            return requests.advance(STEP_S, lambda: requests.desk.missing.is_open(rounds[0]))

        while on_main(view.world, step):
            view.checkpointer.advance()
        return dict(on_main(view.world, lambda: servers.meters))

    def _queue(self, servers: LiveServers, rounds: range, asked_to_stop: Callable[[], bool]) -> ResponseQueue:
        if self._requests is None:
            assert servers.engine is not None, "the servers are not open"
            self._requests = ResponseQueue(
                row_requests(servers.engine, self.writer, servers.engine.room, is_live=True),
                self._desk(rounds, asked_to_stop), None, servers.engine.room)
        return self._requests

    def close(self) -> None:
        self._open.close()
        if self._requests is not None:
            self._requests.close()
        if self.servers is not None:
            self.servers.close()

    def _policy_of(self, number: int) -> Policy | None:
        """Return the policy that the run is, where it may write a round."""
        policy = self._policy
        if policy is None or not can_generate_round(policy.step, number, self.rollout):
            return None
        return policy

    def _desk(self, rounds: range, asked_to_stop: Callable[[], bool]) -> PieceQueue:
        store = self.store()
        # Written, judged and looked at again: what a round asks of this call does not grow during it.
        further = None if self.max_gen_batches == 1 else (
            lambda number: (further_pieces(self.run / ROUNDS, number), True))
        missing = Missing(store, Claims(store.claims, self.rollout.lease_s), self.prompts, self.rollout,
                          rounds, self._policy_of,
                          lambda number: key_digest(self.rollout, number, self.writer.chosen_by), further)
        # pieces that another job is at are waited for until it is taken for dead
        return PieceQueue(missing, store, 2 * self.rollout.lease_s, self.provenance,
                          asked_to_stop=asked_to_stop)

    def _begin_judging(self, rounds: range, view: FeedView) -> None:
        store = self.store()
        self._job = JudgingJob(store, Claims(store.claims, self.rollout.lease_s), self.version,
                               self.judge_rows, rounds, dict(self.provenance),
                               claimed_wait_s=2 * self.rollout.lease_s)

    def _judge_part(self) -> bool:
        assert self._job is not None, "nothing is begun"
        return self._job.step()

    def judge_rows(self, rows: Sequence[Rollout]) -> Sequence[Result]:
        """Judge rows, by processes that begin with the first ones and end with `close`."""
        if self._judge is None:
            self._judge = self._open.enter_context(self.judging())
        return self._judge(rows)


def _take_none(policy: Policy) -> None:
    raise AssertionError(f"the model is its own policy, and {policy.path} is another")
