"""Rounds of a run: what a folder's were begun with, and which policy writes one's responses.  No torch
here."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import manifest_sha256, to_json, write_output
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import RolloutConfig
from megatron_sov.runs import checkpoints

NOT_TYPED = ("reward_version",)
"""Of what rounds are asked for: what stands for the content of something."""
LEARNS = "learns"
"""In the manifest of a round of reinforcement learning: reason that groups which are trained are counted
under."""


def enter_rounds(folder: Path, file: Path, asked: dict[str, Any], option: str, what: str = "rounds",
                 made_anew: Collection[Path] = ()) -> None:
    """Take note of what rounds are asked for, or check that it is what they were begun with: what is done of
    them is not done again.  As long as nothing is done, a mended command may ask for something else.

    Args:
        folder: of the rounds.
        file: the note, in the folder.
        asked: what becomes JSON.
        option: names the folder.
        what: is done there, as messages say it.
        made_anew: files that each command makes, so that they are nothing that was done.

    Raises:
        UserError: they were begun with something else, the note is damaged, or the folder holds files that
            are no rounds.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{option} {folder}: is a file; choose another one")
    # Nothing is done yet, so there is nothing that other settings could contradict.
    if not _holds_more(folder, {file, *made_anew}):
        write_output(file, to_json(asked))
        return
    if not file.is_file():
        raise UserError(f"{folder}: is not empty and holds no {what}; choose another {option}")
    try:
        begun = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as e:
        raise UserError(f"{file}: is damaged ({e}); restore it, or choose another {option}") from None
    now = json.loads(to_json(asked))  # as the note has it: a tuple is a list there
    changed = {name: value for name, value in now.items() if begun.get(name) != value}
    if changed:
        told = [f"{name} = {begun.get(name)}, now it is {value}" for name, value in changed.items()]
        words = [f"--{name.replace('_', '-')} {shlex.quote(str(begun[name]))}" for name in changed
                 if type(begun.get(name)) in (int, float, str) and name not in NOT_TYPED]
        raise UserError(f"{folder}: its {what} were begun with {'; '.join(told)}; resume with the same"
                        f"{' (' + ' '.join(words) + ')' if words else ''}, or choose another {option}")


def _holds_more(folder: Path, known: Collection[Path]) -> bool:
    """Return whether a folder has a file beside known ones; what is hidden is not complete."""
    return any(p.is_file() and p not in known
               and not any(part.startswith(".") for part in p.relative_to(folder).parts)
               for p in folder.rglob("*"))


FEED = "feed"
"""In the state of a run's checkpoint: what `RunPolicies` knows."""


@dataclass(frozen=True)
class Policy:
    """Weights that responses are written by."""

    path: Path
    """The checkpoint; of live weights the run that trains them."""
    step: int
    """Optimizer steps behind it, of the run; 0: the one that it starts from."""
    sha256: str
    """What responses are known to be its by."""


def policy_of_round(run: Path, start: Path, number: int, rollout: RolloutConfig) -> Policy | None:
    """Return the newest checkpoint that is a policy, where it may write a round; None: it is not trained yet.

    A policy is the weights behind the last step of a round.  Newer ones than a round needs are used as
    well: what is left of an old round is written by whatever policy there is.

    Args:
        run: the folder of `rl train`, which may not be there yet.
        start: the checkpoint that it starts from.
        number: of the round, from 1.
        rollout: its rounds.
    """
    folder = run / checkpoints.CHECKPOINTS_OF_A_RUN
    newest = checkpoints.latest(folder)
    # A checkpoint inside of a round is no policy: policies are counted by whole rounds.
    while newest is not None and checkpoints.step_of(newest) % rollout.steps_per_round:
        newest = checkpoints.latest_not_after(folder, checkpoints.step_of(newest) - 1)
    step = 0 if newest is None else checkpoints.step_of(newest)
    if not may_write(step, number, rollout):
        return None
    return policy_of_start(start) if newest is None else Policy(newest, step, _sha256_of_checkpoint(newest))


def policy_of_start(start: Path) -> Policy:
    return Policy(start, 0, checkpoints.files_sha256(start))


def may_write(step: int, number: int, rollout: RolloutConfig) -> bool:
    """Return whether the policy behind a step may write a round: that behind the round before it, or one up
    to `rollout.max_staleness` rounds older."""
    return step // rollout.steps_per_round >= number - 1 - rollout.max_staleness


@dataclass
class RunPolicies:
    """Knows which policies a run is, one behind the other; on each process.

    A policy is known by a digest of what the run started from, the settings that change what is learned, and
    the documents of the rounds that it was trained on.  That asks for no checkpoint, and is the same at every
    layout: a run that goes back to an earlier checkpoint, and trains the published rounds again, is the same
    policies again.
    """

    run: Path
    start: Policy
    """The one that it starts from."""
    rollout: RolloutConfig
    settings: Mapping[str, Any]
    """Those that change what is learned, JSON values."""
    _trained: str = ""
    """Stands for the start, and all rounds that are begun; "": none is."""
    _recent: dict[int, str] = field(default_factory=dict)
    """Step of a policy that may have written the next round -> its digest."""

    def at(self, step: int) -> Policy:
        """Return what the weights behind the last step of a round are."""
        if step not in self._recent:
            self._recent[step] = self._sha256(step)
            self._recent = dict([*self._recent.items()][-1 - self.rollout.max_staleness:])
        return Policy(self.run, step, self._recent[step]) if step else self.start

    def is_own(self, step: int, sha256: str) -> bool:
        """Return whether a policy that began responses at a step is this run, as far as that is known."""
        return sha256 in self._recent.values() or step < min(self._recent, default=0)

    def begin(self, step: int, documents_sha256: str) -> None:
        """Take note that a round is begun.

        Args:
            step: behind which it is.
            documents_sha256: stands for what is learned in it.
        """
        # In the middle of a round the checkpoint has told of it.
        if not step % self.rollout.steps_per_round:
            self._trained = _digest(self.at(step).sha256, documents_sha256, to_json(dict(self.settings)))

    def state(self) -> dict[str, Any]:
        """Return plain values for the checkpoint."""
        return {"trained": self._trained, "recent": [*self._recent.items()]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._trained = str(state["trained"])
        self._recent = {int(step): str(sha256) for step, sha256 in state["recent"]}

    def _sha256(self, step: int) -> str:
        return _digest(self._trained, str(step)) if step else self.start.sha256


def _sha256_of_checkpoint(path: Path) -> str:
    """Return what the policy of a run's checkpoint is known by.

    Raises:
        UserError: the checkpoint is damaged.
    """
    file = path / checkpoints.STATE
    try:
        told = json.loads(file.read_text(encoding="utf-8")).get(FEED)
        if not told:  # of another command, which knows no rounds
            return manifest_sha256(path)
        return _digest(str(told["trained"]), str(checkpoints.step_of(path)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise UserError(f"{file}: is damaged ({type(e).__name__}: {e}); restore it from a copy") from None


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
