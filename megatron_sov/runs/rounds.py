"""RL rounds of a run: the recorded settings of a rounds folder, and the policy for each round's responses.

No torch here.
"""

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
"""Settings that are hashes, which messages do not suggest as options."""
LEARNS = "learns"
"""Field in a round's manifest: name for the count of trained groups."""


def enter_rounds(folder: Path, file: Path, asked: dict[str, Any], option: str, what: str = "rounds",
                 made_anew: Collection[Path] = ()) -> None:
    """Write a rounds folder's settings to `file`, or check that they equal the recorded settings.

    While the folder contains no results, settings may still change.

    Args:
        folder: the rounds folder.
        file: the settings file inside the folder.
        asked: settings of this command, as JSON values.
        option: command-line option of the folder, for messages.
        what: noun for the folder's content, for messages.
        made_anew: files that every command rewrites; they do not count as results.

    Raises:
        UserError: the recorded settings differ, the file is damaged, or the folder contains other files.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{option} {folder}: is a file; choose another one")
    # Without results no setting can contradict anything.
    if not _holds_more(folder, {file, *made_anew}):
        write_output(file, to_json(asked))
        return
    if not file.is_file():
        raise UserError(f"{folder}: is not empty and holds no {what}; choose another {option}")
    try:
        recorded = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as e:
        raise UserError(f"{file}: is damaged ({e}); restore it, or choose another {option}") from None
    current = json.loads(to_json(asked))  # JSON turns tuples into lists, as in the file
    changed = {name: value for name, value in current.items() if recorded.get(name) != value}
    if changed:
        descriptions = [f"{name} = {recorded.get(name)}, now it is {value}"
                        for name, value in changed.items()]
        arguments = [f"--{name.replace('_', '-')} {shlex.quote(str(recorded[name]))}" for name in changed
                     if type(recorded.get(name)) in (int, float, str) and name not in NOT_TYPED]
        hint = f" ({' '.join(arguments)})" if arguments else ""
        raise UserError(f"{folder}: its {what} were begun with {'; '.join(descriptions)}; "
                        f"resume with the same{hint}, or choose another {option}")


def _holds_more(folder: Path, known: Collection[Path]) -> bool:
    """Return whether a folder contains files beyond `known`; hidden files are incomplete and do not count."""
    for path in folder.rglob("*"):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and path not in known and not is_hidden:
            return True
    return False


FEED = "feed"
"""Field in a checkpoint's `state.json` with the state of `RunPolicies`."""


@dataclass(frozen=True)
class Policy:
    """Weights that generate responses."""

    path: Path
    """The checkpoint; for live weights, the folder of the training run."""
    step: int
    """Optimizer steps in the run; 0 for the starting checkpoint."""
    sha256: str
    """Digest that identifies the policy in rollout stores."""


def policy_of_round(run: Path, start: Path, number: int, rollout: RolloutConfig) -> Policy | None:
    """Return the newest end-of-round checkpoint if it may generate a round, else None.

    Newer policies than necessary are allowed: unfinished responses in an old round come from
    the newest policy.

    Args:
        run: folder of `rl train`, which may not exist yet.
        start: the run's starting checkpoint.
        number: round number, from 1.
        rollout: the run's rollout settings.
    """
    folder = run / checkpoints.CHECKPOINTS_OF_A_RUN
    newest = checkpoints.latest(folder)
    # Policies are counted in whole rounds: skip checkpoints in the middle of a round.
    while newest is not None and checkpoints.step_of(newest) % rollout.steps_per_round:
        newest = checkpoints.latest_not_after(folder, checkpoints.step_of(newest) - 1)
    step = 0 if newest is None else checkpoints.step_of(newest)
    if not may_write(step, number, rollout):
        return None
    return policy_of_start(start) if newest is None else Policy(newest, step, _sha256_of_checkpoint(newest))


def policy_of_start(start: Path) -> Policy:
    return Policy(start, 0, checkpoints.files_sha256(start))


def may_write(step: int, number: int, rollout: RolloutConfig) -> bool:
    """Return whether the policy after `step` is at most `rollout.max_staleness` rounds older than
    the round needs."""
    return step // rollout.steps_per_round >= number - 1 - rollout.max_staleness


@dataclass
class RunPolicies:
    """Digests of a run's policies, one policy per round; each process computes the same.

    A policy's digest covers the starting checkpoint, the settings that change training, and the
    documents of all
    rounds so far. It needs no checkpoint and no layout: after a rollback, training the published rounds again
    gives the same policies.
    """

    run: Path
    start: Policy
    """The policy before the first round."""
    rollout: RolloutConfig
    settings: Mapping[str, Any]
    """Settings that change training, as JSON values."""
    _trained: str = ""
    """Digest of the start and of all rounds begun so far; "" before the first."""
    _recent: dict[int, str] = field(default_factory=dict)
    """Step -> digest, for policies that may have generated the next round."""

    def at(self, step: int) -> Policy:
        """Return the policy after the last step of a round."""
        if step not in self._recent:
            self._recent[step] = self._sha256(step)
            self._recent = dict([*self._recent.items()][-1 - self.rollout.max_staleness:])
        return Policy(self.run, step, self._recent[step]) if step else self.start

    def is_own(self, step: int, sha256: str) -> bool:
        """Return whether a policy from `step` belongs to this run, as far as recent digests show."""
        return sha256 in self._recent.values() or step < min(self._recent, default=0)

    def begin(self, step: int, documents_sha256: str) -> None:
        """Record the begin of a round.

        Args:
            step: optimizer step before the round.
            documents_sha256: digest of the round's training documents.
        """
        # In the middle of a round the digest came from the checkpoint.
        if not step % self.rollout.steps_per_round:
            self._trained = _digest(self.at(step).sha256, documents_sha256, to_json(dict(self.settings)))

    def state(self) -> dict[str, Any]:
        """Return JSON values for the checkpoint."""
        return {"trained": self._trained, "recent": [*self._recent.items()]}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the values from `state`."""
        self._trained = str(state["trained"])
        self._recent = {int(step): str(sha256) for step, sha256 in state["recent"]}

    def _sha256(self, step: int) -> str:
        return _digest(self._trained, str(step)) if step else self.start.sha256


def _sha256_of_checkpoint(path: Path) -> str:
    """Return the digest of a checkpoint's policy.

    Raises:
        UserError: `state.json` is damaged.
    """
    file = path / checkpoints.STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8")).get(FEED)
        if not state:  # checkpoint of another command, without rounds
            return manifest_sha256(path)
        return _digest(str(state["trained"]), str(checkpoints.step_of(path)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise UserError(f"{file}: is damaged ({type(e).__name__}: {e}); restore it from a copy") from None


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
