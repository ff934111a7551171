"""RL rounds: recorded settings in a rounds folder, and the policy for each round's responses.

No torch here.
"""

import hashlib
import json
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import format_json, manifest_sha256, write_output
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import RolloutConfig
from megatron_sov.runs import checkpoints

HASHED_SETTINGS = ("reward_version",)
"""Hashed settings; messages do not suggest options for hashes."""
TRAINED_GROUPS = "learns"
"""Field in a round's manifest: counts trained groups."""
FEED_STATE = "feed"
"""Field in `state.json` for `RunPolicies.state`."""


def record_or_check_settings(folder: Path, file: Path, settings: dict[str, Any], option: str,
                             noun: str = "rounds", rewritten_files: Collection[Path] = ()) -> None:
    """Write a rounds folder's settings to `file`, or compare with the recorded settings.

    While the folder contains no results, settings may still change.

    Args:
        folder: the rounds folder.
        file: the settings file inside the folder.
        settings: settings of this command, as JSON values.
        option: command-line option of the folder, for messages.
        noun: noun for the folder's content, for messages.
        rewritten_files: files that every command rewrites; they do not count as results.

    Raises:
        UserError: the recorded settings differ, the file is damaged, or the folder contains other files.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{option} {folder}: is a file; choose another one")
    # Without results no setting can contradict anything.
    if not _has_other_files(folder, {file, *rewritten_files}):
        write_output(file, format_json(settings))
        return
    if not file.is_file():
        raise UserError(f"{folder}: is not empty and holds no {noun}; choose another {option}")
    try:
        recorded = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{file}: is damaged ({e}); restore it, or choose another {option}") from None
    current = json.loads(format_json(settings))  # JSON turns tuples into lists, as in the file
    changed = {name: value for name, value in current.items() if recorded.get(name) != value}
    if changed:
        descriptions = [f"{name} = {recorded.get(name)}, now it is {value}"
                        for name, value in changed.items()]
        arguments = [f"--{name.replace('_', '-')} {shlex.quote(str(recorded[name]))}" for name in changed
                     if type(recorded.get(name)) in (int, float, str) and name not in HASHED_SETTINGS]
        hint = f" ({' '.join(arguments)})" if arguments else ""
        raise UserError(f"{folder}: its {noun} were begun with {'; '.join(descriptions)}; "
                        f"resume with the same{hint}, or choose another {option}")


def _has_other_files(folder: Path, known: Collection[Path]) -> bool:
    """Return whether a folder contains files beyond `known`; hidden files are incomplete and do not count."""
    for path in folder.rglob("*"):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and path not in known and not is_hidden:
            return True
    return False


@dataclass(frozen=True)
class Policy:
    """Weights that generate responses."""

    path: Path
    """The checkpoint; for live weights, the folder of the training run."""
    step: int
    """Optimizer steps in the run; 0 for the starting checkpoint."""
    sha256: str
    """Digest that identifies the policy in rollout stores."""


def find_round_policy(run: Path, start: Path, number: int, rollout: RolloutConfig) -> Policy | None:
    """Return the policy of the newest end-of-round checkpoint if fresh enough for a round, else None.

    Newer policies than necessary are allowed: unfinished responses in an old round come from the newest
    policy.

    Args:
        run: folder of `rl train`, which may not exist yet.
        start: the run's starting checkpoint.
        number: round number, from 1.
        rollout: the run's rollout settings.
    """
    folder = run / checkpoints.CHECKPOINTS_FOLDER
    newest = checkpoints.latest_checkpoint(folder)
    # Policies are counted in whole rounds: skip checkpoints in the middle of a round.
    while newest is not None and checkpoints.checkpoint_step(newest) % rollout.steps_per_round:
        newest = checkpoints.latest_checkpoint_until(folder, checkpoints.checkpoint_step(newest) - 1)
    step = 0 if newest is None else checkpoints.checkpoint_step(newest)
    if not can_generate_round(step, number, rollout):
        return None
    if newest is None:
        return build_start_policy(start)
    return Policy(newest, step, _hash_checkpoint_policy(newest))


def build_start_policy(start: Path) -> Policy:
    return Policy(start, 0, checkpoints.hash_checkpoint_files(start))


def can_generate_round(step: int, number: int, rollout: RolloutConfig) -> bool:
    """Return whether the policy after `step` is at most `rollout.max_staleness` rounds too old."""
    return step // rollout.steps_per_round >= number - 1 - rollout.max_staleness


@dataclass
class RunPolicies:
    """Digests for a run's policies, a policy per round, equal on every rank.

    A policy's digest covers the starting checkpoint, the settings that change training, and the documents of
    all rounds so far. It needs no checkpoint and no layout: after a rollback, training the published rounds
    again gives the same policies.
    """

    run: Path
    start: Policy
    """The policy before the first round."""
    rollout: RolloutConfig
    settings: Mapping[str, Any]
    """Settings with an effect on training, in JSON values."""
    _trained: str = ""
    """Digest over start and previous rounds; "" before the first round."""
    _recent: dict[int, str] = field(default_factory=dict)
    """Step -> digest, for policies that may have generated the next round."""

    def at(self, step: int) -> Policy:
        """Return the policy after the last step of a round."""
        if step not in self._recent:
            self._recent[step] = _hash_texts(self._trained, str(step)) if step else self.start.sha256
            self._recent = dict([*self._recent.items()][-1 - self.rollout.max_staleness:])
        return Policy(self.run, step, self._recent[step]) if step else self.start

    def is_own(self, step: int, sha256: str) -> bool:
        """Return whether a policy from `step` belongs to the run, judged by recent digests."""
        return sha256 in self._recent.values() or step < min(self._recent)

    def begin(self, step: int, documents_sha256: str) -> None:
        """Record the begin of a round.

        Args:
            step: optimizer step before the round.
            documents_sha256: digest of the round's training documents.
        """
        # In the middle of a round the digest came from the checkpoint.
        if not step % self.rollout.steps_per_round:
            settings = format_json(dict(self.settings))
            self._trained = _hash_texts(self.at(step).sha256, documents_sha256, settings)

    def state(self) -> dict[str, Any]:
        """Return JSON values for `state.json`."""
        return {"trained": self._trained, "recent": [*self._recent.items()]}

    def restore(self, state: dict[str, Any]) -> None:
        self._trained = str(state["trained"])
        self._recent = {int(step): str(sha256) for step, sha256 in state["recent"]}


def _hash_checkpoint_policy(path: Path) -> str:
    """Return the digest of a checkpoint's policy. Raises `UserError`: `state.json` is damaged."""
    file = path / checkpoints.STATE_FILE
    try:
        state = json.loads(file.read_text(encoding="utf-8")).get(FEED_STATE)
        if not state:  # checkpoint of another command, without rounds
            return manifest_sha256(path)
        return _hash_texts(str(state["trained"]), str(checkpoints.checkpoint_step(path)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise UserError(f"{file}: is damaged ({type(e).__name__}: {e}); restore it from a copy") from None


def _hash_texts(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
