"""Runs one training stage: checks everything that can be checked cheaply, starts the ranks, and says how it ended."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sov import models
from megatron_sov.artifacts import manifest_sha256, read_manifest
from megatron_sov.config import RunConfig, from_dict
from megatron_sov.data.ledger import plan
from megatron_sov.data.shards import Source, open_sources, tokenizer_folder
from megatron_sov.data.views import with_views
from megatron_sov.data.vocabulary import refuse_other_tokens
from megatron_sov.errors import GateFailed, StopRequested, UserError
from megatron_sov.mcore import checkpoint, determinism, run_checkpoints, world
from megatron_sov.mcore.ranks import num_ranks, under_launcher
from megatron_sov.obs import starting
from megatron_sov.obs.afterwards import RunEvents
from megatron_sov.obs.events import EVENTS, EventLog
from megatron_sov.train.exports import Exports
from megatron_sov.train.gate import Gate
from megatron_sov.train.lock import RunLock
from megatron_sov.train.loop import train
from megatron_sov.train.run_folder import RunFolder
from megatron_sov.train.stopping import StopFlag
from megatron_sov.train.trainer import ObjectiveFactory, Trainer


@dataclass(frozen=True)
class Stage:
    """One training stage, ready to run."""

    config: RunConfig
    """Resolved settings."""
    folder: RunFolder
    """Where the run lives."""
    objective: ObjectiveFactory
    """What is learned."""
    start_from: Path | None = None
    """Checkpoint whose weights the run starts from; None: initial weights."""
    resume: bool = False
    """Continue a run that is already in the folder."""
    extra_sources: tuple[Source, ...] = ()
    """Sources made on the fly, beside those of `config.data.paths`."""
    before: Callable[[Trainer], None] | None = None
    """Called on every rank before the first step of a new run."""
    after: Callable[[Trainer], dict[str, Any]] | None = None
    """Called on every rank after the last step; what it returns joins the completion manifest."""
    gate: Gate | None = None
    """What must pass for the stage to be complete."""


def run_stage(stage: Stage, nproc: int | None) -> bool:
    """Run a stage to its end.

    Returns:
        Whether it is complete; False only under a launcher, whose ranks leave in peace however a run ended.

    Raises:
        UserError: settings, data or folder do not allow it; nothing was changed.
        StopRequested: it was asked to stop, and everything is saved.
        GateFailed: its gate has not passed within its steps, and everything is saved.
    """
    stage.config.check(num_ranks(nproc))
    models.get(stage.config.model.family).check(stage.config.model)
    stage.folder.enter(stage.config, stage.resume)
    completion = stage.folder.completion()
    if completion is not None:
        print(f"{stage.folder.path}: is complete at step {completion['step']}")
        _finish_exports(stage)
        return True
    packed = open_sources(stage.config.data.paths, stage.config.model.vocab_size)
    sources = [*with_views(stage.config, packed), *stage.extra_sources]
    plan(stage.config, sources)
    if stage.start_from is not None:
        refuse_other_tokens(tokenizer_folder(sources), stage.start_from / "tokenizer")
    stage.folder.forget_failure()
    starting.note_beginning()
    code = world.launch(lambda: _rank(stage, sources), nproc, stage.config.train.num_threads)
    if code != 0:
        raise SystemExit(code)  # the rank that failed has said why
    if stage.folder.completion() is not None:
        _finish_exports(stage)
        return True
    failure = stage.folder.failure()
    if under_launcher():
        if failure is not None and os.environ.get("RANK", "0") == "0":
            print(f"gate: {stage.folder.path}: {failure}", file=sys.stderr, flush=True)
        return False
    if failure is not None:
        raise GateFailed(f"{stage.folder.path}: {failure}")
    raise StopRequested(f"{stage.folder.path}: everything is saved; continue with --resume")


def _finish_exports(stage: Stage) -> None:
    """Make the exports that a complete run has begun; no rank waits in a collective any more."""
    if os.environ.get("RANK", "0") == "0":
        Exports(stage.folder.path, stage.config.train, RunEvents(stage.folder.path).add).wait()


def _rank(stage: Stage, sources: list[Source]) -> int:
    stop = StopFlag()
    if stage.config.train.deterministic:
        determinism.switch_on()
    place = world.join(stage.config.parallel)
    lock = RunLock(stage.folder.path) if place.is_main else None
    trainer: Trainer | None = None
    try:
        _on_main(place, lambda: _lock(stage, lock))
        trainer = Trainer(stage.config, place, stage.folder, sources, stage.objective, stage.gate)
        resumed = _restore(stage, trainer)
        _on_main(place, lambda: _open(stage, trainer))
        if stage.before is not None and not resumed:
            stage.before(trainer)
        if stage.gate is not None and not resumed:
            stage.gate.begin(trainer)
        if train(trainer, stop):
            _finish(stage, trainer)
    finally:
        if trainer is not None:
            trainer.close()
        if lock is not None:
            lock.release()
            stage.folder.remove_if_empty()
    dist.barrier()
    world.leave()
    return 0


def _on_main(place: world.World, action: Callable[[], Any]) -> Any:
    """Do something on rank 0 and return its (plain) result on every rank.

    Raises:
        UserError: it failed there; on every rank, so that none waits for another.
    """
    result, problem = None, None
    if place.is_main:
        try:
            result = action()
        except UserError as e:
            problem = str(e)
    outcome = [result, problem]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def _lock(stage: Stage, lock: RunLock | None) -> None:
    stage.folder.create()
    if lock is not None:
        lock.acquire()


def _restore(stage: Stage, trainer: Trainer) -> bool:
    """Load what the run starts from; returns whether it goes on from a checkpoint of its own.

    A damaged checkpoint is set aside, loudly, for the one before.
    """
    folder = stage.folder.checkpoints
    _on_main(trainer.world, lambda: run_checkpoints.clear_leftovers(folder))
    # one process looks: on a network file system the others may still see an older listing
    while (newest := _on_main(trainer.world, lambda: run_checkpoints.latest(folder))) is not None:
        problem = checkpoint.damage(newest)
        if problem is None:
            trainer.resume(newest)
            return True
        _on_main(trainer.world, partial(_set_aside, stage.folder, newest, problem))
    _on_main(trainer.world, lambda: run_checkpoints.refuse_lost(folder))
    if stage.start_from is not None:
        trainer.load_weights(stage.start_from)
    return False


def _set_aside(folder: RunFolder, damaged: Path, problem: str) -> None:
    aside = run_checkpoints.set_aside(damaged)
    text = f"{problem}; {damaged.name} is renamed to {aside.name}, and the run goes on from the checkpoint before it"
    print(f"warning: {text}", file=sys.stderr, flush=True)
    events = EventLog(folder.path / EVENTS)
    events.write("warning", step=int(damaged.name.removeprefix("step-")), text=text)
    events.write("damaged_checkpoint", path=f"{folder.checkpoints.name}/{damaged.name}", reason=problem,
                 renamed_to=f"{folder.checkpoints.name}/{aside.name}")
    events.close()


def _open(stage: Stage, trainer: Trainer | None) -> None:
    """Write the first files: nothing that can be refused comes after this."""
    stage.folder.declare(stage.config)
    if trainer is not None:
        trainer.open_records()


def _finish(stage: Stage, trainer: Trainer) -> None:
    if stage.gate is not None and not stage.gate.passed:
        failure = stage.gate.failure()
        _on_main(trainer.world, lambda: stage.folder.fail(failure))
        return
    extra = stage.after(trainer) if stage.after is not None else {}
    last = stage.folder.checkpoint(trainer.done.step)
    _on_main(trainer.world, lambda: stage.folder.complete({
        "step": trainer.done.step, "tokens": trainer.done.tokens, "wall_s": trainer.wall_s(),
        "checkpoint": f"{stage.folder.checkpoints.name}/{last.name}", "checkpoint_sha256": manifest_sha256(last), **extra}))


def with_model_of(config: RunConfig, start_from: Path) -> RunConfig:
    """Return `config` with the architecture that a checkpoint was made with.

    Raises:
        UserError: the checkpoint belongs to another family than the recipe.
    """
    made_with = from_dict(read_manifest(start_from, run_checkpoints.KIND).settings).model
    if made_with.family != config.model.family:
        raise UserError(f"--from {start_from}: is a {made_with.family} model, recipe {config.recipe} is for "
                        f"{config.model.family}; choose a recipe of that family")
    return dataclasses.replace(config, model=made_with)
