"""Log-probability columns for a round: by the policy at the round's start (`OLD`), by a reference model
(`REFERENCE`), and by teachers (`TEACHER`).

A column is a file RUN/rounds/0001.COLUMN.f32: a float32 per token, and a checksum, verified when the file is
read. `OLD` is computed before the first step of the round, for the labels of the later steps; when those run,
the weights have changed, and the file is read. Labels of the first step have NaN, because its forward pass
yields these log-probabilities itself.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from megatron_sov.base.artifacts import format_json, write_atomically
from megatron_sov.base.documents.shard_files import RouteShape
from megatron_sov.base.errors import UserError, warn
from megatron_sov.base.sealed import find_seal_damage
from megatron_sov.engine.parallel.world import run_on_main
from megatron_sov.model.config import RunConfig
from megatron_sov.post.document_logprobs import run_with_weights, write_logprobs
from megatron_sov.post.policy import OLD, REFERENCE, TEACHER
from megatron_sov.post.rl.teachers import ScoringTeacher, describe_teachers, write_teachers
from megatron_sov.runs import checkpoints
from megatron_sov.runs.checkpoints import hash_checkpoint_files
from megatron_sov.runs.folder import RunFolder
from megatron_sov.train.data.requirements import build_replay_shape
from megatron_sov.train.data.rounds import PublishedRound
from megatron_sov.train.feed import FeedView

REFERENCE_NOTE = "reference.json"
"""File in RUN/rounds with the reference model's digest."""
TEACHERS_NOTE = "teachers.json"
"""File in RUN/rounds with domain -> `describe_teachers`."""


@dataclass(frozen=True)
class LogprobColumns:
    """A run's log-probability columns."""

    names: tuple[str, ...]
    """Columns to compute, among `OLD`, `REFERENCE`, `TEACHER`."""
    temperature: float
    routes: RouteShape | None
    """Shape of the expert routes for replay in `OLD`; None: no replay. `REFERENCE` never replays routes."""
    reference: Path
    """Reference checkpoint: the start of the run."""
    reference_sha256: str = ""
    teachers: tuple[ScoringTeacher, ...] = ()

    def compute(self, view: FeedView, opened: PublishedRound, *, is_first: bool) -> dict[str, np.ndarray]:
        """Return column -> [tokens in the round] float32; called by all processes together.

        Args:
            view: the run.
            opened: the round that the training loop has opened, from `RoundDocuments.read`.
            is_first: whether the next step is the first of the round.

        Raises:
            UserError: the file of `OLD` is missing or damaged after the first step of a round, or the
                reference or a teacher has changed since earlier rounds.
        """
        if opened.documents is None:  # nothing in the round is learned
            return {}
        if REFERENCE in self.names:
            run_on_main(view.world, partial(
                _check_models, opened.path.with_name(REFERENCE_NOTE), {"sha256": self.reference_sha256},
                "earlier rounds have the reference {recorded}, and --from is {current}; resume --from the "
                "checkpoint that the run began with"))
        if TEACHER in self.names:
            run_on_main(view.world, partial(
                _check_models, opened.path.with_name(TEACHERS_NOTE), describe_teachers(self.teachers),
                "earlier rounds have other teachers ({recorded}) than the command ({current}); resume with "
                "the teachers that the run began with"))
        return {name: self._load_column(view, name, opened, is_first=is_first) for name in self.names}

    def _load_column(self, view: FeedView, name: str, opened: PublishedRound, *,
                     is_first: bool) -> np.ndarray:
        file, num_tokens = column_file(opened.path, name), int(opened.starts[-1])
        num_documents = len(opened.starts) - 1
        num_skipped = 0  # the first documents, whose tokens have NaN in the column
        if name == OLD:
            # a step is a range of documents; the first learning step computes `OLD` itself: skip to its end
            learning_steps = [step for i, step in enumerate(opened.steps) if i not in opened.idle]
            num_skipped = learning_steps[0].stop if learning_steps else num_documents
        if num_skipped == num_documents:
            return np.broadcast_to(np.float32(np.nan), num_tokens)
        identity = run_on_main(view.world, partial(self._identify_column, opened, name))
        # before the first step the model has the weights for `OLD`: compute it even if the file exists, whose
        # checksum does not cover weights
        must_compute = is_first and name == OLD
        if not must_compute:
            damage = run_on_main(view.world, partial(find_seal_damage, file, identity))
            if damage and name == OLD:
                raise UserError(f"{damage}; the round has begun, and the weights at its start are gone: "
                                f"{_describe_fix(opened)}")
            if damage and view.world.is_main and file.exists():
                warn(f"{damage}; it is computed again", view.events.write, step=view.step)
            must_compute = bool(damage)
        if must_compute:
            self._write_column(view, name, opened, num_skipped, identity)
        # Mapped, because a process reads only the numbers for local rows.
        return np.memmap(file, np.float32, "r", shape=(num_tokens,))

    def _write_column(self, view: FeedView, name: str, opened: PublishedRound, num_skipped: int,
                      identity: str) -> None:
        file = column_file(opened.path, name)
        if name == TEACHER:
            write_teachers(view, self.teachers, opened, file, identity)
            return
        assert opened.documents is not None, f"{opened.path} has no documents"
        write = partial(
            write_logprobs, view, opened.documents, file, identity, num_skipped=num_skipped,
            seq_len=view.config.data.phases[0].seq_len, rows_per_batch=view.config.train.micro_batch_size,
            temperature=self.temperature, routes=self.routes if name == OLD else None)
        if name == OLD:
            write()
        else:
            run_with_weights(self.reference, view, write)

    def _identify_column(self, opened: PublishedRound, name: str) -> str:
        """Return the text that the checksum covers: document digests, and reference or teacher digests."""
        models = {REFERENCE: self.reference_sha256,
                  TEACHER: json.dumps(describe_teachers(self.teachers), sort_keys=True)}
        return f"{hash_checkpoint_files(opened.path)} {name} {models.get(name, '')}"


def _check_models(file: Path, current: Mapping[str, str], message: str) -> None:
    """Record the reference or teacher digests in `file`. Raise `UserError` if `file` has others, with
    `message`: a template with {recorded} and {current}."""
    if not file.is_file():
        write_atomically(file, format_json(dict(current)))
        return
    try:
        recorded = {name: str(digest)
                    for name, digest in json.loads(file.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{file}: is damaged ({type(e).__name__}: {e}); restore it from a copy") from None
    if recorded != current:
        raise UserError(f"{file}: " + message.format(recorded=_format_digests(recorded),
                                                     current=_format_digests(current)))


def _format_digests(models: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {digest[:12]}".strip() for name, digest in sorted(models.items()))


def _describe_fix(opened: PublishedRound) -> str:
    run = RunFolder(opened.path.parents[1])
    # Published rounds can be trained again from an earlier checkpoint, or from the start.
    number = int(opened.path.name)  # RUN/rounds/0001
    steps_before = (number - 1) * len(opened.steps)
    earlier = checkpoints.latest_checkpoint_until(run.checkpoints, steps_before)
    stale = "all checkpoints" if earlier is None else f"the checkpoints after {earlier.name}"
    return f"delete {stale} in {run.checkpoints}, and give the same command with --resume"


def column_file(path: Path, name: str) -> Path:
    return path.with_name(f"{path.name}.{name}.f32")


def select_columns(config: RunConfig, needed: Collection[str], start: Path,
                   teachers: Sequence[ScoringTeacher] = ()) -> LogprobColumns:
    """Return the columns in `needed`; `start` is the reference model's checkpoint."""
    # Preferences compare distributions at temperature 1; policy gradients compare the sampled distribution.
    temperature = 1.0 if config.policy.learns_preferences else config.rollout.temperature
    return LogprobColumns(
        names=tuple(name for name in needed if name in (OLD, REFERENCE, TEACHER)),
        temperature=temperature, routes=build_replay_shape(config), reference=start,
        reference_sha256=hash_checkpoint_files(start) if REFERENCE in needed else "",
        teachers=tuple(teachers))
