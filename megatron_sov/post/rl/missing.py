"""What of the asked rounds is not written yet, piece by piece, and which of it this job takes up.

No torch here.  Responses that a deadline cut off wait for a newer policy and then come before fresh pieces:
were they always the last, a job that is never idle would not end the long ones at all.  Where no fresh piece
can be written either, the same policy goes on with them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_sov.config.rollout import RolloutConfig
from megatron_sov.errors import UserError
from megatron_sov.rollouts.claims import Claims
from megatron_sov.rollouts.prompts import Piece, Prompt, pieces, round_prompts
from megatron_sov.rollouts.rows import UNFINISHED, Rollout
from megatron_sov.rollouts.store import Store
from megatron_sov.runs.policies import Policy


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
        self._attempts: dict[str, int] = {}
        self._cut_at: dict[str, tuple[int, int]] = {}
        self._refused: list[str] = []
        self._held = contextlib.ExitStack()
        self.num_pieces = len(rounds) * -(-rollout.prompts_per_round // rollout.piece_prompts)
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
        return f"round {number} waits for pieces that other jobs have claimed"

    @property
    def may_be_dead(self) -> bool:
        """Whether a job whose claim was in the way of the last `take` has shown no sign of life yet."""
        return any(map(self._claims.may_be_dead, self._refused))

    def take(self) -> Attempt | None:
        """Return the next attempt, which is claimed until `leave`; None: there is none at this moment."""
        self._refused = []
        offers = [(self._rank(piece, number, policy), piece, number, policy)
                  for round_, policy in self._ready() for piece, number in self._attempts_of(round_)]
        # the sort is stable: by round and piece inside
        for _, piece, number, policy in sorted(offers, key=lambda offer: offer[0]):
            if self._claimed(piece.part(number)):
                self._cut_at[piece.part()] = (number + 1, policy.step)
                begun = self._unfinished(piece.part(number - 1)) if number else ()
                return Attempt(piece, number, policy, begun)
        return None

    def leave(self) -> None:
        """Give up the claim on the attempt that was taken, be it published or not."""
        self._held.close()

    def _rank(self, piece: Piece, number: int, policy: Policy) -> int:
        """Return the place of an attempt: 0 of one that goes on behind a deadline by a newer policy than
        cut it off (or than this job first saw there); 1 of a fresh piece; 2 of others."""
        if not number:
            return 1
        seen_number, step = self._cut_at.get(piece.part(), (0, 0))
        if seen_number != number:
            step = policy.step
            self._cut_at[piece.part()] = (number, step)
        return 0 if policy.step > step else 2

    def _ready(self) -> Iterator[tuple[int, Policy]]:
        """Yield the rounds that are not done and can be written, with their policies."""
        for number in list(self._open):
            if (policy := self._policy_of(number)) is None:
                return
            yield number, policy

    def _attempts_of(self, number: int) -> list[tuple[Piece, int]]:
        """Return the pieces of a round that are not done, with the attempt that is next."""
        known = self._open[number]
        if known is None:
            asked = round_prompts(self._prompts, self._rollout, number)
            known = pieces(asked, number, self._rollout.piece_prompts)
        attempts = [(piece, self._next_attempt(piece)) for piece in known]
        left = [(piece, attempt) for piece, attempt in attempts if attempt is not None]
        self.num_done += len(known) - len(left)
        self._open[number] = [piece for piece, _ in left]
        if not left:
            del self._open[number]
        return left

    def _next_attempt(self, piece: Piece) -> int | None:
        """Return which attempt at a piece is missing; None: it is done."""
        number = self._attempts.get(piece.part(), 0)
        while self._store.has_rollouts(piece.part(number)):
            rows = self._store.read_rollouts(piece.part(number), ("finish_reason",))
            self._refuse_others(piece, number, rows)
            if all(row.finish_reason != UNFINISHED for row in rows):
                self._attempts.pop(piece.part(), None)
                self._cut_at.pop(piece.part(), None)
                return None
            number += 1
            self._attempts[piece.part()] = number
        return number

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

    def _claimed(self, name: str) -> bool:
        claim = self._claims.take(name)
        if claim is None:
            self._refused.append(name)
            return False
        self._held.enter_context(claim.renewing())
        if self._store.has_rollouts(name):  # by another job, since we looked
            self.leave()
            return False
        return True
