"""What the trainer itself says of a round's documents before it learns from them: columns beside those that
were published, computed by its own forward pass.

They stand in RUN/rounds/0001.COLUMN.f32, a float32 for each token and a checksum of them all, which is
checked when they are read. The policy's are computed anew whenever a run stands before the round's first
step; later its weights are others, and the file is what is read. Of what the first step learns the policy's
are those that the step computes itself: there they are NaN.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from megatron_sov.artifacts import atomic_write, to_json
from megatron_sov.config import RunConfig
from megatron_sov.data.rounds import Round
from megatron_sov.data.routes import replayed_routes
from megatron_sov.documents.routes import RouteShape
from megatron_sov.errors import UserError
from megatron_sov.mcore.checkpoint import load
from megatron_sov.mcore.model.local_shards import local_shards
from megatron_sov.mcore.parallel.world import on_main
from megatron_sov.models.adapters import PREFIX
from megatron_sov.obs.warning import warn
from megatron_sov.post.document_logprobs import document_logprobs
from megatron_sov.post.parts.policy_loss import OLD, REFERENCE
from megatron_sov.post.reference import files_sha256
from megatron_sov.runs.folder import RunFolder
from megatron_sov.sealed import seal_damage, write_sealed
from megatron_sov.train.feed import FeedView

REFERENCE_NOTE = "reference.json"
"""File of RUN/rounds: which model `REFERENCE` is of."""
Value = TypeVar("Value")


@dataclass(frozen=True)
class TrainerColumns:
    """The columns of a run."""

    names: tuple[str, ...]
    """`OLD`: log p(label) of the policy that begins a round; `REFERENCE`: of the model that the run starts
    from; those that are needed."""
    temperature: float
    """Of samples, and so of these."""
    routes: RouteShape | None
    """Of routes that are replayed, by the policy alone: the reference routes as it does; None: none are."""
    with_reference: Callable[[FeedView, Callable[[], np.ndarray]], np.ndarray]
    """(run, compute) -> what `compute` returns where the model has the reference's weights."""
    reference_sha256: str = ""
    """What stands for the reference's weights."""

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
            on_main(view.world, partial(self._refuse_other_reference, opened.path.with_name(REFERENCE_NOTE)))
        return {name: self._column(view, name, opened, is_first=is_first) for name in self.names}

    def _refuse_other_reference(self, file: Path) -> None:
        if not file.is_file():
            atomic_write(file, to_json({"sha256": self.reference_sha256}))
            return
        try:
            begun = str(json.loads(file.read_text(encoding="utf-8"))["sha256"])
        except (ValueError, TypeError, KeyError) as e:
            raise UserError(f"{file}: is damaged ({type(e).__name__}: {e}); restore it from a copy") from None
        if begun != self.reference_sha256:
            raise UserError(f"{file}: the run's divergence is from a model of sha256 {begun[:12]}, and "
                            f"--from is {self.reference_sha256[:12]}; resume --from the one that it began "
                            "with")

    def _column(self, view: FeedView, name: str, opened: Round, *, is_first: bool) -> np.ndarray:
        file, count = file_of(opened.path, name), int(opened.starts[-1])
        # documents of which the step itself tells what is needed
        passed = len(opened.steps[0]) if name == OLD else 0
        if passed == len(opened.starts) - 1:
            return np.full(count, np.nan, np.float32)
        is_anew = is_first and name == OLD
        of = on_main(view.world, partial(self._of, opened, name))
        damage = None if is_anew else on_main(view.world, partial(seal_damage, file, of))
        if is_anew or damage:
            if damage and name == OLD:
                raise UserError(f"{damage}; the run stands inside of the round: {_way_back(opened)}")
            if damage and view.world.is_main and file.exists():
                warn(f"{damage}; it is computed anew", view.events.write, step=view.step)
            compute = partial(self._compute, view, opened, passed, self.routes if name == OLD else None)
            found = compute() if name == OLD else self.with_reference(view, compute)
            on_main(view.world, partial(write_sealed, file, found.tobytes(), of))
        return np.memmap(file, np.float32, "r", shape=(count,))

    def _of(self, opened: Round, name: str) -> str:
        """Return what a column's checksum is bound to: the documents, and the reference where it is that
        one's."""
        return f"{files_sha256(opened.path)} {name} {self.reference_sha256 if name == REFERENCE else ''}"

    def _compute(self, view: FeedView, opened: Round, passed: int, routes: RouteShape | None) -> np.ndarray:
        """Return the numbers of a round's documents, NaN for those of the first `passed` ones."""
        assert opened.documents is not None, f"{opened.path} has no documents"
        found = document_logprobs(view, opened.documents, range(passed, len(opened.starts) - 1),
                                  view.config.data.phases[0].seq_len, view.config.train.micro_batch_size,
                                  self.temperature, routes)
        return np.concatenate([np.full(opened.starts[passed], np.nan, np.float32), found])


def _way_back(opened: Round) -> str:
    """Return what to do where the weights that begin a round are gone and needed."""
    begin = (int(opened.path.name) - 1) * len(opened.steps)
    run = RunFolder(opened.path.parents[1])
    if begin and not run.checkpoint(begin).is_dir():
        return "restore the file from a copy, or start a new --run --from the last checkpoint"
    return (f"delete the checkpoints behind step-{begin} in {run.checkpoints}, and give the same command "
            "with --resume")


def file_of(path: Path, name: str) -> Path:
    """Return where a column of a published round stands."""
    return path.with_name(f"{path.name}.{name}.f32")


def columns_of_run(config: RunConfig, needed: Collection[str], start: Path) -> TrainerColumns:
    """Return the columns that a run's objective reads, and that are not published.

    Args:
        config: of the run.
        needed: all that the objective reads.
        start: the checkpoint that it starts from, its reference.
    """
    return TrainerColumns(tuple(name for name in needed if name in (OLD, REFERENCE)),
                          config.rollout.temperature, replayed_routes(config),
                          partial(with_weights_of, start),
                          files_sha256(start) if REFERENCE in needed else "")


@torch.no_grad()
def with_weights_of(start: Path, view: FeedView, compute: Callable[[], Value]) -> Value:
    """Return what `compute` gives while the model has a checkpoint's weights; called by all processes
    together, between two steps.

    A second model would need as much memory again; what is put aside here are the weights alone, and only
    while the others are there.

    Args:
        start: the checkpoint.
        view: the run, whose weights and optimizer are afterwards what they were before.
        compute: calls the model, forward only.
    """
    model = view.policy.model
    model.finish_param_gather()
    blocks = list(local_shards(model))
    aside, base = [block.data.clone() for block in blocks], model.adapter_base
    try:
        for block in blocks:
            if block.key.startswith(PREFIX):
                block.data.zero_()  # an adapter that is not in the checkpoint changes nothing then
        load.load_model(start, model)
        return compute()
    finally:
        for block, data in zip(blocks, aside, strict=True):
            block.data.copy_(data)
        model.adapter_base = base
