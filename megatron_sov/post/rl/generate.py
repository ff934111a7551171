"""The generating job: what of the asked rounds is not written yet, piece by piece, which of it this job takes
up, and an engine that writes it with the newest policy.

It can be killed at any moment: pieces that are published stay, and another job, or the same one again, writes
the others.  Responses that a deadline cut off wait for a newer policy and then come before fresh pieces:
were they always the last, a job that is never idle would not end the long ones at all.  Where no fresh piece
can be written either, the same policy goes on with them.  They are few of each piece, so those of several
pieces are gone on with together.  A piece of which a whole attempt did not move one response comes last, and
once for each policy: what hangs holds up nothing else.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from megatron_sov import convert
from megatron_sov.base.errors import UserError, warn
from megatron_sov.checkpoint import load
from megatron_sov.engine.parallel.world import on_first
from megatron_sov.infer.decoder.generator import MegatronEngine
from megatron_sov.infer.engine import MEGATRON, Engine, run_engine
from megatron_sov.infer.engines.load import Loaded, run_forward_model
from megatron_sov.infer.engines.server_engine import ServerPlaces
from megatron_sov.infer.engines.target import Target
from megatron_sov.infer.request import Batching, NamedTensors
from megatron_sov.model.config.post_training import RolloutConfig
from megatron_sov.rollouts.prompts import PromptList, PromptPiece, round_pieces
from megatron_sov.rollouts.rows import UNFINISHED, AskedPrompt, Rollout
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs.checkpoints import read_adapter_base
from megatron_sov.runs.launch_environment import is_first_rank
from megatron_sov.runs.rounds import Policy
from megatron_sov.work.progress.locks import POLL_S, Claims, IdleTimeout
from megatron_sov.work.progress.progress_bar import create_bar
from megatron_sov.work.tables.table import AlreadyPublished


@dataclass(frozen=True)
class SampleAttempt:
    """A piece to write, or to go on with."""

    piece: PromptPiece
    number: int
    """0: from the prompts; else behind the unfinished rows of the attempt before."""
    policy: Policy
    """Which writes it."""
    begun: tuple[Rollout, ...] = ()
    """The unfinished rows."""

    @property
    def name(self) -> str:
        return self.piece.part(self.number)


def never() -> bool:
    return False


Further = Callable[[int], tuple[int, bool]]
"""Round -> the pieces of further prompts that it asks, and whether it asks no more."""
LOOK_UPS = 64
"""Open pieces that each `take` looks at, on average, where there are more."""
NEWER, FRESH, SAME, STUCK = range(4)
"""In which order attempts are taken up: what goes on by a newer policy than cut it off (or than this job
first saw there); pieces that are not begun; what goes on by the same policy; what did not move."""


@dataclass
class _ClaimedPiece:
    """What a job knows of a piece that is not done."""

    number: int = 0
    """Of the next attempt."""
    open_tokens: int = 0
    """Of the responses that it goes on with."""
    is_stuck: bool = False
    """Whether the attempt before added nothing to them."""
    cut_by: int | None = None
    """Step of the policy by which this job made that attempt, or first saw what another one left; None: it
    has not looked yet."""
    taken_by: int | None = None
    """Step of the policy by which this job makes the next one."""


class Missing:
    """The pieces of some rounds that are not written."""

    def __init__(self, store: RolloutStore, claims: Claims, prompts: PromptList,
                 rollout: RolloutConfig, rounds: range, policy_of: Callable[[int], Policy | None],
                 sampling_of: Callable[[int], str], further: Further | None = None) -> None:
        """Look at nothing yet.

        Args:
            store: has what is written.
            claims: of all jobs that write into it.
            prompts: all of the file.
            rollout: how they are cut into rounds and pieces.
            rounds: the asked ones, from 1.
            policy_of: gives the policy for a round, None where it is not there yet; where there is none for
                a round, there is none for a later one.
            sampling_of: gives what stands in the keys of a round for how its tokens are chosen.
            further: what a round asks beyond its own prompts; None: no round does.
        """
        self._store, self._claims, self._prompts, self._rollout = store, claims, prompts, rollout
        self._policy_of, self._sampling_of = policy_of, sampling_of
        self._further = further or (lambda number: (0, True))
        self._open: dict[int, dict[str, PromptPiece]] = {number: {} for number in rounds}
        self._begun: set[str] = set()
        self._taken: dict[str, str] = {}
        self._num_takes = 0
        self._listed: dict[int, int] = {}
        self._last = rounds[-1]
        self._known: dict[str, _ClaimedPiece] = {}
        self._refused: list[str] = []
        self._is_idle = False
        self._held: dict[str, contextlib.ExitStack] = {}
        self.asked = AskedPrompt(rollout.rounds, -(-rollout.prompts_per_round // rollout.piece_prompts),
                                 further is not None)
        """What all jobs together are to write, of which this one may write some rounds alone."""
        self.num_pieces = len(rounds) * self.asked.pieces
        """Pieces of all asked rounds."""
        self.num_done = 0
        """Of these, by whomever."""

    @property
    def is_done(self) -> bool:
        return not self._open

    def add_rounds(self, rounds: range) -> None:
        """Look for these rounds too, or again: one that was written may ask further prompts."""
        for number in rounds:
            self._open.setdefault(number, {})
        self.num_pieces += max(0, rounds[-1] - self._last) * self.asked.pieces
        self._last = max(self._last, rounds[-1])

    def is_open(self, number: int) -> bool:
        """Return whether something of a round is not written yet, by the last `take`."""
        return number in self._open

    @property
    def is_stuck(self) -> bool:
        """Return whether only another policy goes on with something: a whole attempt added nothing to it."""
        return not self._refused and any(known.is_stuck for known in self._known.values())

    @property
    def waits_for(self) -> str:
        """Return why nothing can be taken up, as the end of a sentence."""
        number = next(iter(self._open))
        if self._policy_of(number) is None:
            at_least = number - 1 - self._rollout.max_staleness
            return f"round {number} waits for a policy that round {at_least} has trained"
        if self.is_stuck:
            return f"round {number} waits for responses of which a whole attempt did not get one token"
        if not self._open[number]:
            return f"round {number} is written, and may ask further prompts until it is trained"
        return f"round {number} waits for pieces that other jobs have claimed"

    @property
    def may_be_dead(self) -> bool:
        """Whether a job whose claim was in the way of the last `take` has shown no sign of life yet."""
        return any(map(self._claims.may_be_dead, self._refused))

    def take(self, num_rows: int = 0) -> tuple[SampleAttempt, ...]:
        """Return attempts to write together by one policy: a fresh piece, or what goes on of one or several.
        They are claimed until `leave`; none: there is nothing to do at this moment.

        Args:
            num_rows: responses that there is room for: so many pieces are taken, fresh ones too; 0: those of
                one piece.
        """
        taken = self._take_known(num_rows, looks=self._is_due())
        # What nobody has looked at for a while may have been written, or cut off, by others.
        return taken or (self._take_known(num_rows, looks=True) if self._open and self._num_takes else ())

    def _is_due(self) -> bool:
        """Return whether all that is open is looked at again, since other jobs write and publish meanwhile:
        of few pieces each time, of many so seldom that each `take` costs no more look-ups than with few."""
        self._num_takes += 1
        return self._num_takes * LOOK_UPS >= sum(map(len, self._open.values()))

    def _take_known(self, num_rows: int, *, looks: bool) -> tuple[SampleAttempt, ...]:
        self._refused = []
        ready = list(self._ready())
        for number, _ in ready:
            self._look(number, whole=looks)
        if looks:
            self._num_takes = 0
        # What is not held any more has been looked at behind its end.
        self._taken = {name: piece for name, piece in self._taken.items() if name in self._held}
        taken: list[SampleAttempt] = []
        joined: tuple[int, Policy] | None = None
        most = num_rows or self._rollout.piece_prompts * self._rollout.samples_per_prompt
        count, self._is_idle = 0, False
        for rank, piece, policy in self._offers(ready):
            # What is written together has one policy, and one reason to make way for a newer one.
            if joined is not None and (policy != joined[1] or (rank != joined[0] and not num_rows)):
                break
            # The same policy goes on with what a deadline cut off for want of anything better alone.
            if num_rows and rank in (SAME, STUCK) and (taken or self._held):
                break
            attempt = self._claimed(piece, policy)
            if attempt is not None:
                taken.append(attempt)
                joined = rank, policy
                self._is_idle = rank in (SAME, STUCK)
                count += len(attempt.begun) or len(piece.prompts) * self._rollout.samples_per_prompt
            # A fresh piece fills the engine alone; what goes on is joined up to the responses of one piece.
            if taken and (count >= most or (rank == FRESH and not num_rows)):
                break
        return tuple(taken)

    def leave(self, attempts: Sequence[SampleAttempt] | None = None) -> None:
        """Give up the claims on what was taken, be it published or not.

        Args:
            attempts: whose; None: all of them.
        """
        for name in list(self._held) if attempts is None else [attempt.name for attempt in attempts]:
            if (claim := self._held.pop(name, None)) is not None:
                claim.close()

    def gives_way(self, policy: Policy) -> bool:
        """Return whether what was taken last was taken for want of anything better, and a newer policy than
        it was taken with is there now."""
        newest = self._policy_of(next(iter(self._open))) if self._is_idle and self._open else None
        return newest is not None and newest.step > policy.step

    def _rank(self, piece: PromptPiece, policy: Policy) -> int | None:
        """Return the place of the next attempt at a piece in the order; None: it is to wait."""
        known = self._known[piece.part()]
        if piece.part(known.number) in self._held:
            return None
        if not known.number:
            return FRESH
        if known.is_stuck:
            return None if known.cut_by == policy.step else STUCK
        if known.cut_by is None:
            known.cut_by = policy.step
        return NEWER if policy.step > known.cut_by else SAME

    def _ready(self) -> Iterator[tuple[int, Policy]]:
        for number in list(self._open):
            # A later round needs a later policy.
            if (policy := self._policy_of(number)) is None:
                return
            yield number, policy

    def _offers(self, ready: Sequence[tuple[int, Policy]]) -> Iterator[tuple[int, PromptPiece, Policy]]:
        """Yield what may be taken up, in order: by rank, and inside by round and piece."""
        begun = []
        for number, policy in ready:
            pieces = self._open.get(number, {})
            for piece in sorted((pieces[name] for name in self._begun & pieces.keys()),
                                key=lambda piece: piece.number):
                begun.append((self._rank(piece, policy), piece, policy))
        for wanted in (NEWER, FRESH, SAME, STUCK):
            yield from ((wanted, piece, policy) for rank, piece, policy in begun if rank == wanted)
            if wanted == FRESH:  # most are, of which the first ones are taken
                yield from ((FRESH, piece, policy) for number, policy in ready
                            for piece in self._open.get(number, {}).values()
                            if self._rank(piece, policy) == FRESH)

    def _look(self, number: int, *, whole: bool) -> None:
        """Take note of what is written of a round: of all of it, or of what this job has taken alone."""
        more, is_final = self._further(number)
        known, own = self._open[number], self.asked.pieces
        fresh: list[PromptPiece] = []
        if number not in self._listed or own + more > self._listed[number]:
            asked = round_pieces(self._prompts, self._rollout, number, more)
            fresh = asked[self._listed.get(number, 0):]
            self.num_pieces += len(asked) - self._listed.get(number, own)
            self._listed[number] = own + more
        looked = [*known.values()] if whole else [
            known[name] for name in {*self._taken.values()} if name in known]
        known |= {piece.part(): piece for piece in fresh}
        for piece in (*looked, *fresh):
            if not self._is_missing(piece):
                del known[piece.part()]
                self._begun.discard(piece.part())
                self.num_done += 1
            elif self._known[piece.part()].number:
                self._begun.add(piece.part())
        if not known and is_final:
            del self._open[number]

    def _is_missing(self, piece: PromptPiece) -> bool:
        """Return whether an attempt at a piece is missing, and note which."""
        known = self._known.setdefault(piece.part(), _ClaimedPiece())
        # Up to the first attempt that is not there: the one before says what is unfinished.
        while self._store.has_part(name := piece.part(known.number)):
            rows = self._store.read_rollouts(name, ("finish_reason", "versions"))
            self._refuse_others(piece, known.number, rows)
            if all(row.finish_reason != UNFINISHED for row in rows):
                del self._known[piece.part()]
                return False
            # Rows hold the tokens of all attempts so far: as many as before means that this one added none.
            num_tokens = sum(len(row.versions) for row in rows)
            known.is_stuck = known.number > 0 and num_tokens == known.open_tokens
            known.open_tokens = sum(len(row.versions) for row in rows if row.finish_reason == UNFINISHED)
            # `taken_by` is None where another job made it; `_rank` then takes the first policy that it sees.
            known.number, known.cut_by, known.taken_by = known.number + 1, known.taken_by, None
        return True

    def _refuse_others(self, piece: PromptPiece, number: int, rows: Sequence[Rollout]) -> None:
        """Raise `UserError` where a part is what this job would never have written: it would be taken for
        done."""
        asked = set(piece.prompts.ids)
        sampling = self._sampling_of(piece.round)
        for row in rows:
            if row.key.prompt not in asked:
                what = (f"a response to prompt {row.key.prompt}, which is not asked in this piece: of "
                        "another file of prompts, seed, or size of rounds or pieces")
            elif row.key.sampling != sampling or row.key.sample >= self._rollout.samples_per_prompt:
                what = ("responses of other settings: temperature, lengths, seed, samples_per_prompt, chat "
                        "template or environment")
            else:
                continue
            raise UserError(f"{self._store.path}: {piece.part(number)} holds {what}; give those that the "
                            "store was begun with, or choose another --store")

    def _unfinished(self, name: str) -> tuple[Rollout, ...]:
        return tuple(row for row in self._store.read_rollouts(name) if row.finish_reason == UNFINISHED)

    def _claimed(self, piece: PromptPiece, policy: Policy) -> SampleAttempt | None:
        """Return the next attempt at a piece, claimed; None: another job is at it."""
        known = self._known[piece.part()]
        claim = self._claims.take(name := piece.part(known.number))
        if claim is None:
            self._refused.append(name)
            return None
        if self._store.has_part(name):  # by another job, since we looked
            claim.release()
            self._taken[name] = piece.part()
            return None
        # Renewed until `leave`: a piece may take longer than a lease.
        self._held.setdefault(name, contextlib.ExitStack()).enter_context(claim.renew_while_open())
        known.taken_by = policy.step
        self._taken[name] = piece.part()
        begun = self._unfinished(piece.part(known.number - 1)) if known.number else ()
        return SampleAttempt(piece, known.number, policy, begun)


WAIT = "wait"
"""In the place of attempts: look again."""


class Writer(Protocol):
    """What makes rows of an attempt."""

    @property
    def chosen_by(self) -> dict[str, Any]:
        """What tokens are chosen by beside the settings of `rollout`, see `responses.key_digest`."""
        ...

    def write(self, engine: Engine, attempts: Sequence[SampleAttempt],
              gives_way: Callable[[], bool]) -> list[list[Rollout]] | None:
        """Return the rows of each attempt; called by all processes of the engine together, of which the first
        one needs them.

        Args:
            engine: which writes.
            attempts: by one policy.
            gives_way: of the first process: whether what is unfinished is to be cut off before its deadline.
        """
        ...


@dataclass
class PieceQueue:
    """What the first process does: takes up, waits and publishes."""

    missing: Missing
    store: RolloutStore
    wait_s: float
    """How long to wait where nothing can be done, before the job ends; claims that may be a dead job's are
    watched in any case."""
    provenance: Mapping[str, Any]
    """What stands in the parts' manifests."""
    patience: IdleTimeout = field(default_factory=IdleTimeout)
    asked_to_stop: Callable[[], bool] = lambda: False
    """Whether to begin nothing more."""
    summary: dict[str, Any] = field(default_factory=lambda: {
        "parts": 0, "responses": 0, "unfinished": 0, "tokens": 0, "waits_for": ""})
    """What this job did, and why it ended before all was done."""
    clock_s: Callable[[], float] = time.monotonic
    """Which says when to look for a newer policy again."""
    _policy: Policy | None = None
    _looked_s: float = 0.0

    def next(self, num_rows: int = 0, *, is_busy: bool = False) -> tuple[SampleAttempt, ...] | str | None:
        """Return what to write; `WAIT`; None: this is the end.

        Args:
            num_rows: as `Missing.take` has it.
            is_busy: whether something is under way, so that nothing is waited for here.
        """
        if self.asked_to_stop():
            return None
        if attempts := self.missing.take(num_rows):
            # Work was found, so the next wait begins at zero.
            self.patience.waited_s = 0.0
            self._policy, self._looked_s = attempts[0].policy, self.clock_s()
            return attempts
        if self.missing.is_done:
            return None
        if is_busy:
            return WAIT
        if self.patience.wait(self.wait_s, self.missing.may_be_dead):
            return WAIT
        self.summary["waits_for"] = self.missing.waits_for
        return None

    def gives_way(self) -> bool:
        """Return whether what is being written, for want of anything better, is to make way for a newer
        policy; looks now and then."""
        if self._policy is None or self.clock_s() - self._looked_s < POLL_S:
            return False
        self._looked_s = self.clock_s()
        return self.missing.gives_way(self._policy)

    def publish(self, attempts: Sequence[SampleAttempt], rows: Sequence[list[Rollout]]) -> None:
        for attempt, of_attempt in zip(attempts, rows, strict=True):
            self._publish(attempt, of_attempt)
        self.missing.leave(attempts)

    def _publish(self, attempt: SampleAttempt, rows: list[Rollout]) -> None:
        num_unfinished = sum(row.finish_reason == UNFINISHED for row in rows)
        written_by = {"policy": attempt.policy.sha256, "step": attempt.policy.step,
                      "weights": str(attempt.policy.path),
                      **self.missing.asked.to_provenance(num_unfinished)}
        try:
            self.store.add_rollouts(attempt.name, rows, {**self.provenance, **written_by})
        except AlreadyPublished as e:  # a job that was taken for dead has published its own
            warn(str(e))
        else:
            self.summary["parts"] += 1
            self.summary["responses"] += len(rows)
            self.summary["unfinished"] += num_unfinished
            # Tokens of earlier attempts were counted by the jobs that wrote them.
            before = sum(len(row.tokens) for row in attempt.begun)
            self.summary["tokens"] += sum(len(row.tokens) for row in rows) - before


def write_rounds(engine: Engine, take: Take, held: Policy, writer: Writer, desk: PieceQueue,
                 between: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Write what is missing until nothing is; called by all processes of the engine together, as `between`
    is, behind what was written together."""
    with create_bar("write", desk.missing.num_pieces, "piece", is_first_rank()) as bar:
        while (attempts := on_first(desk.next)) is not None:
            on_first(lambda: bar.update(desk.missing.num_done - bar.n))
            if isinstance(attempts, str):
                continue
            try:
                # Weights change between attempts only, so each new token of a row has one version.
                if attempts[0].policy != held:
                    take(attempts[0].policy)
                    held = attempts[0].policy
                rows = writer.write(engine, attempts, desk.gives_way)
                on_first(partial(desk.publish, attempts, rows or []))
            finally:
                # After a failure too: a claim that stays would hold other jobs up until its lease ends.
                desk.missing.leave()
            between()
    summary: dict[str, Any] = on_first(lambda: desk.summary)
    return summary


Take = Callable[[Policy], None]
"""Has the engine write with another policy from now on; called by all of its processes together."""


def run_policies(name: str, start: Target, work: Callable[[Engine, Take], Any], *, longest: int,
                 batching: Batching, settings: Sequence[str], nproc: int | None,
                 option: str = "--set", with_routes: bool = False,
                 places: ServerPlaces | None = None) -> Any:
    """Load the policy that a run starts from into an engine, and return what some work with it gave.

    Args:
        name: of the engine.
        start: the policy.
        work: is given the engine and what changes its weights, on every process; its result must be plain
            JSON values.
        longest: tokens of the longest sequence, prompt and response.
        batching: what bounds memory.
        settings: `key=value` changes of layout and precision (megatron), or of servers.
        nproc: local processes (megatron).
        option: that the settings are given by, for sentences.
        with_routes: whether the work asks for routes.
        places: where servers and their logs are.

    Returns:
        The result; None on other processes than the first of a torchrun or Slurm job.

    Raises:
        UserError: the engine is not installed, or cannot load the model.
        SystemExit: a process failed, after it has said why.
    """
    if name == MEGATRON:
        def on_ranks(loaded: Loaded) -> Any:
            engine = MegatronEngine(loaded.policy, batching)
            return work(engine, lambda policy: _load(policy, loaded, engine))

        return run_forward_model(start, list(settings), nproc, on_ranks, option)
    return run_engine(name, start, lambda engine: work(
        engine, lambda policy: engine.update(_tensors_of(policy), policy.step)),
        longest=longest, batching=batching, settings=settings, option=option, with_routes=with_routes,
        places=places)


def _load(policy: Policy, loaded: Loaded, engine: MegatronEngine) -> None:
    """Read a checkpoint into the live model, each process its own part."""
    model = loaded.policy.model
    if read_adapter_base(policy.path) is not None and not model.lora.on:
        # the run trains an adapter, and what it starts from has none: weights with the adapter inside
        engine.update(_tensors_of(policy), policy.step)
        return
    load.check(policy.path)
    load.load_model(policy.path, model)
    engine.update(None, policy.step)


def _tensors_of(policy: Policy) -> NamedTensors:
    weights = convert.open_weights(policy.path)
    return ((name, weights.read(name)) for link in weights.links for name in link.hf_names)
