"""What of the asked rounds is not written yet, piece by piece, and which of it this job takes up.

No torch here.  Responses that a deadline cut off wait for a newer policy and then come before fresh pieces:
were they always the last, a job that is never idle would not end the long ones at all.  Where no fresh piece
can be written either, the same policy goes on with them.  They are few of each piece, so those of several
pieces are gone on with together.  A piece of which a whole attempt did not move one response comes last, and
once for each policy: what hangs holds up nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_sov.config.rollout import RolloutConfig
from megatron_sov.errors import UserError
from megatron_sov.rollouts.asked import Asked
from megatron_sov.rollouts.prompts import Piece, Prompt, pieces, round_prompts
from megatron_sov.rollouts.rows import UNFINISHED, Rollout
from megatron_sov.rollouts.store import Store
from megatron_sov.runs.policies import Policy
from megatron_sov.work.claims import Claims


@dataclass(frozen=True)
class Attempt:
    """A piece to write, or to go on with."""

    piece: Piece
    number: int
    """0: from the prompts; else behind the unfinished rows of the attempt before."""
    policy: Policy
    """Which writes it."""
    begun: tuple[Rollout, ...] = ()
    """The unfinished rows."""

    @property
    def name(self) -> str:
        """Name of the part that it becomes."""
        return self.piece.part(self.number)


def never() -> bool:
    """Return that attempts are not cut off before their deadline."""
    return False


NEWER, FRESH, SAME, STUCK = range(4)
"""In which order attempts are taken up: what goes on by a newer policy than cut it off (or than this job
first saw there); pieces that are not begun; what goes on by the same policy; what did not move."""


@dataclass
class _Piece:
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

    def __init__(self, store: Store, claims: Claims, prompts: Sequence[Prompt], rollout: RolloutConfig,
                 rounds: range, policy_of: Callable[[int], Policy | None],
                 sampling_of: Callable[[int], str]) -> None:
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
        """
        self._store, self._claims, self._prompts, self._rollout = store, claims, prompts, rollout
        self._policy_of, self._sampling_of = policy_of, sampling_of
        self._open: dict[int, list[Piece] | None] = dict.fromkeys(rounds)
        self._known: dict[str, _Piece] = {}
        self._refused: list[str] = []
        self._is_idle = False
        self._held = contextlib.ExitStack()
        self.asked = Asked(rollout.rounds, -(-rollout.prompts_per_round // rollout.piece_prompts))
        """What all jobs together are to write, of which this one may write some rounds alone."""
        self.num_pieces = len(rounds) * self.asked.pieces
        """Pieces of all asked rounds."""
        self.num_done = 0
        """Of these, by whomever."""

    @property
    def is_done(self) -> bool:
        """Whether nothing is missing."""
        return not self._open

    @property
    def waits_for(self) -> str:
        """Return why nothing can be taken up, as the end of a sentence."""
        number = next(iter(self._open))
        if self._policy_of(number) is None:
            at_least = number - 1 - self._rollout.max_staleness
            return f"round {number} waits for a policy that round {at_least} has trained"
        if not self._refused and any(known.is_stuck for known in self._known.values()):
            return f"round {number} waits for responses of which a whole attempt did not get one token"
        return f"round {number} waits for pieces that other jobs have claimed"

    @property
    def may_be_dead(self) -> bool:
        """Whether a job whose claim was in the way of the last `take` has shown no sign of life yet."""
        return any(map(self._claims.may_be_dead, self._refused))

    def take(self) -> tuple[Attempt, ...]:
        """Return attempts to write together by one policy: a fresh piece, or what goes on of one or several.
        They are claimed until `leave`; none: there is nothing to do at this moment."""
        self._refused = []
        offers = [(rank, piece, policy) for round_, policy in self._ready()
                  for piece in self._pieces_of(round_) if (rank := self._rank(piece, policy)) is not None]
        taken: list[Attempt] = []
        joined: tuple[int, Policy] | None = None
        self._is_idle, num_rows = False, self._rollout.piece_prompts * self._rollout.samples_per_prompt
        # the sort is stable: by round and piece inside
        for rank, piece, policy in sorted(offers, key=lambda offer: offer[0]):
            if taken and (rank, policy) != joined:
                break
            attempt = self._claimed(piece, policy)
            if attempt is not None:
                taken.append(attempt)
                joined = rank, policy
                self._is_idle = rank in (SAME, STUCK)
            if taken and (rank == FRESH or sum(len(attempt.begun) for attempt in taken) >= num_rows):
                break
        return tuple(taken)

    def leave(self) -> None:
        """Give up the claims on what was taken, be it published or not."""
        self._held.close()

    def gives_way(self, policy: Policy) -> bool:
        """Return whether what was taken last was taken for want of anything better, and a newer policy than
        it was taken with is there now."""
        newest = self._policy_of(next(iter(self._open))) if self._is_idle and self._open else None
        return newest is not None and newest.step > policy.step

    def _rank(self, piece: Piece, policy: Policy) -> int | None:
        """Return the place of the next attempt at a piece in the order; None: it is to wait."""
        known = self._known[piece.part()]
        if not known.number:
            return FRESH
        if known.is_stuck:
            return None if known.cut_by == policy.step else STUCK
        if known.cut_by is None:
            known.cut_by = policy.step
        return NEWER if policy.step > known.cut_by else SAME

    def _ready(self) -> Iterator[tuple[int, Policy]]:
        """Yield the rounds that are not done and can be written, with their policies."""
        for number in list(self._open):
            if (policy := self._policy_of(number)) is None:
                return
            yield number, policy

    def _pieces_of(self, number: int) -> list[Piece]:
        """Return the pieces of a round that are not done."""
        known = self._open[number]
        if known is None:
            asked = round_prompts(self._prompts, self._rollout, number)
            known = pieces(asked, number, self._rollout.piece_prompts)
        left = [piece for piece in known if self._is_missing(piece)]
        self.num_done += len(known) - len(left)
        self._open[number] = left
        if not left:
            del self._open[number]
        return left

    def _is_missing(self, piece: Piece) -> bool:
        """Return whether an attempt at a piece is missing, and note which."""
        known = self._known.setdefault(piece.part(), _Piece())
        while self._store.has_rollouts(name := piece.part(known.number)):
            rows = self._store.read_rollouts(name, ("finish_reason", "versions"))
            self._refuse_others(piece, known.number, rows)
            if all(row.finish_reason != UNFINISHED for row in rows):
                del self._known[piece.part()]
                return False
            num_tokens = sum(len(row.versions) for row in rows)
            known.is_stuck = known.number > 0 and num_tokens == known.open_tokens
            known.open_tokens = sum(len(row.versions) for row in rows if row.finish_reason == UNFINISHED)
            known.number, known.cut_by, known.taken_by = known.number + 1, known.taken_by, None
        return True

    def _refuse_others(self, piece: Piece, number: int, rows: Sequence[Rollout]) -> None:
        """Raise `UserError` where a part is what this job would never have written: it would be taken for
        done."""
        asked = {prompt.id for prompt in piece.prompts}
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

    def _claimed(self, piece: Piece, policy: Policy) -> Attempt | None:
        """Return the next attempt at a piece, claimed; None: another job is at it."""
        known = self._known[piece.part()]
        claim = self._claims.take(name := piece.part(known.number))
        if claim is None:
            self._refused.append(name)
            return None
        if self._store.has_rollouts(name):  # by another job, since we looked
            claim.release()
            return None
        self._held.enter_context(claim.renewing())
        known.taken_by = policy.step
        begun = self._unfinished(piece.part(known.number - 1)) if known.number else ()
        return Attempt(piece, known.number, policy, begun)
